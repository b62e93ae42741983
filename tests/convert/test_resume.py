"""A conversion that is ended goes on from its last finished file, and never looks complete."""

from __future__ import annotations

import errno
import hashlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from gemma_mtp_mlx.convert import Quantization, conversion, convert, stream
from gemma_mtp_mlx.convert.packing import Change, Strip, convert_rows
from tests.checkpoints import write_pair

SHARD_BYTES = 200_000
KILLED = """
import os, signal, sys
from pathlib import Path
from gemma_mtp_mlx.convert import Quantization, conversion, convert

conversion.SHARD_BYTES = int(sys.argv[5])

def kill(done, total):
    if done >= total * float(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

source, draft, out = sys.argv[1:4]
convert(source, Path(out), draft_source=draft, quantization=Quantization(), on_bytes=kill)
"""


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setattr(conversion, "SHARD_BYTES", SHARD_BYTES)
    source, draft_source = write_pair(tmp_path / "in", "26b", layout="conditional")
    return str(source), str(draft_source)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the stored tensors whose rows were converted, as they are."""
    seen: list[str] = []

    def counted(stored: str, value: object, change: Change) -> Strip:
        seen.append(stored)
        return convert_rows(stored, value, change)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "convert_rows", counted)
    return seen


def finish(pair: tuple[str, str], out: Path) -> None:
    convert(pair[0], out, draft_source=pair[1], quantization=Quantization())


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_killed_conversion_goes_on_and_writes_the_same_bytes(
    tmp_path: Path, pair: tuple[str, str], read: list[str], share: float
) -> None:
    out = tmp_path / "new" / "out"
    argv = [*pair, str(out), str(share), str(SHARD_BYTES)]
    ended = subprocess.run([sys.executable, "-P", "-c", KILLED, *argv], check=False)
    assert ended.returncode == -signal.SIGKILL
    partial = out.parent / ".out.partial"
    assert [path.name for path in out.parent.iterdir()] == [partial.name]
    there = {path.name for path in partial.rglob("*.safetensors")}
    finish(pair, out)
    again = set(read)
    read.clear()
    finish(pair, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (len(again) < len(set(read))) == bool(there)
    assert bool(there) == (share > 0)


def test_a_damaged_file_is_made_again(tmp_path: Path, pair: tuple[str, str]) -> None:
    out = tmp_path / "out"
    argv = [*pair, str(out), "0.8", str(SHARD_BYTES)]
    subprocess.run([sys.executable, "-P", "-c", KILLED, *argv], check=False)
    shard = sorted((tmp_path / ".out.partial").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (tmp_path / ".out.partial" / "left.unfinished").write_bytes(b"left")
    finish(pair, out)
    finish(pair, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_nothing_is_taken_over_from_another_conversion(
    tmp_path: Path, pair: tuple[str, str], read: list[str]
) -> None:
    out = tmp_path / "out"
    argv = [*pair, str(out), "0.8", str(SHARD_BYTES)]
    subprocess.run([sys.executable, "-P", "-c", KILLED, *argv], check=False)
    convert(pair[0], out, draft_source=pair[1], quantization=Quantization(bits=8))
    eight = set(read)
    read.clear()
    convert(pair[0], tmp_path / "whole", draft_source=pair[1], quantization=Quantization(bits=8))
    assert digests(out) == digests(tmp_path / "whole")
    assert eight == set(read)


def test_a_source_that_changed_is_converted_anew(
    tmp_path: Path, pair: tuple[str, str], read: list[str]
) -> None:
    out = tmp_path / "out"
    argv = [*pair, str(out), "0.8", str(SHARD_BYTES)]
    subprocess.run([sys.executable, "-P", "-c", KILLED, *argv], check=False)
    for file in Path(pair[0]).glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    finish(pair, out)
    eight = set(read)
    read.clear()
    finish(pair, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")
    assert eight == set(read)


def at_half(error: BaseException) -> Callable[[int, int], None]:
    def end(done: int, total: int) -> None:
        if 2 * done > total:
            raise error

    return end


@pytest.mark.parametrize(
    "error, kept",
    [
        (KeyboardInterrupt(), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (ValueError("wrong"), False),
    ],
)
def test_what_ends_a_conversion_decides_what_is_kept(
    tmp_path: Path, pair: tuple[str, str], error: BaseException, kept: bool
) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(type(error)):
        convert(
            pair[0],
            out,
            draft_source=pair[1],
            quantization=Quantization(),
            on_bytes=at_half(error),
        )
    assert [path.name for path in out.parent.iterdir()] == [".out.partial"] * kept
    assert not list(out.parent.rglob("*.unfinished"))
    finish(pair, out)
    assert (out / "drafter" / "config.json").is_file()


def test_an_interrupt_before_a_file_is_finished_leaves_nothing(
    tmp_path: Path, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "SHARD_BYTES", 5 << 30)
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(pair[0], out, on_bytes=at_half(KeyboardInterrupt()))
    assert list(out.parent.iterdir()) == []


def test_a_full_disk_is_named_and_what_was_finished_is_kept(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    """On a file system of a megabyte, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        with pytest.raises(OSError, match="No space left"):
            conversion_without_a_check(pair, disk / "out")
        assert list(disk.rglob("*.unfinished")) == []
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def conversion_without_a_check(pair: tuple[str, str], out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_check_disk", lambda *_: None)
        convert(pair[0], out, draft_source=pair[1])


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"0\.1 GB are needed for .* and 0\.0 GB are free there"):
        finish(pair, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_two_conversions_do_not_write_one_folder(tmp_path: Path, pair: tuple[str, str]) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    with FileLock(partial / "lock"), pytest.raises(ValueError, match="another conversion"):
        finish(pair, tmp_path / "out")
    finish(pair, tmp_path / "out")
