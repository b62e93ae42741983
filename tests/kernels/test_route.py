"""The router: the experts it chooses, their weights, and tokens that do not see each other."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.route import ROUTE, route, route_metal, route_reference
from tests.kernels.exact import EPS, draw, exact, norm
from tests.metal.executor import Executor

BITS = {mx.bfloat16: 8, mx.float16: 11, mx.float32: 24}  # of a significand


class Shape(NamedTuple):
    """Of a router: experts, how many of them a token gets, and the model's width."""

    experts: int
    top_k: int
    width: int


GEMMA = Shape(128, 8, 2816)
TINY = Shape(8, 2, 128)
ODD = Shape(40, 3, 224)  # lanes and simdgroups without work, units of 32


class Router(NamedTuple):
    """What route takes beside x and eps."""

    proj: nn.Module
    scale: mx.array
    expert_scale: mx.array
    top_k: int


def _router(shape: Shape, dtype: mx.Dtype, bits: int = 0, stored: mx.Dtype | None = None) -> Router:
    """stored: the dtype of the projection's weights or scales, if it is not the model's."""
    proj = nn.Linear(shape.width, shape.experts, bias=False)
    proj.weight = draw(1, shape.experts, shape.width, dtype=stored or dtype)
    return Router(
        nn.QuantizedLinear.from_linear(proj, 32, bits) if bits else proj,
        (1 + draw(2, shape.width, dtype=dtype, scale=0.1)).astype(dtype),
        (1 + draw(3, shape.experts, dtype=dtype, scale=0.1)).astype(dtype),
        shape.top_k,
    )


def _scores(x: mx.array, router: Router) -> np.ndarray:
    """In float64."""
    proj = router.proj
    weight = exact(proj.weight)
    if isinstance(proj, nn.QuantizedLinear):
        parts = (proj.weight, proj.scales.astype(mx.float32), proj.biases.astype(mx.float32))
        weight = exact(mx.dequantize(*parts, proj.group_size, proj.bits))
    return (norm(exact(x)) * exact(router.scale) * x.shape[-1] ** -0.5) @ weight.T


def _decided(count: int, router: Router, width: int, dtype: mx.Dtype) -> mx.array:
    """Tokens whose choice no rounding of scores to dtype can change."""
    x = draw(4, 4 * count, width, dtype=dtype, scale=3)
    scores = np.sort(_scores(x, router), axis=-1)
    gaps = scores[:, -router.top_k] - scores[:, -router.top_k - 1]
    (rows,) = np.nonzero(gaps > np.abs(scores).max() * 2.0 ** (3 - BITS[dtype]))
    assert len(rows) >= count
    return x[mx.array(rows[:count])]


def _dense(chosen: mx.array, weights: mx.array, experts: int) -> mx.array:
    """Weights of all experts, 0 for those not chosen."""
    dense = mx.zeros((*chosen.shape[:-1], experts))
    return mx.put_along_axis(dense, chosen, weights, axis=-1)


@pytest.mark.parametrize(
    "shape, dtype, bits, stored",
    [
        (GEMMA, mx.bfloat16, 8, None),
        (GEMMA, mx.bfloat16, 0, None),
        (TINY, mx.bfloat16, 8, None),
        (TINY, mx.float16, 0, None),
        (TINY, mx.float32, 0, None),
        (ODD, mx.bfloat16, 4, None),
        (TINY, mx.bfloat16, 8, mx.float16),
        (ODD, mx.bfloat16, 0, mx.float32),
    ],
)
def test_values(
    metal: Executor, shape: Shape, dtype: mx.Dtype, bits: int, stored: mx.Dtype | None
) -> None:
    router = _router(shape, dtype, bits, stored)
    x = _decided(4, router, shape.width, dtype)
    found, reference = (f(x, *router, EPS) for f in (route_metal, route_reference))
    assert (found[0].dtype, found[1].dtype) == (mx.int32, mx.float32)
    scores = _scores(x, router)
    best = np.argsort(-scores, axis=-1)[:, : shape.top_k]
    assert np.array_equal(np.sort(found[0]), np.sort(best))
    powers = np.exp(np.take_along_axis(scores, best, axis=-1))
    parts = powers / powers.sum(-1, keepdims=True) * exact(router.expert_scale)[best]
    truth = np.zeros(scores.shape)
    np.put_along_axis(truth, best, parts, axis=-1)
    error, allowed = (
        np.abs(exact(_dense(*f, shape.experts)) - truth).max() for f in (found, reference)
    )
    largest = truth.max()
    # Of some roundings of a score; a wrong reference would allow anything.
    assert allowed <= 16 * np.abs(scores).max() * 2.0 ** -BITS[dtype] * largest
    assert error <= 2 * allowed + 2**-23 * largest


@pytest.mark.parametrize("f", [route_metal, route_reference])
def test_scores_are_rounded_to_the_dtype_of_activations(metal: Executor, f: object) -> None:
    """Higher by less than that leaves them equal, whatever the projection's dtype."""
    router = _router(TINY, mx.bfloat16, stored=mx.float32)
    higher = 1 + mx.arange(TINY.experts)[:, None] * 2**-13
    router.proj.weight = mx.broadcast_to(higher / TINY.width, router.proj.weight.shape)
    x, ones = mx.ones((3, TINY.width), mx.bfloat16), mx.ones((TINY.width,), mx.bfloat16)
    chosen, weights = f(x, *router._replace(scale=ones), EPS)  # type: ignore[operator]
    assert chosen.tolist() == [[0, 1]] * 3
    halves = mx.broadcast_to(router.expert_scale[:2].astype(mx.float32) / 2, (3, 2))
    assert mx.allclose(weights, halves, rtol=2**-20, atol=0)


@pytest.mark.parametrize("f", [route_metal, route_reference])
def test_equal_scores_go_to_the_lowest_numbers(metal: Executor, f: object) -> None:
    router = _router(ODD, mx.bfloat16)
    rows = mx.array([5, 5, 1, 9] * 10)
    router.proj.weight = router.proj.weight[rows]
    chosen, _ = f(draw(4, 12, ODD.width, scale=3), *router, EPS)
    first = {5: [0, 1, 4], 1: [2, 6, 10], 9: [3, 7, 11]}
    assert all(row == first[rows[row[0]].item()] for row in chosen.tolist())
    assert len({row[0] for row in chosen.tolist()}) > 1


def test_best_first(metal: Executor) -> None:
    router = _router(ODD, mx.bfloat16)._replace(expert_scale=mx.ones((ODD.experts,)))
    _, weights = route_metal(draw(4, 9, ODD.width, scale=9), *router, EPS)
    assert (mx.diff(weights, axis=-1) <= 0).all()


def test_scores_far_apart(metal: Executor) -> None:
    router = _router(TINY, mx.bfloat16)._replace(expert_scale=mx.ones((TINY.experts,)))
    router.proj.weight = router.proj.weight * 1000
    x = draw(4, 5, TINY.width)
    assert np.ptp(_scores(x, router), axis=-1).min() > 90  # exp of that is infinite
    _, weights = route_metal(x, *router, EPS)
    assert mx.allclose(weights.sum(-1), mx.ones(5))


def test_tokens_do_not_see_each_other(metal: Executor) -> None:
    router = _router(TINY, mx.bfloat16, 8)
    x = draw(4, 2, 5, TINY.width, scale=3)
    together = route(x, *router, EPS)
    assert together[0].shape == (2, 5, TINY.top_k)
    for i in range(10):
        at = (slice(i // 5, i // 5 + 1), slice(i % 5, i % 5 + 1))
        alone = route(x[at], *router, EPS)
        assert all(mx.array_equal(a, b[at]) for a, b in zip(alone, together, strict=True))


def test_what_is_not_a_number_still_gets_experts(metal: Executor) -> None:
    router = _router(TINY, mx.bfloat16)
    x = draw(4, 3, TINY.width)
    broken = mx.concatenate([x[:1], mx.full((1, TINY.width), mx.nan, mx.bfloat16), x[2:]])
    found, whole = (route_metal(rows, *router, EPS)[0].tolist() for rows in (broken, x))
    assert found[::2] == whole[::2]
    assert len(set(found[1])) == TINY.top_k and set(found[1]) <= set(range(TINY.experts))


@pytest.mark.parametrize("threads", [64, 128])
def test_smaller_threadgroups(
    metal: Executor, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    router = _router(ODD, mx.float32)
    x = _decided(3, router, ODD.width, mx.float32)
    expected = route_metal(x, *router, EPS)
    monkeypatch.setattr(ROUTE, "threads", threads)
    found = route_metal(x, *router, EPS)
    assert mx.array_equal(*(_dense(*f, ODD.experts) > 0 for f in (found, expected)))
    # A token's squares are added in another order.
    assert mx.allclose(found[1], expected[1], rtol=1e-5)


def test_a_token_reads_the_router_once(metal: Executor) -> None:
    router = _router(TINY, mx.bfloat16, 8)
    route_metal(draw(4, 6, TINY.width), *router, EPS)
    (launch,) = metal.launches
    codes = launch.traffic["codes"]
    assert codes.read == router.proj.weight.nbytes and codes.read_total == 6 * codes.read
    assert launch.written == 6 * TINY.top_k * 8


def test_a_router_with_a_bias_has_no_kernel(metal: Executor) -> None:
    router = _router(TINY, mx.bfloat16)
    router.proj.bias = mx.zeros((TINY.experts,))
    with pytest.raises(ValueError, match="and a bias"):
        route(draw(4, 1, TINY.width), *router, EPS)
