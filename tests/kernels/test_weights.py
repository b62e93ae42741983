"""Formats of weights: each is decoded exactly, and sums have the same order in each."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.verify_matmul import project_metal, project_reference
from tests.kernels.exact import draw, exact
from tests.kernels.linear import (
    EIGHT,
    FORMATS,
    PLAIN,
    Format,
    check_product,
    exact_weight,
    linear,
    one_by_one,
    same_bits,
    with_scales,
)
from tests.metal.executor import Executor


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_code_is_decoded_exactly(metal: Executor, form: Format) -> None:
    _check_decoding(linear(form, 128, 24), form)


@pytest.mark.parametrize("form", [PLAIN, EIGHT], ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_so_it_is_with_wider_scales(metal: Executor, form: Format, dtype: mx.Dtype) -> None:
    _check_decoding(linear(form, 128, 24, dtype), form)


def _check_decoding(layer: nn.Module, form: Format) -> None:
    """A unit matrix as x gives back the weights, of random codes and all kinds of scales."""
    if form != PLAIN:
        shape = (len(layer.weight), layer.weight.nbytes // len(layer.weight))
        codes = mx.random.randint(0, 256, shape, mx.uint8, mx.random.key(1))
        if form.mode == "mxfp8":  # not those of NaN
            codes = mx.where(codes % 128 == 127, 0, codes)
        layer.weight = codes.view(mx.uint32)
    if form.mode in ("mxfp4", "mxfp8"):
        layer.scales = mx.random.randint(90, 160, layer.scales.shape, mx.uint8, mx.random.key(2))
    if form.mode == "nvfp4":
        layer.scales = mx.random.randint(0, 127, layer.scales.shape, mx.uint8, mx.random.key(2))
    x = mx.eye(128)
    right = exact_weight(layer).T.astype(np.float32)
    assert (np.array(project_metal(x, layer)[0]) == right).all()
    few = [project_metal(x[i : i + 4], layer)[0] for i in range(0, 128, 4)]
    assert (np.array(mx.concatenate(few)) == right).all()


@pytest.mark.parametrize(
    "bits, stored, dtype",
    [
        (4, mx.float16, mx.bfloat16),
        (8, mx.float16, mx.bfloat16),
        (0, mx.float32, mx.bfloat16),
        (4, mx.float32, mx.bfloat16),
        (4, mx.bfloat16, mx.float16),
    ],
)
def test_results_are_of_the_dtype_of_activations(
    metal: Executor, bits: int, stored: mx.Dtype, dtype: mx.Dtype
) -> None:
    """Whatever weights and scales are of; nothing is rounded but a result."""
    layer = linear(Format("affine", bits, 32) if bits else PLAIN, 128, 24, stored)
    layer = with_scales(layer, stored) if bits else layer
    x = draw(1, 9, 128, dtype=dtype)
    (found,), (reference,) = project_metal(x, layer), project_reference(x, layer)
    assert found.dtype == reference.dtype == dtype
    for product in (found, reference):
        check_product(product, x, layer)
    assert same_bits(project_metal(x[:3], layer)[0], found[:3])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_position_has_the_same_bits_in_any_company(metal: Executor, form: Format) -> None:
    layer = linear(form, 640, 16)
    x = draw(2, 9, 640, dtype=mx.float32)
    singly = one_by_one(lambda row: project_metal(row, layer)[0], x)
    for count in (4, 9):
        assert same_bits(project_metal(x[-count:], layer)[0], singly[-count:])


@pytest.mark.parametrize("form", [form for form in FORMATS if form.group <= 32], ids=str)
def test_so_it_has_where_units_are_short(metal: Executor, form: Format) -> None:
    layer = linear(form, 160, 16)
    x = draw(2, 5, 160, dtype=mx.float32)
    singly = one_by_one(lambda row: project_metal(row, layer)[0], x)
    assert same_bits(project_metal(x, layer)[0], singly)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("width", "height"), [(32, 8), (64, 8), (96, 104)])
def test_smallest_matrices(metal: Executor, width: int, height: int, count: int) -> None:
    for form in (PLAIN, Format("affine", 4, 32)):
        layer = linear(form, width, height)
        x = draw(13, count, width)
        check_product(project_metal(x, layer)[0], x, layer)


def test_an_embedding_is_a_layer_too(metal: Executor) -> None:
    embedding = nn.Embedding(96, 64)
    for module in (embedding, embedding.to_quantized(32, 4)):
        x = draw(17, 3, 64, dtype=mx.float32)
        found, right = project_metal(x, module)[0], module.as_linear(x)
        assert np.abs(exact(found) - exact(right)).max() <= 64 * 2**-24 * np.abs(right).max()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(48, 8, bias=False),
        nn.Linear(64, 12, bias=False),
        nn.Linear(64, 8, bias=True),
        nn.QuantizedLinear(64, 8, bias=True),
        nn.QuantizedLinear(64, 8, bias=False).update({"biases": mx.zeros((8, 1), mx.float16)}),
    ],
    ids=str,
)
def test_layers_without_a_kernel_are_named(metal: Executor, layer: nn.Module) -> None:
    x = mx.zeros((1, 64 if "scales" in layer else layer.weight.shape[1]))
    with pytest.raises(ValueError, match=r"Linear(.|\n)*--fast"):
        project_metal(x, layer)
    assert not metal.launches
