"""Programs that know nothing of this one are told its address and work."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_mtp_mlx import Pair, SamplingParams
from tests.serve.process import ServerProcess
from tests.serve.wire import wait_until

# What people run to see what a drafter is worth, but for the model's name.
PASTED = """\
import time
import ollama

start = time.time()
response = ollama.chat(
    model='builtin',
    messages=[{'role': 'user', 'content': 'Write a quick-sort implementation in Python'}],
)
seconds = time.time() - start
print(seconds)
print(response['eval_count'])
print(response['eval_count'] / seconds)
"""
PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Return a server with little memory, which bounds answers that nobody bounds."""
    log = tmp_path_factory.mktemp("small") / "log"
    with ServerProcess(log, "--kv-budget", "0.0006", "--max-batch", "1") as running:
        yield running


def run(*argv: str, env: dict[str, str], folder: Path) -> str:
    """Run Python with arguments. Returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-P", *argv],
        env={**os.environ, **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def entry_of(server: ServerProcess, endpoint: str, stream: bool) -> dict[str, Any]:
    """Wait for the line of a request in a server's log, and return it."""

    def found() -> list[dict[str, Any]]:
        entries = server.entries()
        return [e for e in entries if (e["endpoint"], e["stream"]) == (endpoint, stream)]

    assert wait_until(lambda: bool(found()))
    return found()[-1]


def test_what_people_paste_works(small: ServerProcess, tmp_path: Path) -> None:
    env = {"OLLAMA_HOST": small.url.removeprefix("http://")}
    seconds, count, speed = map(float, run("-c", PASTED, env=env, folder=tmp_path).split())
    assert count >= 1 and speed == count / seconds
    entry = entry_of(small, "/api/chat", False)
    assert entry["completion_tokens"] == count and entry["accepted"] > 0
    found = re.search(r"\((\d+) positions\)", small.said())
    assert found is not None and count <= int(found[1])


@pytest.mark.parametrize("stream", [True, False])
def test_llm_works(small: ServerProcess, pair: Pair, tmp_path: Path, stream: bool) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: gemma\n  model_name: builtin\n  api_base: {small.url}/v1\n"
    )
    argv = ["-m", "llm", "-m", "gemma", PROMPT, "-o", "temperature", "0", "-o", "max_tokens", "12"]
    said = run(
        *argv,
        *([] if stream else ["--no-stream"]),
        env={"LLM_USER_PATH": str(tmp_path)},
        folder=tmp_path,
    )
    expected = pair.generate(PROMPT, SamplingParams(max_tokens=12), num_draft_tokens=0)
    assert said.strip() == expected.text.strip()
    assert entry_of(small, "/v1/chat/completions", stream)["completion_tokens"] == 12
