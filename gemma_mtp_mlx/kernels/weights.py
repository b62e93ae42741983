"""How a linear layer's weights are stored, as weights.metal has to know it.

Scales, and weights that are not quantised, may be of another dtype than activations: q4_0's scales
are float16, whose numbers bfloat16 cannot hold. MLX's own operations promote where the two meet,
and a definition rounds what they return to the activations' dtype; kernels decode to float32.
"""

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

# weights.metal's enum Format, and the bits a weight may have.
_FORMATS = {"plain": 0, "affine": 1, "mxfp4": 2, "mxfp8": 3, "nvfp4": 4}
_BITS = {
    "plain": (16, 32),
    "affine": (1, 2, 3, 4, 5, 6, 8),
    "mxfp4": (4,),
    "mxfp8": (8,),
    "nvfp4": (4,),
}
_GROUPS = {"plain": (32,), "affine": (32, 64, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
_SMALLEST_UNIT = 32  # weights of a row


@dataclass(frozen=True, slots=True)
class Packing:
    """A weight's format. dtype: of the weights if plain, else of the scales."""

    mode: str
    bits: int
    group_size: int
    dtype: mx.Dtype

    def template(self, width: int) -> dict[str, int]:
        """Return the constants of a Weights of weights.metal; width: of a row, in weights."""
        return {
            "FORMAT": _FORMATS[self.mode],
            "BITS": self.bits,
            "GROUP": self.group_size,
            "RUN": 8 if width % 64 else 16,
        }


FEW = 4  # positions: up to so many are plain fma's, more the matrix unit's
_ODD: set[Packing] = set()  # formats that a device's matrix unit sums otherwise


def few(found: Packing) -> int:
    """Return up to how many positions are plain fma's: FEW, or 0 after use_matrix_unit."""
    return 0 if found in _ODD else FEW


def use_matrix_unit(found: Packing) -> None:
    """Let the matrix unit multiply weights of this format from now on, for few positions too."""
    _ODD.add(found)


def packing(module: nn.Module) -> Packing:
    """Return how a linear layer's, an embedding's or experts' weight is stored.

    Raises: ValueError for a format or a shape that has no kernel, naming the module.
    """
    weight, scales = module["weight"], module.get("scales")
    if scales is None:
        found, known = _format("plain", None, _SMALLEST_UNIT, weight.dtype)
    else:
        found, known = _format(module.mode, module.bits, module.group_size, scales.dtype)
    height, words = weight.shape[-2:]
    width = words if scales is None else words * 32 // found.bits
    apart = scales is not None and module.get("biases", scales).dtype != scales.dtype
    if not known or width % _SMALLEST_UNIT or height % 8 or apart or "bias" in module:
        raise ValueError(
            f"{module} has no kernel whose results do not depend on the number of positions: "
            f"{height} x {width} {found.mode} weights of {found.bits} bits in groups of "
            f"{found.group_size}{' and a bias' if 'bias' in module else ''}"
            f"{', scales and biases of two dtypes' if apart else ''}. Run with --fast, "
            "which uses MLX's kernels."
        )
    return found


def weight_arrays(module: nn.Module) -> list[mx.array]:
    """Return what a Weights of weights.metal points to: codes, scales and biases.

    A format without scales or biases repeats another array, which is not read.
    """
    codes = module["weight"]
    scales = module.get("scales", codes)
    return [codes, scales, module.get("biases", scales)]


def decoded_rows(table: nn.Module, ids: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return rows [..., E] of an embedding, decoded in `dtype` if its scales are of it.

    Else they are not rounded to it yet: float32, or what a plain table is of.
    """
    if "biases" not in table or table.scales.dtype == dtype:
        return table(ids)
    scales, biases = (table[part][ids].astype(mx.float32) for part in ("scales", "biases"))
    return mx.dequantize(table.weight[ids], scales, biases, table.group_size, table.bits)


@lru_cache  # layers ask at every launch
def _format(mode: str, bits: int | None, group_size: int, dtype: mx.Dtype) -> tuple[Packing, bool]:
    """Return a format and whether weights.metal decodes it; bits: None for those of the dtype."""
    found = Packing(mode, bits or dtype.size * 8, group_size, dtype)
    known = found.bits in _BITS.get(mode, ()) and group_size in _GROUPS[mode]
    return found, known and (mode != "plain" or mx.issubdtype(dtype, mx.floating))
