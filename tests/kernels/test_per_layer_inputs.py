"""Per-layer inputs: the values, and tokens that do not see each other."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.per_layer_inputs import (
    PER_LAYER_INPUTS,
    per_layer_inputs,
    per_layer_inputs_metal,
    per_layer_inputs_reference,
)
from tests.kernels.exact import DTYPES, EPS, check_errors, draw, exact, norm

# Width, layers and elements per layer: E2B, E4B, a tiny family, and lanes without elements.
SIZES = [(1536, 35, 256), (2560, 42, 256), (128, 10, 64), (128, 3, 40)]

Arguments = tuple[mx.array, mx.array, mx.array, int, float]


def _arguments(
    size: tuple[int, int, int], b: int, length: int, dtype: mx.Dtype = mx.bfloat16
) -> Arguments:
    width, layers, p = size
    shape = (b, length, layers * p)
    context, by_token = draw(0, *shape, dtype=dtype, scale=0.03), draw(1, *shape, dtype=dtype)
    return context, by_token, draw(2, p, dtype=dtype), width, EPS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_values(metal: object, size: tuple[int, int, int], dtype: mx.Dtype) -> None:
    width, layers, p = size
    arguments = _arguments(size, 2, 3, dtype)
    context, by_token, weight = (exact(x) for x in arguments[:3])
    context = norm((context * width**-0.5).reshape(2, 3, layers, p)) * weight
    truth = (context + by_token.reshape(2, 3, layers, p) * p**0.5) * 0.5**0.5
    check_errors(
        per_layer_inputs_metal(*arguments),
        per_layer_inputs_reference(*arguments),
        list(np.moveaxis(truth, 2, 0)),
    )


@pytest.mark.parametrize("threads", [64, 128, 256])
@pytest.mark.parametrize("size", SIZES[1:])
def test_tokens_do_not_see_each_other(
    metal: object, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], threads: int
) -> None:
    context, by_token, *rest = _arguments(size, 3, 5, mx.float32)
    together = per_layer_inputs_metal(context, by_token, *rest)
    monkeypatch.setattr(PER_LAYER_INPUTS, "threads", threads)
    for row, place, rows, places in [(0, 0, 3, 1), (1, 1, 1, 3), (2, 4, 1, 1)]:
        at = (slice(row, row + rows), slice(place, place + places))
        alone = per_layer_inputs_metal(context[at], by_token[at], *rest)
        assert all(mx.array_equal(a, b[at]) for a, b in zip(alone, together, strict=True))


def test_the_path_follows_the_device(metal: object) -> None:
    """On a GPU, the kernel: float32 sums in another order than the reference's."""
    arguments = _arguments(SIZES[0], 2, 2, mx.float32)
    found = mx.stack(per_layer_inputs(*arguments))
    assert mx.array_equal(found, mx.stack(per_layer_inputs_metal(*arguments)))
    assert not mx.array_equal(found, mx.stack(per_layer_inputs_reference(*arguments)))


def test_what_a_checkpoint_may_not_hold(metal: object) -> None:
    context, by_token, weight, *rest = _arguments(SIZES[2], 1, 1)
    with pytest.raises(ValueError, match="float32"):
        per_layer_inputs_metal(context, by_token, weight.astype(mx.float32), *rest)
