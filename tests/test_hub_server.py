"""Downloads from a hub with faults: what arrives is whole and right, what does not is explained."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_commands import (
    CHUNK,
    DRAFTER,
    GENERATE,
    SOURCE,
    START,
    TARGET,
    TOKEN,
    Run,
    cache,
    listed,
    not_there,
    refused,
)
from tests.hub_server import Fault, HubServer


def test_a_model_and_its_drafter_are_downloaded_once(
    hub: HubServer, run: Run, env: dict[str, str], published: Path
) -> None:
    done = run("pull", TARGET)
    assert done.returncode == 0, done.stderr
    folders = [Path(line) for line in done.stdout.splitlines()]
    for folder, source in zip(folders, ("target", "drafter"), strict=True):
        files = {path.name: path.read_bytes() for path in (published / source).iterdir()}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert listed(run) == {TARGET: "complete", DRAFTER: "complete"}
    assert all(seen.range is None for seen in hub.downloads())
    hub.seen.clear()
    assert run("pull", TARGET).stdout == done.stdout
    assert run(*GENERATE, TARGET).stdout.strip()
    assert hub.downloads() == []
    assert [seen.path for seen in hub.seen] == [
        f"/api/models/{name}/revision/main" for name in [TARGET, DRAFTER] * 2
    ]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut=CHUNK + 5_000_000, times=1),
        Fault(cut=CHUNK + 5_000_000, times=1, abrupt=True),
        Fault(status=503, times=2),
    ],
    ids=["end", "reset", "busy"],
)
def test_a_cut_download_goes_on_where_it_was(hub: HubServer, run: Run, fault: Fault) -> None:
    hub.faults["/storage/"] = fault
    done = run("pull", SOURCE)
    assert done.returncode == 0, done.stderr
    data = Path(done.stdout.strip()).read_bytes()
    assert data == hub.repositories[SOURCE][0].files["model.gguf"]
    ranges = [seen.range for seen in hub.downloads() if "/storage/" in seen.path]
    kept = f"bytes={CHUNK}-" if fault.cut else None
    assert ranges[0] is None and ranges[-1] == kept
    assert hub.downloads()[-1].sent == len(data) - (CHUNK if fault.cut else 0)


def test_a_stalled_download_goes_on(hub: HubServer, run: Run) -> None:
    hub.faults["/storage/"] = Fault(delay_s=3, times=1)
    assert run("pull", SOURCE, HF_HUB_DOWNLOAD_TIMEOUT="1").returncode == 0


def test_a_lost_network_leaves_what_arrived_for_the_next_run(
    hub: HubServer, run: Run, env: dict[str, str]
) -> None:
    hub.faults["/storage/"] = Fault(cut=CHUNK + 5_000_000, abrupt=True, times=1)
    hub.faults["model.gguf"] = Fault(cut=0, abrupt=True)
    hub.faults["/resolve/"] = Fault()
    refused(run("pull", SOURCE), SOURCE, "cannot be reached", "run the same again", "is kept")
    not_there(env, SOURCE)
    _resumed(hub, run, env, CHUNK)


def _resumed(hub: HubServer, run: Run, env: dict[str, str], there: int) -> None:
    """Check that the next run asks for what is not there, and for no more."""
    [part] = cache(env, SOURCE).glob("blobs/*")
    assert part.stat().st_size == there
    hub.faults.clear()
    hub.seen.clear()
    done = run("pull", SOURCE)
    assert done.returncode == 0, done.stderr
    data = hub.repositories[SOURCE][0].files["model.gguf"]
    assert Path(done.stdout.strip()).read_bytes() == data
    assert [(seen.range, seen.sent) for seen in hub.downloads()] == [
        (f"bytes={there}-", 0),
        (f"bytes={there}-", len(data) - there),
    ]
    assert listed(run) == {SOURCE: "complete"}


def test_a_killed_download_is_gone_on_with(hub: HubServer, run: Run, env: dict[str, str]) -> None:
    hub.faults["/storage/"] = Fault(delay_s=0.005)
    command = [sys.executable, "-P", "-c", START, "pull", SOURCE]
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not any(part.stat().st_size for part in cache(env, SOURCE).glob("blobs/*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    not_there(env, SOURCE)
    assert listed(run) == {SOURCE: "incomplete"}
    [part] = cache(env, SOURCE).glob("blobs/*")
    _resumed(hub, run, env, part.stat().st_size)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_with_another_hash_is_not_kept(
    hub: HubServer, run: Run, env: dict[str, str], file: str
) -> None:
    whole = hub.repositories[TARGET][0].files[file]
    wrong = whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]
    hub.faults[file] = Fault(content=wrong)
    hub.faults["/resolve/"] = Fault()
    refused(run("pull", TARGET), file, TARGET, "another hash", "deleted", "run the same again")
    not_there(env, TARGET)
    held = [path.read_bytes() for path in cache(env, TARGET).rglob("*") if path.is_file()]
    assert wrong not in held
    hub.faults.clear()
    assert run("pull", TARGET).returncode == 0
    assert listed(run)[TARGET] == "complete"


GATED = ("GatedRepo", "Access to this is restricted")


@pytest.mark.parametrize(
    "path, fault, words",
    [
        ("/api/", Fault(401, *GATED), ["accept its licence", "hf auth login"]),
        ("/resolve/", Fault(403, *GATED), ["accept its licence", f"/{TARGET},"]),
        ("/api/", Fault(401, message=TOKEN), ["does not know your token", "HF_TOKEN"]),
        ("/api/", Fault(401), ["no such repository", "spelling", "private"]),
        ("/api/", Fault(404, "RepoNotFound"), ["no such repository", "spelling"]),
        ("/resolve/", Fault(403), ["your token may not read it"]),
        ("/api/", Fault(429), ["fewer requests"]),
        ("/api/", Fault(500), ["status 500", "try again later"]),
        ("/resolve/", Fault(502), ["status 502", "try again later"]),
        ("/api/", Fault(content=b"<html>Welcome to the hotel"), ["not the hub", "login page"]),
    ],
)
def test_a_refusal_is_explained(
    hub: HubServer, run: Run, env: dict[str, str], path: str, fault: Fault, words: list[str]
) -> None:
    hub.faults[path] = fault
    refused(run("pull", TARGET), TARGET, *words)
    attempts = 4 if fault.status >= 500 else 1
    assert len(hub.seen) == attempts + (path != "/api/")
    not_there(env, TARGET)


def test_a_drafter_that_cannot_be_had_is_not_silent(hub: HubServer, run: Run) -> None:
    del hub.repositories[DRAFTER]
    refused(run(*GENERATE, TARGET), DRAFTER, "no such repository")
    assert run(*GENERATE, TARGET, "--draft-model", "none").returncode == 0


def test_gguf_is_not_downloaded_to_be_run(hub: HubServer, run: Run) -> None:
    refused(run(*GENERATE, SOURCE), "GGUF", f"convert --hf-path {SOURCE} --mlx-path")
    assert hub.downloads() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 8 MB, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_is_noticed_before_the_download(
    hub: HubServer, run: Run, small_disk: Path
) -> None:
    home = str(small_disk / "hf")
    refused(run("pull", SOURCE, HF_HOME=home), "needs 25.2 MB and 8.4 MB are free", "HF_HOME", home)
    assert hub.downloads() == []


def test_a_disk_that_fills_up_is_explained(hub: HubServer, run: Run, env: dict[str, str]) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (15_000_000, 15_000_000))\n"
    command = [sys.executable, "-P", "-c", limit + START, "pull", SOURCE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    refused(done, f"no room for {SOURCE}", "disk is full", "HF_HOME", "is kept")
    not_there(env, SOURCE)
    [part] = cache(env, SOURCE).glob("blobs/*")
    _resumed(hub, run, env, part.stat().st_size)


def test_two_downloads_at_once_share_the_work(hub: HubServer, env: dict[str, str]) -> None:
    hub.faults["/storage/"] = Fault(delay_s=0.001)
    command = [sys.executable, "-P", "-c", START, "pull", SOURCE]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert len({process.communicate(timeout=60)[0] for process in both}) == 1
    assert [process.returncode for process in both] == [0, 0]
    data = hub.repositories[SOURCE][0].files["model.gguf"]
    assert sum(seen.sent for seen in hub.downloads()) == len(data)


def test_a_token_is_not_told_to_the_storage(hub: HubServer, run: Run) -> None:
    assert run("pull", TARGET, HF_TOKEN="hf_secret").returncode == 0
    told = {(seen.path.split("/")[1], seen.authorization) for seen in hub.seen}
    assert told == {("api", "Bearer hf_secret"), ("google", "Bearer hf_secret"), ("storage", None)}
