"""Linear layers in every format, what they should compute and how far from that it may be."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gemma_mtp_mlx.kernels.verify_matmul import project_reference
from tests.kernels.exact import check_errors, draw, exact

ROUNDING = {mx.bfloat16: 2**-8, mx.float16: 2**-11, mx.float32: 2**-24}


class Format(NamedTuple):
    """A weight's format: of mx.quantize, or plain."""

    mode: str
    bits: int = 0
    group: int = 0


PLAIN = Format("plain")
FOUR = Format("affine", 4, 64)
EIGHT = Format("affine", 8, 64)
AFFINE = [
    *(Format("affine", 4, group) for group in (32, 64, 128)),
    *(Format("affine", 8, group) for group in (32, 64, 128)),
    *(Format("affine", bits, 32) for bits in (1, 2, 3, 5, 6)),
    Format("affine", 6, 64),
]
FLOATS = [Format("mxfp4", 4, 32), Format("mxfp8", 8, 32), Format("nvfp4", 4, 16)]
FORMATS = [PLAIN, *AFFINE, *FLOATS]


def linear(
    form: Format, width: int, height: int, dtype: mx.Dtype = mx.bfloat16, key: int = 0
) -> nn.Module:
    """A linear layer [height, width]; dtype: of its weights or, if it has some, its scales."""
    layer = nn.Linear(width, height, bias=False)
    layer.weight = draw(100 + key, height, width, dtype=dtype, scale=width**-0.5)
    if form == PLAIN:
        return layer
    return nn.QuantizedLinear.from_linear(layer, form.group, form.bits, form.mode)


def with_scales(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The layer, its scales and biases in another dtype, which uses all the bits that it has."""
    uneven = 1 + mx.arange(layer.scales.size).reshape(layer.scales.shape) % 97 / 1000
    for part in ("scales", "biases"):
        layer[part] = (layer[part].astype(mx.float32) * uneven).astype(dtype)
    return layer


def exact_weight(layer: nn.Module) -> np.ndarray:
    """What the layer multiplies with, exactly."""
    if "scales" not in layer:
        return exact(layer.weight)
    form = (layer.group_size, layer.bits, layer.mode)
    if layer.mode != "affine":
        return exact(mx.dequantize(layer.weight, layer.scales, None, *form, dtype=mx.float32))
    ones = mx.ones(layer.scales.shape)
    codes = exact(mx.dequantize(layer.weight, ones, mx.zeros_like(ones), *form))
    scales, biases = (
        np.repeat(exact(x), layer.group_size, axis=1) for x in (layer.scales, layer.biases)
    )
    return codes * scales + biases


def check_product(found: mx.array, x: mx.array, layer: nn.Module) -> None:
    """Each element within what its chain of float32 additions and one rounding allow."""
    weight, inputs = exact_weight(layer), exact(x)
    right = inputs @ weight.T
    additions = x.shape[-1] / 8 + 8  # a chain's, the tree's and the decoding's, and their products
    allowed = additions * 2**-24 * (np.abs(inputs) @ np.abs(weight.T))
    allowed += ROUNDING[x.dtype] * (np.abs(right) + allowed) + 2**-25
    assert (np.abs(exact(found) - right) <= allowed).all()
    check_errors([found], project_reference(x, layer), [right])


def same_bits(one: mx.array, other: mx.array) -> bool:
    """Whether every bit is the same."""
    return one.dtype == other.dtype and bool(mx.array_equal(one, other))


def one_by_one(operation: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    return mx.concatenate([operation(x[i : i + 1]) for i in range(len(x))])
