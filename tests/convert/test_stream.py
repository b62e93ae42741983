"""A conversion reads strips, never tensors; is planned from headers; says where it came from."""

from __future__ import annotations

import json
import shutil
import threading
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import pytest

from gemma_mtp_mlx.checkpoint import Folder
from gemma_mtp_mlx.convert import Quantization, conversion, convert, packing, stream
from gemma_mtp_mlx.convert.packing import Change, Strip, convert_rows
from tests.checkpoints import FAMILIES, write_pair


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [None, Quantization()])
def test_no_more_than_a_strip_is_read_at_a_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    quantization: Quantization | None,
) -> None:
    """So memory does not depend on the size of a tensor; a row is read whole."""
    source, draft_source = write_pair(tmp_path / "in", family)
    monkeypatch.setattr(packing, "STRIP_BYTES", 1000)
    sizes: list[int] = []
    read = Folder.rows

    def rows(self: Folder, name: str, start: int, stop: int) -> mx.array:
        value = read(self, name, start, stop)
        if stop - start > 1 and threading.current_thread() is not threading.main_thread():
            sizes.append(value.nbytes)
        return value

    monkeypatch.setattr(Folder, "rows", rows)
    convert(
        str(source), tmp_path / "out", draft_source=str(draft_source), quantization=quantization
    )
    assert len(sizes) > 100 and max(sizes) <= 1000


def test_few_strips_are_under_way_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = write_pair(tmp_path / "in", "31b")
    monkeypatch.setattr(packing, "STRIP_BYTES", 1000)
    lock, read, written, most = threading.Lock(), 0, 0, 0

    def counted(stored: str, value: mx.array, change: Change) -> Strip:
        nonlocal read, most
        with lock:
            read += 1
            most = max(most, read - written)
        return convert_rows(stored, value, change)

    def counting(done: int, total: int) -> None:
        nonlocal written
        written += 1

    monkeypatch.setattr(stream, "convert_rows", counted)
    convert(str(source), tmp_path / "out", on_bytes=counting)
    assert read == written > 1000
    assert most <= 3 * stream.WORKERS + 1  # two for each thread, and one in it


def test_threads_are_made_once(tmp_path: Path) -> None:
    """MLX never closes a stream, which is a thread."""
    source, draft_source = write_pair(tmp_path / "in", "31b")
    counts = []
    for name in ("first", "second", "third"):
        convert(str(source), tmp_path / name, draft_source=str(draft_source))
        counts.append(len(list(Path("/proc/self/task").iterdir())))
    assert counts[0] == counts[1] == counts[2]


def test_progress_counts_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "STRIP_BYTES", 10_000)
    source, draft_source = write_pair(tmp_path / "in", "26b")
    seen: list[tuple[int, int]] = []
    report = convert(
        str(source),
        tmp_path / "out",
        draft_source=str(draft_source),
        on_bytes=lambda done, total: seen.append((done, total)),
    )
    assert report.drafter is not None
    total = report.target.bytes_in + report.drafter.bytes_in
    assert {total for _, total in seen} == {total}
    done = [done for done, _ in seen]
    assert done == sorted(done) and done[-1] == total


def test_a_value_that_is_not_finite_ends_it(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path / "in", "31b")
    file = source / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = b"\0\0\xc0\x7f"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tensor model\.\S+ holds values that are not finite"):
        convert(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_value_too_large_for_the_type_asked_for_ends_it(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path / "in", "31b")
    file = source / "model.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight, as F16, holds values that are not"):
        convert(str(source), tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_snapshot_of_the_hub_is_recorded_with_its_revision(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--google--gemma-4-31B-it" / "snapshots" / "0123abcd"
    source, draft_source = write_pair(tmp_path / "in", "31b")
    shutil.copytree(source, snapshot)
    out = tmp_path / "out"
    convert(str(snapshot), out, draft_source=str(draft_source))
    source_said = json.loads((out / "conversion.json").read_text())["source"]
    assert (source_said["name"], source_said["revision"]) == (
        "google/gemma-4-31B-it",
        "0123abcd",
    )
    drafter_said = json.loads((out / "drafter" / "conversion.json").read_text())["source"]
    assert (drafter_said["name"], drafter_said["revision"]) == ("assistant", None)
    card = (out / "README.md").read_text()
    assert "base_model:\n- google/gemma-4-31B-it\n" in card and "license: apache-2.0" in card
    assert str(tmp_path) not in (out / "conversion.json").read_text() + card


def test_the_record_has_the_hash_of_every_file(tmp_path: Path) -> None:
    source, draft_source = write_pair(tmp_path / "in", "26b", layout="conditional")
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "SHARD_BYTES", 300_000)
        convert(str(source), out, draft_source=str(draft_source), quantization=Quantization(bits=8))
    for folder, origin in ((out, source), (out / "drafter", draft_source)):
        record = json.loads((folder / "conversion.json").read_text())
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert set(record["files"]) == files - {"conversion.json"}
        for name, digest in record["files"].items():
            assert stream_sha(folder / name) == digest, name
        weights = {path.name for path in origin.glob("*.safetensors")}
        assert set(record["source"]["files"]) == weights
        for name, digest in record["source"]["files"].items():
            assert stream_sha(origin / name) == digest, name


def stream_sha(file: Path) -> str:

    return sha256(file.read_bytes()).hexdigest()
