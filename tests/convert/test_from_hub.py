"""A published name is all it takes: the pair is downloaded, converted and remembered."""

import json
from pathlib import Path

from tests.hub_commands import DRAFTER, TARGET, Run
from tests.hub_server import HubServer


def test_a_pair_is_converted_by_the_targets_name(hub: HubServer, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "gemma"
    done = run("convert", "--hf-path", f"{TARGET}@v1", "--mlx-path", str(out), "-q")
    assert done.returncode == 0, done.stderr
    said = {
        folder.name: json.loads((folder / "conversion.json").read_text())["source"]
        for folder in (out, out / "drafter")
    }
    assert said["gemma"]["name"] == TARGET and said["drafter"]["name"] == DRAFTER
    assert all(len(source["revision"]) == 40 for source in said.values())
    assert run("generate", "--prompt", "x", "--max-tokens", "2", "--model", str(out)).stdout
    assert run("verify", str(out)).returncode == 0


def test_a_folder_converted_alone_finds_the_published_drafter(
    hub: HubServer, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "gemma"
    argv = ["convert", "--hf-path", TARGET, "--mlx-path", str(out), "--draft-hf-path", "none"]
    done = run(*argv)
    assert done.returncode == 0 and "drafter" not in done.stderr, done.stderr
    assert not (out / "drafter").exists()
    hub.seen.clear()
    done = run("generate", "--prompt", "x", "--max-tokens", "2", "--model", str(out))
    assert done.returncode == 0 and "Loaded in" in done.stderr, done.stderr
    assert {seen.path.split("/")[4] for seen in hub.seen if "/api/" in seen.path} == {
        DRAFTER.split("/")[1]
    }
