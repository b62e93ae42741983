"""The files of a checkpoint folder: config.json and safetensors, checked before MLX opens them.

A file that was not downloaded completely would fail only when a tensor is evaluated, long after
loading and with an error that names no file. So each file's header is read here first and compared
with the file's size; what it says about names, types and shapes is all that planning a load needs.
Source: github.com/huggingface/safetensors, "Format".
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

INDEX = "model.safetensors.index.json"
_ITEM_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "U32": 4, "I32": 4, "F32": 4, "I64": 8}
_LARGEST_HEADER = 100_000_000
_OTHER_FORMATS = {
    ".gguf": "GGUF files pack weights in a way MLX models cannot read",
    ".bin": "PyTorch pickle files can run code when they are opened",
    ".pt": "PyTorch pickle files can run code when they are opened",
    ".pth": "PyTorch pickle files can run code when they are opened",
    ".npz": "numpy archives have no bfloat16",
}


class Stored(NamedTuple):
    """A tensor as a file's header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json. Raises ValueError if there is none or it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a model")
    return read_json(path)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the checkpoint by its stored name.

    Raises: ValueError naming the file and the remedy if one is missing, damaged or of a format
    that is not read, and for a tensor that is stored twice.
    """
    tensors: dict[str, Stored] = {}
    for file in _weight_files(folder):
        for name, stored in check_safetensors(file).items():
            if name in tensors:
                raise ValueError(
                    f"tensor {name} is stored twice, in {tensors[name].file.name} and in {file}; "
                    "remove the file that does not belong there"
                )
            tensors[name] = stored
    return tensors


def check_safetensors(file: Path) -> dict[str, Stored]:
    """Return a file's tensors after comparing its header with its size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ValueError(f"{file} is a Git LFS pointer, not weights; run: git lfs pull")
        length = int.from_bytes(start, "little")
        if length > min(size - 8, _LARGEST_HEADER):
            raise _damaged(file, f"its header does not fit into its {size} bytes")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: Stored(file, entry["dtype"], tuple(entry["shape"]))
                for name, entry in header.items()
            }
            ends = {name: (*entry["data_offsets"],) for name, entry in header.items()}
            spans = {name: last - first for name, (first, last) in ends.items()}
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise _damaged(file, "its header cannot be read") from error
    end = 8 + length + max((last for _, last in ends.values()), default=0)
    if end != size:
        raise _damaged(file, f"it has {size} bytes and its header announces {end}")
    for name, stored in tensors.items():
        item = _ITEM_BYTES.get(stored.dtype)
        if item is not None and spans[name] != math.prod(stored.shape) * item:
            raise _damaged(file, f"tensor {name} does not have the size of its shape")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing, but {INDEX} lists it; download it again")
    if not files:
        raise _no_weights(folder)
    return files


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
        content = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "it does not hold a JSON object")
    return content


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is damaged or incomplete: {why}; download or copy it again")
