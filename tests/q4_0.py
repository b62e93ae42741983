"""Checkpoints whose weights are on the q4_0 grid, as QAT leaves them, made without the converter.

Thirty-two neighbours share a scale d, of float16 in llama.cpp's blocks. compressed-tensors stores
the same codes and scales as they are ("pack-quantized", w4a16).
Source: github.com/ggml-org/ggml, quantize_row_q4_0_reference;
github.com/vllm-project/compressed-tensors, pack_to_int32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Array = np.ndarray
GROUP = 32
EMBEDDINGS = ("embed_tokens.weight", "embed_tokens_per_layer.weight")


def quantise(weights: Array, group: int = GROUP, *, half: bool = True) -> tuple[Array, Array]:
    """Return codes [..., K] of 0 to 15 and scales [..., K / group] in float32.

    half: whether scales are rounded to float16; codes are chosen before they are, as in ggml.
    """
    groups = weights.astype(np.float32).reshape(*weights.shape[:-1], -1, group)
    where = np.abs(groups).argmax(axis=-1, keepdims=True)
    scales = np.take_along_axis(groups, where, axis=-1) / np.float32(-8)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    steps = np.trunc(groups * inverse + np.float32(8.5)).astype(np.int32)
    kept = scales.astype(np.float16).astype(np.float32) if half else scales
    return np.minimum(15, steps).astype(np.uint8).reshape(weights.shape), kept[..., 0]


def values(codes: Array, scales: Array) -> Array:
    """Return what codes and scales mean, in float32."""
    group = codes.shape[-1] // scales.shape[-1]
    return (codes.astype(np.float32) - 8) * np.repeat(scales, group, axis=-1)


def is_matrix(name: str, value: Array) -> bool:
    """Whether a stored tensor is a weight that a grid could be laid over."""
    return value.ndim > 1 and value.dtype == np.float32 and value.shape[-1] % GROUP == 0


def put_on_grid(
    folder: Path,
    dtype: mx.Dtype,
    *,
    half: bool = True,
    off: Callable[[str], bool] = lambda name: False,
) -> None:
    """Round a float32 checkpoint's weights to the grid and all of it to a type, in place.

    off: which tensors, by name, are only rounded to the type.
    """
    for file in folder.glob("*.safetensors"):
        arrays = _read(file)
        for name, value in arrays.items():
            if is_matrix(name, value) and not off(name):
                arrays[name] = values(*quantise(value, half=half))
        _write(file, arrays, dtype)
    _change_config(folder, dtype)


def pack(codes: Array) -> Array:
    """Pack codes [..., K] of 0 to 15 as compressed-tensors does: eight to an int32."""
    eight = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
    words = (eight << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=-1)
    return words.astype(np.uint32).view(np.int32)


def write_compressed(folder: Path, group: int | None, dtype: mx.Dtype) -> list[str]:
    """Pack the linear layers of a float32 checkpoint, in place, and return their paths.

    group: None for a scale to each row. dtype: of scales, and of all that is not packed.
    """
    packed = []
    for file in folder.glob("*.safetensors"):
        arrays = _read(file)
        for name in [n for n, v in arrays.items() if is_linear(n, v)]:
            weight, path = arrays.pop(name), name.removesuffix(".weight")
            codes, scales = quantise(weight, group or weight.shape[-1])
            scales = rounded(scales, dtype)
            arrays[f"{path}.weight_packed"] = pack(codes)
            arrays[f"{path}.weight_scale"] = scales
            arrays[f"{path}.weight_shape"] = np.array(weight.shape, np.int64)
            packed.append(path)
        _write(file, arrays, dtype)
    _change_config(folder, dtype, quantization_config=_block(group))
    return packed


def decompress(folder: Path, dtype: mx.Dtype) -> None:
    """Unpack what `write_compressed` packed, in place: the same weights, rounded to a type."""
    for file in folder.glob("*.safetensors"):
        arrays = {name: _wide(value) for name, value in mx.load(str(file)).items()}
        for name in [name for name in arrays if name.endswith(".weight_packed")]:
            path = name.removesuffix("_packed")
            words, scales = arrays.pop(name), arrays.pop(f"{path}_scale")
            nibbles = words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
            arrays[path] = values(nibbles.reshape(*words.shape[:-1], -1), scales)
            del arrays[f"{path}_shape"]
        _write(file, arrays, dtype)
    _change_config(folder, dtype, quantization_config=None)


def is_linear(name: str, value: Array) -> bool:
    """Whether a tensor is the weight of a linear layer inside a layer, as w4a16 packs them."""
    parts = (".self_attn.", ".mlp.", ".per_layer_")
    in_layer = ".layers." in name and not name.startswith(("model.vision", "model.audio"))
    return in_layer and value.ndim == 2 and any(part in name for part in parts)


def _block(group: int | None) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }
    ignored = ["lm_head", "re:.*router.*", "re:.*embed.*", "re:.*per_layer_model_projection.*"]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignored,
        "quantization_status": "compressed",
    }


def rounded(array: Array, dtype: mx.Dtype) -> Array:
    """Round to a type and back."""
    return np.array(mx.array(array).astype(dtype).astype(mx.float32))


def _wide(value: mx.array) -> Array:
    return np.array(value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value)


def _read(file: Path) -> dict[str, Array]:
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return {name: np.array(value) for name, value in arrays.items()}


def _write(file: Path, arrays: dict[str, Array], dtype: mx.Dtype) -> None:
    """Write a file as torch would; dtype: of its floats."""
    cast = {name: mx.array(value) for name, value in arrays.items()}
    cast |= {name: v.astype(dtype) for name, v in cast.items() if v.dtype == mx.float32}
    mx.save_safetensors(str(file), cast, metadata={"format": "pt"})


def _change_config(folder: Path, dtype: mx.Dtype, **entries: Any) -> None:
    """Name a type wherever config.json names one, and change entries; None removes."""
    config = json.loads((folder / "config.json").read_text())
    for holder in (config, config.get("text_config", {})):
        if "dtype" in holder:
            holder["dtype"] = str(dtype).rpartition(".")[2]
    config.update(entries)
    kept = {name: value for name, value in config.items() if entries.get(name, 0) is not None}
    (folder / "config.json").write_text(json.dumps(kept))
