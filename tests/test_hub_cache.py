"""The hub's cache: pinned, offline, damaged, shared with other tools and cleared."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub_commands import (
    CHUNK,
    DRAFTER,
    SOURCE,
    START,
    TARGET,
    TOKEN,
    Run,
    cache,
    listed,
    look,
    not_there,
    refused,
)
from tests.hub_server import Fault, HubServer, Repository


def test_a_revision_is_pinned(hub: HubServer, run: Run) -> None:
    refused(run("pull", f"{TARGET}@v2"), TARGET, "no revision v2", "/commits")
    first = hub.repositories[TARGET][0]
    second = Repository({**first.files, "extra.json": b"{}"}, ("main",))
    first.names = ("v1",)
    hub.repositories[TARGET].insert(0, second)
    pinned = run("pull", f"{TARGET}@v1", "--no-drafter").stdout.strip()
    assert pinned.endswith(f"/snapshots/{first.commit}")
    hub.seen.clear()
    assert run("pull", TARGET, "--no-drafter").stdout.strip().endswith(second.commit)
    assert [seen.path.rpartition("/")[2] for seen in hub.downloads()] == ["extra.json"]
    for revision in ("v1", first.commit):
        done = run("pull", f"{TARGET}@{revision}", "--no-drafter", HF_HUB_OFFLINE="1")
        assert done.stdout.strip() == pinned
    done = run("list")
    assert first.commit[:8] in done.stdout and second.commit[:8] in done.stdout


def test_without_a_network_the_cache_serves(hub: HubServer, run: Run, env: dict[str, str]) -> None:
    folders = run("pull", TARGET).stdout
    assert folders
    hub.seen.clear()
    assert run("pull", TARGET, HF_HUB_OFFLINE="1").stdout == folders
    assert hub.seen == []
    hub.faults["/api/"] = Fault(503)
    assert run("pull", TARGET).stdout == folders
    hub.stop()
    try:
        assert run("pull", TARGET).stdout == folders
        refused(run("pull", SOURCE), SOURCE, "cannot be reached", "connect")
        next(cache(env, TARGET).glob("snapshots/*/model.safetensors")).unlink()
        refused(run("pull", TARGET), TARGET, "cannot be reached")
        not_there(env, TARGET)
    finally:
        hub.start()


def test_a_refusal_is_not_hidden_by_the_cache(hub: HubServer, run: Run) -> None:
    folders = run("pull", TARGET).stdout
    hub.faults["/api/"] = Fault(401, message=TOKEN)
    refused(run("pull", TARGET), "does not know your token", "HF_HUB_OFFLINE=1 loads the copy")
    assert run("pull", TARGET, HF_HUB_OFFLINE="1").stdout == folders


def test_a_disk_without_links_has_the_files_themselves(
    hub: HubServer, env: dict[str, str], run: Run
) -> None:
    unlinked = """\
import pathlib
def symlink_to(self, target):
    raise PermissionError("no links here")
pathlib.Path.symlink_to = symlink_to
"""
    command = [sys.executable, "-P", "-c", unlinked + START, "pull", TARGET]
    for times in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        for folder in map(Path, done.stdout.splitlines()):
            assert not any(path.is_symlink() for path in folder.iterdir())
        assert bool(hub.downloads()) == (times == 0)
        hub.seen.clear()
    assert listed(run) == {TARGET: "complete", DRAFTER: "complete"}


def test_damage_on_the_disk_is_repaired(hub: HubServer, run: Run, env: dict[str, str]) -> None:
    folders = run("pull", TARGET).stdout
    for repository in (TARGET, DRAFTER):
        file = next(cache(env, repository).glob("snapshots/*/model.safetensors"))
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        old = time.time() - 60
        os.utime(file, (old, old))
        hub.seen.clear()
        assert run("pull", TARGET).stdout == folders
        assert {seen.path.rpartition("/")[2] for seen in hub.downloads()} == {"model.safetensors"}
        assert file.read_bytes() == whole
    file.write_bytes(whole[:-1])  # the wrong size is noticed when the model is loaded, too
    assert look(env, DRAFTER).returncode == 0
    assert file.read_bytes() == whole
    index = file.with_name("model.safetensors.index.json")
    index.write_text("{")
    assert listed(run)[DRAFTER] == "incomplete"


OTHER_TOOL = """\
import sys
from huggingface_hub import scan_cache_dir, snapshot_download
patterns = ["*.json", "*.safetensors"]
print(snapshot_download(sys.argv[1], allow_patterns=patterns))
print(snapshot_download(sys.argv[1], allow_patterns=patterns, local_files_only=True))
assert not scan_cache_dir().warnings
"""


@pytest.mark.parametrize("first", ["we", "others"])
def test_the_cache_is_shared_with_other_tools(
    hub: HubServer, run: Run, env: dict[str, str], first: str
) -> None:
    def others() -> str:
        command = [sys.executable, "-P", "-c", OTHER_TOOL, TARGET]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[1]

    def we() -> str:
        return run("pull", TARGET, "--no-drafter").stdout.strip()

    order = [we, others] if first == "we" else [others, we]
    folder = order[0]()
    hub.seen.clear()
    assert order[1]() == folder
    assert hub.downloads() == []
    assert listed(run) == {TARGET: "complete"}


def test_a_model_is_removed(hub: HubServer, run: Run, env: dict[str, str]) -> None:
    refused(run("rm", TARGET), TARGET, "not in", "holds no Gemma 4 model")
    assert "no Gemma 4 model" in run("list").stderr
    run("pull", TARGET)
    refused(run("rm", TARGET), "needs a yes", "--yes")
    refused(run("rm", "gemma4:e2b-qat", "--yes"), "gemma-4-E2B-it-qat-4bit is not in", TARGET)
    done = run("rm", "gemma4:e2b-bf16", "--yes")
    assert (done.returncode, done.stdout) == (0, "")
    assert f"Removed {TARGET}: " in done.stderr and "MB freed" in done.stderr
    assert f"drafter is still there: {DRAFTER}" in done.stderr
    assert not cache(env, TARGET).exists()
    assert listed(run) == {DRAFTER: "complete"}
    hub.faults["model.gguf"] = Fault(cut=CHUNK + 5_000_000, abrupt=True, times=1)
    hub.faults["/storage/"] = Fault(500)
    hub.faults["/resolve/"] = Fault()
    run("pull", SOURCE)
    assert run("rm", SOURCE, "--yes").returncode == 0
    assert listed(run) == {DRAFTER: "complete"}
