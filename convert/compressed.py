"""Folders that compressed-tensors has written: linear layers packed as integers.

A code is a signed integer in offset binary, packed densely from the lowest bit of an int32 up,
times a scale for each group of a row, or for the row. MLX's affine format says the same with a bias
of -2^(bits - 1) scales, exactly.
Source: github.com/vllm-project/compressed-tensors, format "pack-quantized".
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from gemma_mtp_mlx.checkpoint import Folder, Stored

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
_MOST_AXES = 8
_BITS, _GROUPS = (4, 8), (128, 64, 32)
_PACKED, _SCALE, _SHAPE, _ZERO = (
    f".weight_{what}" for what in ("packed", "scale", "shape", "zero_point")
)


class _Place(NamedTuple):
    """Where a presented tensor is stored. repeat: of a scale, as MLX's groups are smaller."""

    stored: str
    repeat: int = 1
    factor: int = 1


class CompressedFolder:
    """A folder of packed integers, presented as MLX would have packed them; see `Checkpoint`.

    Raises: ValueError for other formats of compressed-tensors, and as `Folder`.
    """

    dtype: str | None = None

    def __init__(self, path: Path) -> None:
        self._folder = Folder(path)
        self.files = self._folder.files
        _check_block(_block(self._folder.config))
        self.tensors: dict[str, Stored] = {}
        self._places: dict[str, _Place] = {}
        for name, stored in self._folder.tensors.items():
            if name.endswith(_PACKED):
                self._present_packed(name.removesuffix(_PACKED), stored)
            elif name.endswith(_ZERO):
                raise ValueError(
                    f"tensor {name}: weights with zero points are not read; use the symmetric "
                    "ones, or convert the unquantised checkpoint"
                )
            elif name.endswith((_SCALE, _SHAPE)):
                self._check_partner(name)
            else:
                self._present(name, stored, _Place(name))
        self.config = _without_block(self._folder.config)
        self.config["quantization"] = {"group_size": 32, "bits": 4, "mode": "affine"}

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Read rows of a tensor; see `Checkpoint`."""
        place = self._places[name]
        value = self._folder.rows(place.stored, start, stop)
        if place.stored.endswith(_PACKED):
            return value.view(mx.uint32)
        return mx.repeat(value, place.repeat, axis=-1) * place.factor if _is_scale(place) else value

    def _present(self, name: str, stored: Stored, place: _Place) -> None:
        if name in self.tensors:
            raise ValueError(
                f"tensor {name} is stored twice, packed and plain; download the checkpoint again"
            )
        self.tensors[name] = stored
        self._places[name] = place

    def _check_partner(self, name: str) -> None:
        """Raise ValueError for a scale or a shape that nothing is packed with."""
        packed = name.rpartition(".")[0] + _PACKED
        if packed not in self._folder.tensors:
            raise ValueError(
                f"tensor {name} has no weight_packed beside it; the checkpoint is incomplete, "
                "download it again"
            )

    def _width(self, path: str) -> int:
        """Return how many weights a row has."""
        name = path + _SHAPE
        stored = self._folder.tensors[name]
        axes = math.prod(stored.shape)
        known = stored.dtype in ("I32", "I64") and bool(stored.shape)
        if not known or not 1 <= axes <= _MOST_AXES:
            raise ValueError(
                f"tensor {name} of type {stored.dtype} and shape {list(stored.shape)} is not the "
                "shape of a weight; download the checkpoint again"
            )
        return int(self._folder.rows(name, 0, axes // stored.shape[-1]).reshape(-1)[-1])

    def _present_packed(self, path: str, packed: Stored) -> None:
        """Present codes, and scales and biases for MLX's groups."""
        try:
            scale = self._folder.tensors[path + _SCALE]
            width = self._width(path)
        except KeyError as error:
            raise ValueError(
                f"tensor {path}{_PACKED} has no {error.args[0].rpartition('.')[2]} beside it; "
                "the checkpoint is incomplete, download it again"
            ) from error
        words, groups = ((0, *stored.shape[1:])[-1] for stored in (packed, scale))
        bits, group = words * 32 / max(1, width), width / max(1, groups)
        fitting = next((size for size in _GROUPS if group % size == 0), None)
        if bits not in _BITS or not groups or fitting is None or packed.dtype != "I32":
            raise ValueError(
                f"tensor {path}{_PACKED} of {list(packed.shape)} packs rows of {width} weights, "
                f"scales are {list(scale.shape)}: MLX has integers of 4 or 8 bits in groups of "
                "32, 64 or 128; convert the unquantised checkpoint"
            )
        repeat, zero = int(group) // fitting, 2 ** (int(bits) - 1)
        scales = scale._replace(shape=(*scale.shape[:-1], width // fitting))
        self._present(f"{path}.weight", packed._replace(dtype="U32"), _Place(path + _PACKED))
        self._present(f"{path}.scales", scales, _Place(path + _SCALE, repeat))
        self._present(f"{path}.biases", scales, _Place(path + _SCALE, repeat, -zero))


def is_compressed(config: dict[str, Any]) -> bool:
    """Whether config.json says that compressed-tensors has written the weights."""
    return _block(config).get("quant_method") == METHOD


def _is_scale(place: _Place) -> bool:
    return place.stored.endswith(_SCALE)


def _block(config: dict[str, Any]) -> dict[str, Any]:
    for holder in (config, config.get("text_config")):
        block = holder.get("quantization_config") if isinstance(holder, dict) else None
        if isinstance(block, dict):
            return block
    return {}


def _check_block(block: dict[str, Any]) -> None:
    """Raise ValueError for what is packed in another way, or is more than packed weights."""
    groups = block.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    activations = any(isinstance(g, dict) and g.get("input_activations") for g in groups)
    if block.get("format") != FORMAT or activations:
        what = "quantised activations" if activations else f"format {block.get('format')!r}"
        raise ValueError(
            f"config.json: {what} of {METHOD} is not read; use a checkpoint of format "
            f"{FORMAT} (w4a16), or the unquantised one"
        )


def _without_block(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_block(value) if name == "text_config" and isinstance(value, dict) else value
        for name, value in config.items()
        if name != "quantization_config"
    }
