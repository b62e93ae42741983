"""Downloads from a hub with faults: what arrives is whole and right, what does not is explained.

Each command is a process of its own, as huggingface_hub reads its settings when it is imported. Its
waits between attempts are skipped.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.hub_server import Fault, HubServer, Repository
from tests.text_model import write_text_model

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


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with target, drafter and a repository with a GGUF file."""
    folder = tmp_path_factory.mktemp("published")
    target = write_text_model(folder)
    (target / "drafter").rename(folder / "drafter")
    (folder / "gguf").mkdir()
    data = np.random.default_rng(1).bytes(2 * CHUNK + 4 * 1024 * 1024)
    (folder / "gguf" / "model.gguf").write_bytes(data)
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[HubServer]:
    server = HubServer()
    server.add(TARGET, published / "target", "v1")
    server.add(DRAFTER, published / "drafter")
    server.add(SOURCE, published / "gguf")
    yield server
    server.stop()


@pytest.fixture
def env(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    mine = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    return mine | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1,localhost",
    }


@pytest.fixture
def run(env: dict[str, str]) -> Run:
    """Return a function that runs a command, with more of the environment."""

    def start(*argv: str, **more: str) -> Done:
        command = [sys.executable, "-c", START, *argv]
        return subprocess.run(
            command, env=env | more, capture_output=True, text=True, timeout=60, check=False
        )

    return start


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


# What `list` prints, and what `generate` begins with: in one process, which does not import mlx.
LOOK = """\
import sys
from gemma_mtp_mlx import hub
from gemma_mtp_mlx.cli import main
main(["list", "--json"])
print(hub.resolve(sys.argv[1]), file=sys.stderr)
"""


def not_there(env: dict[str, str], repository: str) -> None:
    """Check that a model is neither listed as complete nor loaded."""
    command = [sys.executable, "-c", LOOK, repository]
    offline = env | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert done.returncode == 1
    assert states(done.stdout.splitlines()).get(repository) in (None, "incomplete")
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"ValueError: {repository} is not in ") and "or not all of it" in line


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
    command = [sys.executable, "-c", START, "pull", SOURCE]
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
TOKEN = "Invalid credentials in Authorization header"


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
        refused(run(*GENERATE, TARGET), TARGET, "cannot be reached")
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
    command = [sys.executable, "-c", unlinked + START, "pull", TARGET]
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
    assert run(*GENERATE, TARGET).returncode == 0
    assert file.read_bytes() == whole
    index = file.with_name("model.safetensors.index.json")
    index.write_text("{")
    assert listed(run)[DRAFTER] == "incomplete"


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
    command = [sys.executable, "-c", limit + START, "pull", SOURCE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    refused(done, f"no room for {SOURCE}", "disk is full", "HF_HOME", "is kept")
    not_there(env, SOURCE)
    [part] = cache(env, SOURCE).glob("blobs/*")
    _resumed(hub, run, env, part.stat().st_size)


def test_two_downloads_at_once_share_the_work(hub: HubServer, env: dict[str, str]) -> None:
    hub.faults["/storage/"] = Fault(delay_s=0.001)
    command = [sys.executable, "-c", START, "pull", SOURCE]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert len({process.communicate(timeout=60)[0] for process in both}) == 1
    assert [process.returncode for process in both] == [0, 0]
    data = hub.repositories[SOURCE][0].files["model.gguf"]
    assert sum(seen.sent for seen in hub.downloads()) == len(data)


def test_a_token_is_not_told_to_the_storage(hub: HubServer, run: Run) -> None:
    assert run("pull", TARGET, HF_TOKEN="hf_secret").returncode == 0
    told = {(seen.path.split("/")[1], seen.authorization) for seen in hub.seen}
    assert told == {("api", "Bearer hf_secret"), ("google", "Bearer hf_secret"), ("storage", None)}


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
        command = [sys.executable, "-c", OTHER_TOOL, TARGET]
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
