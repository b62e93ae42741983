"""The header of a GGUF file: its metadata, and where its tensors lie. Checked before believed.

Every count and length is compared with the bytes that are left before anything of that size is
made, so a damaged or hostile file costs one error and no memory. The gguf package's own reader maps
the file and follows its counts without that comparison: an announced length makes it loop without
end, and damage surfaces as IndexError or KeyError. It is therefore used by our tests only.
Source: github.com/ggml-org/ggml, docs/gguf.md (versions 2 and 3, little-endian).
"""

import math
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LARGEST_HEADER = 100_000_000  # published files need some 16 MB, most of it the vocabulary
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_LEAST_PAIR, _LEAST_TENSOR = 13, 32  # bytes of the smallest metadata pair and tensor entry
_MOST_AXES = 4
_LONGEST_NAME = 255


class Packing(NamedTuple):
    """How a type stores numbers: so many in a block of so many bytes."""

    name: str
    numbers: int
    nbytes: int


READ = {
    0: Packing("F32", 1, 4),
    1: Packing("F16", 1, 2),
    2: Packing("Q4_0", 32, 18),
    3: Packing("Q4_1", 32, 20),
    8: Packing("Q8_0", 32, 34),
    14: Packing("Q6_K", 256, 210),
    30: Packing("BF16", 1, 2),
}
_OTHER = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K"}
_OTHER |= {13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
_OTHER |= {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32"}
_OTHER |= {27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}


class Entry(NamedTuple):
    """A tensor as the header describes it.

    type: GGML's number of its type. shape: as numpy has it, the last axis contiguous. start: of
    its data, in bytes from the beginning of the file once `read_header` returns it.
    """

    type: int
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one run of the last axis. Only for types in READ."""
        packing = READ[self.type]
        return self.shape[-1] // packing.numbers * packing.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor. Only for types in READ."""
        return math.prod(self.shape[:-1]) * self.row_bytes


def damaged(file: Path, why: str) -> ValueError:
    """Return the error of a file whose bytes contradict themselves."""
    return ValueError(f"{file} is damaged or incomplete: {why}; download or copy it again")


def type_name(number: int) -> str:
    """Return what llama.cpp calls a tensor type."""
    return READ[number].name if number in READ else _OTHER.get(number, f"type {number}")


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Return the metadata by key and the tensors by name.

    Numbers are Python's; arrays of numbers are numpy arrays, arrays of texts are lists.
    Raises: ValueError naming the file for anything that is not a whole GGUF file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = _Header(file, stream, size)
        header.check_kind()
        tensor_count, pair_count = header.number("<u8"), header.number("<u8")
        header.check_room(pair_count, _LEAST_PAIR, "metadata pairs")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = header.name()
            if key in metadata:
                raise damaged(file, f"it has two values for {key}")
            metadata[key] = header.value()
        header.check_room(tensor_count, _LEAST_TENSOR, "tensors")
        tensors: dict[str, Entry] = {}
        for _ in range(tensor_count):
            name = header.name()
            if name in tensors:
                raise damaged(file, f"tensor {name} is listed twice")
            tensors[name] = header.entry()
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(file, "its general.alignment is not a power of two")
    begin = -(-header.position // alignment) * alignment
    placed = {name: entry._replace(start=begin + entry.start) for name, entry in tensors.items()}
    _check_places(file, size, placed)
    return metadata, placed


class _Header:
    """Reads a header from its beginning; whatever it returns was in the file."""

    def __init__(self, file: Path, stream: BinaryIO, size: int) -> None:
        self.position = 0
        self._file = file
        self._stream = stream
        self._size = size
        self._end = min(size, _LARGEST_HEADER)

    def check_kind(self) -> None:
        start = self._stream.read(8)
        self.position = 8
        if start == b"version ":
            raise ValueError(f"{self._file} is a Git LFS pointer, not weights; run: git lfs pull")
        if start[:4] != MAGIC:
            raise ValueError(f"{self._file} is not a GGUF file; give the file of a GGUF model")
        version = int.from_bytes(start[4:], "little")
        if len(start) == 8 and version not in _VERSIONS:
            raise ValueError(
                f"{self._file} is of GGUF version {version}, or big-endian; only little-endian "
                "versions 2 and 3 are read; convert the model again with a current llama.cpp"
            )

    def check_room(self, count: int, least: int, what: str) -> None:
        """Raise ValueError if so many things of at least so many bytes cannot follow."""
        if count * least > self._end - self.position:
            raise damaged(
                self._file, f"it announces {count} {what}, more than its {self._size} bytes hold"
            )

    def number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        value = np.frombuffer(self._take(dtype.itemsize), dtype)[0]
        # A float32 is read as the shortest decimal that means it: 1e-6, not 9.99999997e-7.
        return float(str(value)) if kind == "<f4" else value.item()

    def text(self) -> str:
        length = int.from_bytes(self._take(8), "little")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise damaged(self._file, f"a text before byte {self.position} is not UTF-8") from error

    def name(self) -> str:
        """Return a text that may stand in an error message."""
        name = self.text()
        if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
            raise damaged(self._file, f"a name before byte {self.position} is not a name")
        return name

    def value(self) -> Any:
        kind = self.number("<u4")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(self._number_kind(kind))
        kind, count = self.number("<u4"), self.number("<u8")
        if kind == _STRING:
            self.check_room(count, 8, "texts")
            return [self.text() for _ in range(count)]
        dtype = np.dtype(self._number_kind(kind))
        self.check_room(count, dtype.itemsize, "numbers")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def entry(self) -> Entry:
        axes = self.number("<u4")
        if not 1 <= axes <= _MOST_AXES:
            raise damaged(self._file, f"a tensor before byte {self.position} has {axes} axes")
        shape = tuple(self.number("<u8") for _ in range(axes))[::-1]
        return Entry(self.number("<u4"), shape, self.number("<u8"))

    def _number_kind(self, kind: int) -> str:
        if kind not in _NUMBERS:
            what = "an array of arrays" if kind == _ARRAY else f"a value of type {kind}"
            raise damaged(self._file, f"it holds {what} before byte {self.position}")
        return _NUMBERS[kind]

    def _take(self, count: int) -> bytes:
        if count > self._end - self.position:
            raise damaged(
                self._file,
                f"at byte {self.position} its header needs {count} more, of {self._size} in all",
            )
        data = self._stream.read(count)
        if len(data) != count:
            raise damaged(self._file, f"it ends at byte {self.position + len(data)}")
        self.position += count
        return data


def _check_places(file: Path, size: int, tensors: dict[str, Entry]) -> None:
    """Raise ValueError unless every tensor of a known type has its own whole place in the file."""
    end, before = 0, ""
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.type not in READ:
            continue
        if entry.shape[-1] % READ[entry.type].numbers or 0 in entry.shape:
            raise damaged(
                file,
                f"tensor {name} of shape {list(entry.shape)} cannot be {type_name(entry.type)}",
            )
        if entry.start < end:
            raise damaged(file, f"tensors {before} and {name} overlap")
        end, before = entry.start + entry.nbytes, name
        if end > size:
            raise damaged(file, f"tensor {name} ends at byte {end} of {size}")
