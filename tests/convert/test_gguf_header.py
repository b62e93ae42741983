"""A GGUF header that lies costs one line and no memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp_mlx.convert.gguf import GgufFile
from gemma_mtp_mlx.convert.gguf_header import READ, read_header, type_name
from tests.checkpoints import write_checkpoint
from tests.gguf_files import add_tokenizer, mostly, write_gguf

U32, STRING, ARRAY = 4, 8, 9
F32, Q4_0 = 0, 2
HUGE = 2**63


def text(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(encoded)) + encoded


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str, shape: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def start(tensors: int, pairs: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def file_of(tensors: list[bytes], pairs: list[bytes], data: int = 1024) -> bytes:
    header = start(len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return header + bytes(-len(header) % 32 + data)


WHOLE = file_of(
    [entry("a", (8, 2)), entry("b", (4,), offset=64)],
    [
        pair("general.architecture", STRING, text("gemma4")),
        pair("list", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text("yz")),
        pair("numbers", ARRAY, struct.pack("<IQ3I", U32, 3, 7, 8, 9)),
    ],
    data=80,
)


def refuse(path: Path, content: bytes, limit: int = 1 << 20) -> str:
    """Return the one line that refuses the content, which takes less memory than the limit."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller checks the text
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
    assert type(caught.value) is ValueError
    line = str(caught.value)
    assert line.startswith(str(path)) and line.isprintable() and len(line) < len(str(path)) + 400
    return line


def test_a_whole_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(WHOLE)
    metadata, tensors = read_header(path)
    assert metadata["general.architecture"] == "gemma4" and metadata["list"] == ["x", "yz"]
    assert metadata["numbers"].tolist() == [7, 8, 9]
    begin = len(WHOLE) - 80
    assert {name: (e.shape, e.start, e.nbytes) for name, e in tensors.items()} == {
        "a": ((2, 8), begin, 64),
        "b": ((4,), begin + 64, 16),
    }


@pytest.mark.parametrize("version", [2, 3])
def test_it_reads_what_ggufs_reader_reads(tmp_path: Path, version: int) -> None:
    write_checkpoint(tmp_path, "26b")
    path, _ = write_gguf(tmp_path, mostly(gguf.GGMLQuantizationType.Q4_0), edit=add_tokenizer)
    content = bytearray(path.read_bytes())
    content[4] = version
    path.write_bytes(content)
    metadata, tensors = read_header(path)
    theirs = gguf.GGUFReader(path)
    assert [
        (t.name, t.data_offset, t.n_bytes, tuple(t.shape[::-1].tolist())) for t in theirs.tensors
    ] == [(name, e.start, e.nbytes, e.shape) for name, e in tensors.items()]
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert metadata.keys() == fields.keys()
    for key, field in fields.items():
        ours = metadata[key]
        ours = ours.tolist() if isinstance(ours, np.ndarray) else ours
        want = field.contents()
        if isinstance(ours, float):
            assert np.float32(ours) == np.float32(want), key
        else:
            assert ours == want, key


def test_types_are_ggufs() -> None:
    for kind in gguf.GGMLQuantizationType:
        name = type_name(kind.value)
        assert name in (kind.name, f"type {kind.value}")
        if kind.value in READ:
            assert READ[kind.value][1:] == gguf.GGML_QUANT_SIZES[kind]
    assert type_name(12) == "Q4_K" and type_name(10**6) == "type 1000000"


LONG = struct.pack("<Q", HUGE)
LIES = {
    "empty": (b"", "is not a GGUF file"),
    "short": (b"GG", "is not a GGUF file"),
    "magic": (b"GGML" + WHOLE[4:], "is not a GGUF file; give the file of a GGUF model"),
    "pointer": (b"version https://git-lfs", "is a Git LFS pointer, not weights; run: git lfs pull"),
    "version 1": (start(0, 0, 1), "is of GGUF version 1, or big-endian"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "or big-endian; only little-endian"),
    "no counts": (WHOLE[:20], "at byte 16 its header needs 8 more, of 20 in all"),
    "pairs": (start(0, HUGE) + bytes(64), f"it announces {HUGE} metadata pairs, more than its"),
    "tensors": (start(HUGE, 0) + bytes(64), f"it announces {HUGE} tensors, more than its"),
    "key": (start(0, 1) + LONG + bytes(64), f"its header needs {HUGE} more"),
    "value": (start(0, 1) + pair("k", STRING, LONG) + bytes(64), f"its header needs {HUGE} more"),
    "kind": (file_of([], [pair("k", 13, bytes(8))]), "it holds a value of type 13"),
    "texts": (
        file_of([], [pair("k", ARRAY, struct.pack("<IQ", STRING, HUGE))]),
        f"it announces {HUGE} texts",
    ),
    "numbers": (
        file_of([], [pair("k", ARRAY, struct.pack("<IQ", U32, HUGE))]),
        f"it announces {HUGE} numbers",
    ),
    "nested": (
        file_of([], [pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50)]),
        "it holds an array of arrays",
    ),
    "bytes": (file_of([], [pair("k", STRING, text(b"\xff"))]), "is not UTF-8"),
    "key of lines": (file_of([], [pair("a\nb", U32, bytes(4))]), "is not a name"),
    "no key": (file_of([], [pair("", U32, bytes(4))]), "is not a name"),
    "long name": (file_of([entry("a" * 256, (1,))], []), "is not a name"),
    "two values": (file_of([], [pair("k", U32, bytes(4))] * 2), "it has two values for k"),
    "twice": (file_of([entry("a", (1,))] * 2, []), "tensor a is listed twice"),
    "no axes": (file_of([entry("a", ())], []), "has 0 axes"),
    "axes": (file_of([entry("a", (1,) * 5)], []), "has 5 axes"),
    "empty axis": (file_of([entry("a", (4, 0))], []), "tensor a of shape [0, 4] cannot be F32"),
    "half a block": (
        file_of([entry("a", (16, 2), Q4_0)], []),
        "tensor a of shape [2, 16] cannot be Q4_0",
    ),
    "size": (file_of([entry("a", (HUGE, HUGE))], []), "tensor a ends at byte"),
    "offset": (file_of([entry("a", (4,), offset=HUGE)], []), "tensor a ends at byte"),
    "overlap": (
        file_of([entry("b", (16,), offset=32), entry("a", (16,))], []),
        "tensors a and b overlap",
    ),
    "alignment": (
        file_of([entry("a", (4,))], [pair("general.alignment", U32, struct.pack("<I", 24))]),
        "its general.alignment is not a power of two",
    ),
    "no alignment": (
        file_of([entry("a", (4,))], [pair("general.alignment", U32, bytes(4))]),
        "its general.alignment is not a power of two",
    ),
    "alignment text": (
        file_of([entry("a", (4,))], [pair("general.alignment", STRING, text("x\ny" * 200))]),
        "is not a power of two",
    ),
    "cut data": (WHOLE[:-1], f"tensor b ends at byte {len(WHOLE)} of {len(WHOLE) - 1}"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lie_is_refused(tmp_path: Path, case: str) -> None:
    content, message = LIES[case]
    assert message in refuse(tmp_path / "file", content)


def test_every_beginning_of_a_file_is_refused(tmp_path: Path) -> None:
    for length in range(len(WHOLE)):
        refuse(tmp_path / "file", WHOLE[:length])


def test_a_header_of_a_large_file_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = start(0, 1) + pair("k", STRING, struct.pack("<Q", 1 << 28))
    path.write_bytes(content)
    with path.open("r+b") as stream:
        stream.truncate(1 << 29)  # takes no space
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="its header needs 268435456 more"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A small target with a tokenizer: where to write changes of it, and its bytes."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_checkpoint(folder, "e2b")
    path, _ = write_gguf(folder, mostly(gguf.GGMLQuantizationType.Q8_0), edit=add_tokenizer)
    return path, path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_one_line(target: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = target
    content = bytearray(whole)
    header = whole.index(b"blk.9.") + 200  # most of the header, and the tensors' entries
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    line = ""
    try:
        GgufFile(path).companion_files()
    except ValueError as error:
        line = str(error)
        kind = type(error)
    if line:
        assert kind is ValueError and len(line.splitlines()) == 1 and str(path) in line, line
