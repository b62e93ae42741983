"""Commands run against a hub of our own, and what to make of their output.

Each command is a process of its own, as huggingface_hub reads its settings when it is imported. Its
waits between attempts are skipped.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TARGET, DRAFTER = "google/gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant"
SOURCE = "someone/gemma-4-E2B-it-tuned-GGUF"  # a fine-tune, which has no drafter
CHUNK = 10 * 1024 * 1024  # what huggingface_hub writes at a time
GENERATE = ["generate", "--prompt", "x", "--max-tokens", "2", "--model"]
START = """\
import sys, time
time.sleep = lambda seconds: None
from gemma_mtp_mlx.cli import main
sys.exit(main())
"""

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
TOKEN = "Invalid credentials in Authorization header"


def cache(env: dict[str, str], repository: str) -> Path:
    return Path(env["HF_HOME"]) / "hub" / f"models--{repository.replace('/', '--')}"


def states(lines: list[str]) -> dict[str, str]:
    """Return the state of each repository that was listed."""
    found: dict[str, set[str]] = {}
    for line in map(json.loads, lines):
        found.setdefault(line["repository"], set()).add(line["state"])
    return {repository: " and ".join(sorted(states)) for repository, states in found.items()}


def listed(run: Run) -> dict[str, str]:
    """Return the state of each repository that is listed."""
    done = run("list", "--json")
    assert done.returncode == 0
    return states(done.stdout.splitlines())


def refused(done: Done, *words: str) -> None:
    """Check that a command ended in one line that holds all the words."""
    assert done.returncode == 2
    assert done.stdout == ""
    *_, line = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert line.startswith("mlx-gemma-mtp: error: ")
    for word in words:
        assert word in line


# What `list` prints, and what `generate` begins with: in one process, which does not import mlx.
LOOK = """\
import sys
from gemma_mtp_mlx import hub
from gemma_mtp_mlx.cli import main
main(["list", "--json"])
hub.resolve(sys.argv[1])
"""


def look(env: dict[str, str], repository: str) -> Done:
    """List the cache, then find a model as if to load it."""
    command = [sys.executable, "-P", "-c", LOOK, repository]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def not_there(env: dict[str, str], repository: str) -> None:
    """Check that a model is neither listed as complete nor loaded."""
    done = look(env | {"HF_HUB_OFFLINE": "1"}, repository)
    assert done.returncode == 1
    assert states(done.stdout.splitlines()).get(repository) in (None, "incomplete")
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"ValueError: {repository} is not in ") and "or not all of it" in line
