"""What packed weights mean, decoded without MLX: its affine integers, and the small floats of OCP.

Source: OCP Microscaling Formats (MX) Specification 1.0, 5.3 and 6 (E2M1, E4M3, E8M0); nvfp4 is
E2M1 in groups of 16 with scales of E4M3. Codes lie densely from the lowest bit of a row's first
word up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Array = np.ndarray
# Two exponent bits of bias 1, one bit of mantissa; the last eight are the negative ones.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def codes(words: Array, bits: int) -> Array:
    """Unpack [..., W] uint32 into [..., 32 W / bits] codes, which may cross words."""
    stream = np.unpackbits(
        np.ascontiguousarray(words.astype("<u4")).view(np.uint8), axis=-1, bitorder="little"
    )
    one_by_one = stream.reshape(*words.shape[:-1], -1, bits).astype(np.uint32)
    return (one_by_one << np.arange(bits, dtype=np.uint32)).sum(axis=-1).astype(np.uint32)


def e2m1(values: Array) -> Array:
    """Decode floats of four bits."""
    return np.where(values & 8, -1, 1).astype(np.float32) * _E2M1[values & 7]


def e4m3(values: Array) -> Array:
    """Decode floats of eight bits: no infinities, nan is all ones."""
    exponent, mantissa = (values >> 3 & 15).astype(np.int32), (values & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    sizes = np.where(exponent == 0, np.ldexp(mantissa, -9), normal).astype(np.float32)
    sizes = np.where((values & 127) == 127, np.float32(np.nan), sizes)
    return np.where(values & 128, -sizes, sizes)


def e8m0(values: Array) -> Array:
    """Decode powers of two; 255 is nan."""
    powers = np.ldexp(np.float32(1), values.astype(np.int32) - 127)
    return np.where(values == 255, np.float32(np.nan), powers).astype(np.float32)


def decode(words: Array, scales: Array, biases: Array | None, params: dict[str, Any]) -> Array:
    """Return the weights [..., K] in float32. params: group_size, bits and mode."""
    packed, mode, group = codes(words, params["bits"]), params["mode"], params["group_size"]
    if mode == "affine":
        assert biases is not None
        wide = np.repeat(scales.astype(np.float32), group, axis=-1)
        return wide * packed.astype(np.float32) + np.repeat(
            biases.astype(np.float32), group, axis=-1
        )
    elements = e4m3(packed) if mode == "mxfp8" else e2m1(packed)
    return elements * np.repeat((e4m3 if mode == "nvfp4" else e8m0)(scales), group, axis=-1)


def numpy_arrays(folder: Path) -> dict[str, Array]:
    """Return a folder's tensors; those of 16 bits in float32, which holds them exactly."""
    arrays: dict[str, Array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        for name, value in loaded.items():
            small = value.dtype in (mx.bfloat16, mx.float16)
            arrays[name] = np.array(value.astype(mx.float32) if small else value)
    return arrays


def packed_weights(folder: Path, config: dict[str, Any]) -> dict[str, Array]:
    """Return the decoded weights of the packed modules of a converted folder, by their paths."""
    arrays, block = numpy_arrays(folder), config["quantization"]
    usual = {name: block[name] for name in ("group_size", "bits", "mode")}
    return {
        path: decode(
            arrays[f"{path}.weight"],
            arrays[name],
            arrays.get(f"{path}.biases"),
            block.get(path, usual),
        )
        for name in arrays
        if name.endswith(".scales")
        for path in [name.removesuffix(".scales")]
    }


def as_transformers(packed: dict[str, Array]) -> dict[str, Array]:
    """Return decoded weights, by our paths, as transformers names and joins them."""
    found = {}
    for path, value in packed.items():
        stem, _, last = path.rpartition("switch_glu.")
        if last == "gate_proj" and stem:
            up = packed[f"{stem}switch_glu.up_proj"]
            found[f"{stem}gate_up_proj"] = np.concatenate([value, up], axis=-2)
        elif last == "down_proj" and stem:
            found[f"{stem}down_proj"] = value
        elif not stem:
            found[f"{path}.weight"] = value
    return found
