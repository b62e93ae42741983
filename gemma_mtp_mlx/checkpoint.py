"""The files of a checkpoint folder: config.json and safetensors, checked before MLX opens them.

A file that was not downloaded completely would fail only when a tensor is evaluated, long after
loading and with an error that names no file, and a file that somebody made to do harm not even
then. So each file's header is read here first, within bounds, and compared with the file's size;
what it says about names, types and shapes is all that planning a load needs.
Source: github.com/huggingface/safetensors, "Format".
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeGuard

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.fields import shown

INDEX = "model.safetensors.index.json"
_ITEMS = {
    "U8": np.uint8,
    "BF16": np.uint16,
    "F16": np.float16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "I64": np.int64,
}
_BYTES = {"BOOL": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2}
_BYTES |= {"U64": 8, "F64": 8} | {name: np.dtype(item).itemsize for name, item in _ITEMS.items()}
# No Gemma 4 checkpoint comes near these; what does is not one, and could fill the memory.
LARGEST_HEADER = 8 << 20
LARGEST_JSON = 4 << 20
_LARGEST_COMPANION = 256 << 20
_DEEPEST_JSON = 64
_MOST_TENSORS = 1 << 17
_MOST_AXES, _LONGEST_AXIS, _LONGEST_NAME = 8, 1 << 31, 1000
_OTHER_FORMATS = {
    ".gguf": "GGUF files have to be converted first: mlx-gemma-mtp convert --hf-path",
    ".bin": "PyTorch pickle files can run code when they are opened",
    ".pt": "PyTorch pickle files can run code when they are opened",
    ".pth": "PyTorch pickle files can run code when they are opened",
    ".ckpt": "PyTorch pickle files can run code when they are opened",
    ".npz": "numpy archives have no bfloat16",
}


class Stored(NamedTuple):
    """A tensor as a file's header describes it. offset: of its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * _BYTES[self.dtype]


class Checkpoint(Protocol):
    """A model's configuration and tensors, whatever files hold them.

    config: as config.json. tensors: by their stored names. files: that hold the tensors. dtype: of
    what is not packed, if it is to be another than it is stored in.
    """

    dtype: str | None
    config: dict[str, Any]
    tensors: dict[str, Stored]
    files: tuple[Path, ...]

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Read rows start..stop of a tensor, and nothing else, as [stop - start, last axis].

        A tensor of more axes is the matrix of its last one; one of a single axis has one row.
        """


class Folder:
    """A folder of config.json and safetensors files.

    Raises: ValueError naming the file and the remedy if one is missing, damaged or of a format
    that is not read, and for a tensor that is stored twice.
    """

    dtype: str | None = None

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self.tensors = stored_tensors(folder)
        self.files = tuple(dict.fromkeys(stored.file for stored in self.tensors.values()))

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Read rows start..stop of a tensor; see `Checkpoint`."""
        stored = self.tensors[name]
        if stored.dtype not in _ITEMS:
            raise ValueError(f"tensor {name} is stored as {stored.dtype}, which is not read")
        width = stored.shape[-1] if stored.shape else 1
        values = np.empty((stop - start, width), _ITEMS[stored.dtype])
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.offset + start * width * values.itemsize)
            read = stream.readinto(values.reshape(-1).view(np.uint8).data) if values.size else 0
        if read != values.nbytes:
            raise _damaged(stored.file, "it changed while it was read")
        array = mx.array(values)
        return array.view(mx.bfloat16) if stored.dtype == "BF16" else array


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json. Raises ValueError if there is none or it is damaged."""
    path = folder / "config.json"
    if not _is_file(path):
        raise ValueError(f"{folder} has no config.json; give the folder of a model")
    return read_json(path)


def check_companion(file: Path) -> None:
    """Raise ValueError for a file beside the weights, as a tokenizer's, that fills the memory."""
    size = file.stat().st_size
    if size > _LARGEST_COMPANION:
        raise _damaged(file, f"it has {size} bytes, too many for what it should hold")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a folder's safetensors by its stored name; errors as `Folder`."""
    tensors: dict[str, Stored] = {}
    for file in _weight_files(folder):
        for name, stored in check_safetensors(file).items():
            if name in tensors:
                raise ValueError(
                    f"tensor {name} is stored twice, in {tensors[name].file.name} and in {file}; "
                    "remove the file that does not belong there"
                )
            tensors[name] = stored
        if len(tensors) > _MOST_TENSORS:
            raise _damaged(file, f"with it there are {len(tensors)} tensors, no Gemma 4 model")
    return tensors


def check_safetensors(file: Path) -> dict[str, Stored]:
    """Return a file's tensors, in the order they lie in it, after comparing its header with it."""
    try:
        with file.open("rb") as stream:
            return read_header(file, stream, file.stat().st_size)
    except OSError as error:
        raise _unreadable(file, error) from error


def read_header(file: Path, stream: BinaryIO, size: int) -> dict[str, Stored]:
    """Return a file's tensors as `check_safetensors`. stream: its beginning; size: its bytes."""
    start = stream.read(8)
    length = _header_length(file, size, start)
    text = stream.read(length)
    try:
        header = _parse(text)
        _check_metadata(header.pop("__metadata__", {}))
        entries = [_entry(name, entry) for name, entry in header.items()]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, f"its header cannot be read ({_short(error)})") from error
    end = 0
    tensors = {}
    for first, last, name, dtype, shape in sorted(entries):
        if first != end or last < first:
            raise _damaged(file, f"tensor {name} does not begin where the one before it ends")
        if last - first != math.prod(shape) * _BYTES[dtype]:
            raise _damaged(file, f"tensor {name} does not have the size of its shape")
        tensors[name] = Stored(file, dtype, shape, 8 + length + first)
        end = last
    if 8 + length + end != size:
        raise _damaged(file, f"it has {size} bytes and its header announces {8 + length + end}")
    return tensors


def _header_length(file: Path, size: int, start: bytes) -> int:
    if start == b"version ":
        raise ValueError(f"{file} is a Git LFS pointer, not weights; run: git lfs pull")
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise _damaged(file, f"its header does not fit into its {size} bytes")
    if length > LARGEST_HEADER:
        raise _damaged(file, f"its header of {length} bytes is too long for a Gemma 4 model's")
    return length


def _check_metadata(metadata: Any) -> None:
    if metadata is None:  # as MLX writes it
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not an object of texts")


def _entry(name: str, entry: dict[str, Any]) -> tuple[int, int, str, str, tuple[int, ...]]:
    """Return where a tensor begins and ends, its name, type and shape. Raises for anything odd."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError(f"a tensor is called {shown(name)}")
    if not _are_whole(shape, _MOST_AXES, _LONGEST_AXIS) or dtype not in _BYTES:
        raise ValueError(f"tensor {name[:80]} of type {shown(dtype)}, shape {shown(shape)}")
    if not _are_whole(offsets, 2, 1 << 62) or len(offsets) != 2:
        raise ValueError(f"tensor {name[:80]} lies at {shown(offsets)}")
    return *offsets, name, dtype, tuple(shape)


def _are_whole(values: Any, most: int, end: int) -> bool:
    """Whether it is a list of at most so many whole numbers from 0 up to the end."""
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(value) is int and 0 <= value < end for value in values)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    listed = _is_file(index)
    if listed:
        files = [folder / name for name in indexed_files(index, read_json(index))]
    else:
        files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        if not _is_file(file):
            why = f"missing, but {INDEX} lists it" if listed else "not a file"
            raise ValueError(f"{file} is {why}; download it again")
    if not files:
        raise _no_weights(folder)
    return files


def _is_file(path: Path) -> bool:
    """Whether it is a regular file: what is opened cannot wait for another process to write."""
    try:
        return path.is_file()
    except OSError as error:  # such as a name that is too long
        raise _unreadable(path, error) from error


def indexed_files(file: Path, index: dict[str, Any]) -> list[str]:
    """Return the names of the files that an index lists. Raises ValueError if it lists none."""
    weight_map: Any = index.get("weight_map")
    names = sorted(set(weight_map.values())) if _is_index(weight_map) else []
    if not names:
        raise _damaged(file, "its weight_map does not name files of this folder")
    return names


def _is_index(weight_map: Any) -> TypeGuard[dict[str, str]]:
    """Whether it names safetensors files, and none outside of the folder."""
    return isinstance(weight_map, dict) and all(
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name.isprintable()
        and len(name) < 256
        and not {"/", "\\"} & set(name)
        for name in weight_map.values()
    )


def _no_weights(folder: Path) -> ValueError:
    for file in sorted(folder.iterdir()):
        if file.suffix in _OTHER_FORMATS:
            return ValueError(
                f"{file} is not read: {_OTHER_FORMATS[file.suffix]}; "
                "use the safetensors files of the same model"
            )
    return ValueError(f"{folder} has no model.safetensors; download the model's weights")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object. Raises ValueError naming the file if it holds none."""
    try:
        with path.open("rb") as stream:
            text = stream.read(LARGEST_JSON + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    return parse_json(path, text)


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Return the object that a JSON file holds, given what is in it; errors as `read_json`."""
    if len(text) > LARGEST_JSON:
        raise _damaged(path, f"it has more than {LARGEST_JSON} bytes, too many for a model's")
    try:
        content = _parse(text)
        _check_depth(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON ({_short(error)})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "it does not hold a JSON object")
    return content


def _check_depth(content: Any) -> None:
    """Raise RecursionError for what is nested more deeply than others can print or copy."""
    level = [content]
    for _ in range(_DEEPEST_JSON):
        inner = [v.values() if isinstance(v, dict) else v for v in level if type(v) in (dict, list)]
        level = [value for values in inner for value in values]
    if level:
        raise RecursionError


def _parse(text: bytes) -> Any:
    """Parse JSON. Raises ValueError, also for a name that occurs twice; RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"{shown(twice)[1:-1]} occurs twice")
        return found

    return json.loads(text.decode("utf-8"), object_pairs_hook=unique)


def _short(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]


def _unreadable(file: Path, error: OSError) -> ValueError:
    return ValueError(f"{file} cannot be read: {error.strerror}; check its permissions")


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is damaged or incomplete: {why}; download or copy it again")
