"""A mixture of experts over few tokens: the sums, who shares an expert, and what is read."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from gemma_mtp_mlx.kernels import verify_experts
from gemma_mtp_mlx.kernels.verify_experts import (
    DOWN,
    GATE_UP,
    TOKENS,
    Switch,
    experts,
    experts_metal,
    experts_reference,
)
from tests.kernels.exact import check_errors, draw, exact
from tests.metal.executor import Executor


class Shape(NamedTuple):
    """Of experts: how many there are, how many a token has, and the widths outside and inside."""

    experts: int
    top_k: int
    width: int
    inner: int


class Format(NamedTuple):
    """How weights are stored; 0 bits: as they are."""

    bits: int = 0
    group: int = 32
    mode: str = "affine"


class Glu(NamedTuple):
    """The three matrices of all experts."""

    gate: Switch
    up: Switch
    down: Switch


GEMMA = Shape(128, 8, 2816, 704)
TINY = Shape(8, 2, 128, 64)
MANY = Shape(128, 8, 128, 64)
ODD = Shape(40, 3, 96, 288)  # more units than chains, experts than lanes; rows for 9 simdgroups
PLAIN, FOUR, EIGHT = Format(), Format(4, 64), Format(8, 64)


def _matrix(key: int, count: int, height: int, width: int, form: Format, dtype: mx.Dtype) -> Switch:
    matrix = SwitchLinear(width, height, count, bias=False)
    matrix.weight = draw(key, count, height, width, dtype=dtype, scale=width**-0.5)
    return matrix.to_quantized(form.group, form.bits, form.mode) if form.bits else matrix


def _glu(shape: Shape, form: Format, dtype: mx.Dtype = mx.bfloat16) -> Glu:
    count, _, width, inner = shape
    return Glu(
        _matrix(1, count, inner, width, form, dtype),
        _matrix(2, count, inner, width, form, dtype),
        _matrix(3, count, width, inner, form, dtype),
    )


def _large(shape: Shape) -> Glu:
    """Stored as Gemma's 4-bit experts are; drawing and packing so many weights would take long."""
    draws = np.random.default_rng(0)

    def matrix(height: int, width: int) -> Switch:
        found = _matrix(0, 1, 8, 64, FOUR, mx.bfloat16)
        words = draws.integers(0, 2**32, (shape.experts, height, width // 8), np.uint32)
        spread = draws.uniform(0.1, 0.3, (shape.experts, height, width // 64)) * width**-0.5
        found.weight, found.scales = mx.array(words), mx.array(spread, mx.bfloat16)
        found.biases = found.scales * -7.5
        return found

    return Glu(
        matrix(shape.inner, shape.width),
        matrix(shape.inner, shape.width),
        matrix(shape.width, shape.inner),
    )


def _choices(tokens: int, shape: Shape, seed: int = 0) -> mx.array:
    """Experts drawn evenly, no two of a token alike."""
    draws = np.random.default_rng(seed)
    rows = [draws.permutation(shape.experts)[: shape.top_k] for _ in range(tokens)]
    return mx.array(np.stack(rows), mx.int32)


def _crowds(sizes: list[int], shape: Shape) -> mx.array:
    """Choices of sum(sizes) tokens: sizes[e] of them have expert e, all have the last expert."""
    first = np.repeat(np.arange(len(sizes)), sizes)
    first = np.random.default_rng(0).permutation(first)
    rest = [np.full_like(first, shape.experts - 1 - i) for i in range(shape.top_k - 1)]
    assert len(sizes) + len(rest) <= shape.experts
    return mx.array(np.stack([*rest, first], axis=1), mx.int32)


def _weights(chosen: mx.array) -> mx.array:
    return mx.softmax(draw(4, *chosen.shape, dtype=mx.float32), axis=-1)


def _exact_matrix(matrix: Switch, expert: int) -> np.ndarray:
    if isinstance(matrix, SwitchLinear):
        return exact(matrix.weight[expert])
    scales, biases = matrix.scales[expert], matrix.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases[expert].astype(mx.float32)
    form = (matrix.group_size, matrix.bits, matrix.mode)
    dtype = None if biases is not None else mx.float32
    return exact(mx.dequantize(matrix.weight[expert], scales, biases, *form, dtype=dtype))


def _truth(x: mx.array, chosen: mx.array, weights: mx.array, glu: Glu) -> np.ndarray:
    """In float64."""
    inputs, choices, factors = exact(x), np.array(chosen), exact(weights)
    result = np.zeros(inputs.shape)
    for expert in np.unique(choices):
        gate, up, down = (_exact_matrix(matrix, int(expert)) for matrix in glu)
        tokens, places = np.nonzero(choices == expert)
        g = inputs[tokens] @ gate.T
        g = g * (0.5 + 0.5 * np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        h = g * (inputs[tokens] @ up.T)
        result[tokens] += factors[tokens, places][:, None] * (h @ down.T)
    return result


def _reference(x: mx.array, chosen: mx.array, weights: mx.array, glu: Glu) -> mx.array:
    """With exact sums: MLX's CPU adds quantised products in the activations' dtype."""
    used, places = np.unique(np.array(chosen), return_inverse=True)

    def plain(matrix: Switch) -> SwitchLinear:
        values = [_exact_matrix(matrix, int(expert)) for expert in used]
        found = SwitchLinear(1, 1, 1, bias=False)
        found.weight = mx.array(np.stack(values), mx.float32)
        return found

    with pytest.MonkeyPatch.context() as patch:  # these operations run on the CPU
        patch.setattr(verify_experts, "on_gpu", lambda: False)
        renumbered = mx.array(places.reshape(chosen.shape), mx.int32)
        return experts_reference(x, renumbered, weights, *(plain(matrix) for matrix in glu))


def _check(x: mx.array, chosen: mx.array, glu: Glu) -> mx.array:
    weights = _weights(chosen)
    found = experts_metal(x, chosen, weights, *glu)
    truth = _truth(x, chosen, weights, glu)
    check_errors([found], [_reference(x, chosen, weights, glu)], [truth])
    return found


@pytest.mark.parametrize(
    "shape, form, dtype",
    [
        (TINY, FOUR, mx.bfloat16),
        (TINY, EIGHT, mx.bfloat16),
        (TINY, PLAIN, mx.bfloat16),
        (TINY, PLAIN, mx.float16),
        (TINY, PLAIN, mx.float32),
        (ODD, Format(4, 32), mx.float16),
        (ODD, Format(6, 32), mx.bfloat16),
        (ODD, Format(4, 32, "mxfp4"), mx.bfloat16),
    ],
)
def test_values(metal: Executor, shape: Shape, form: Format, dtype: mx.Dtype) -> None:
    _check(draw(0, 24, shape.width, dtype=dtype), _choices(24, shape), _glu(shape, form, dtype))


def test_scales_may_be_of_another_dtype(metal: Executor) -> None:
    """And of a third one in what comes after the gate."""
    glu = _glu(TINY, Format(4, 32), mx.float32)
    for matrix, dtype in zip(glu, (mx.float16, mx.float16, mx.bfloat16), strict=True):
        matrix.scales, matrix.biases = (x.astype(dtype) for x in (matrix.scales, matrix.biases))
    x, chosen = draw(0, 24, TINY.width), _choices(24, TINY)
    found, weights = _check(x, chosen, glu), _weights(chosen)
    alone = experts_metal(x[3:4], chosen[3:4], weights[3:4], *glu)
    assert found.dtype == mx.bfloat16 and mx.array_equal(alone, found[3:4])
    operations = experts_reference(x, chosen, weights, *glu)
    assert operations.dtype == mx.bfloat16
    truth = _truth(x, chosen, weights, glu)
    # `down` is added up in bfloat16; what comes before it is rounded a few times.
    assert np.abs(exact(operations) - truth).max() <= 2**-8 * 64**0.5 * np.abs(truth).max()


def test_gemma(metal: Executor) -> None:
    metal.mode = "fast"
    glu, x = _large(GEMMA), draw(0, 6, GEMMA.width)
    chosen = mx.repeat(_choices(1, GEMMA), 6, axis=0)
    together = _check(x, chosen, glu)
    for i in (0, 5):
        at = slice(i, i + 1)
        alone = experts_metal(x[at], chosen[at], _weights(chosen)[at], *glu)
        assert mx.array_equal(alone, together[at])


def test_the_operations_are_those_of_a_quantised_module() -> None:
    x, chosen, glu = draw(0, 5, TINY.width), _choices(5, TINY), _glu(TINY, FOUR)
    weights = _weights(chosen)
    found = experts(x, chosen, weights, *glu)
    truth = _truth(x, chosen, weights, glu)
    # Each of some 128 + 64 sums is rounded to bfloat16.
    assert np.abs(exact(found) - truth).max() <= 2**-8 * 192**0.5 * np.abs(truth).max()


# An expert's tokens are taken 16, 8 or up to 4 at a time.
CROWDS = [1, 2, 3, 5, 8, 9, 36]


@pytest.mark.parametrize(
    "shape, form, dtype",
    [
        (TINY, FOUR, mx.bfloat16),
        (TINY, EIGHT, mx.bfloat16),
        (ODD, Format(4, 32), mx.float32),
    ],
)
def test_tokens_do_not_see_each_other(
    metal: Executor, shape: Shape, form: Format, dtype: mx.Dtype
) -> None:
    chosen, glu = _crowds(CROWDS, shape), _glu(shape, form, dtype)
    assert len(chosen) == TOKENS
    x, weights = draw(0, TOKENS, shape.width, dtype=dtype), _weights(chosen)
    together = experts_metal(x, chosen, weights, *glu)
    for i in range(TOKENS):
        at = slice(i, i + 1)
        assert mx.array_equal(experts_metal(x[at], chosen[at], weights[at], *glu), together[at])
    other = mx.array(np.random.default_rng(1).permutation(TOKENS))
    moved = experts_metal(x[other], chosen[other], weights[other], *glu)
    assert mx.array_equal(moved, together[other])


def test_all_choose_alike_or_all_differ(metal: Executor) -> None:
    glu, x = _glu(MANY, FOUR), draw(0, 16, MANY.width)
    alike = mx.repeat(_choices(1, MANY), 16, axis=0)
    differ = mx.arange(128, dtype=mx.int32).reshape(16, 8)
    for chosen in (alike, differ):
        together = _check(x, chosen, glu)
        alone = experts_metal(x[3:4], chosen[3:4], _weights(chosen)[3:4], *glu)
        assert mx.array_equal(alone, together[3:4])


def test_more_tokens_than_a_threadgroup_takes(metal: Executor) -> None:
    tokens = 2 * TOKENS + 3
    chosen, glu = _choices(tokens, TINY), _glu(TINY, FOUR)
    x, weights = draw(0, tokens, TINY.width), _weights(chosen)
    together = experts_metal(x, chosen, weights, *glu)
    assert [launch.groups[2] for launch in metal.launches] == [3, 3]
    for at in (slice(0, TOKENS), slice(TOKENS - 3, TOKENS + 3), slice(tokens - 1, tokens)):
        assert mx.array_equal(experts_metal(x[at], chosen[at], weights[at], *glu), together[at])


@pytest.mark.parametrize("threads", [64, 128, 256])
def test_threadgroups_of_other_sizes(
    metal: Executor, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    chosen, glu = _crowds(CROWDS, ODD), _glu(ODD, Format(4, 32), mx.float32)
    x, weights = draw(0, len(chosen), ODD.width, dtype=mx.float32), _weights(chosen)
    expected = experts_metal(x, chosen, weights, *glu)
    for kernel in (GATE_UP, DOWN):
        monkeypatch.setattr(kernel, "threads", threads)
    assert mx.array_equal(experts_metal(x, chosen, weights, *glu), expected)
    assert {launch.threads for launch in metal.launches[2:]} == {threads}


def test_any_order_of_threads(metal: Executor) -> None:
    chosen, glu = _crowds([5, 2], TINY), _glu(TINY, FOUR)
    x, weights = draw(0, 7, TINY.width), _weights(chosen)
    expected = experts_metal(x, chosen, weights, *glu)
    for metal.schedule in ("reversed", "random"):
        assert mx.array_equal(experts_metal(x, chosen, weights, *glu), expected)


def test_a_batch_is_its_rows(metal: Executor) -> None:
    chosen, glu = _choices(6, TINY), _glu(TINY, FOUR)
    x, weights = draw(0, 6, TINY.width), _weights(chosen)
    flat = experts(x, chosen, weights, *glu)
    rows = [part.reshape(2, 3, -1) for part in (x, chosen, weights)]
    assert mx.array_equal(experts(rows[0], rows[1], rows[2], *glu), flat.reshape(2, 3, -1))


@pytest.mark.parametrize("tokens", [1, 4, 8, 32, 64])
def test_weights_in_use_are_read_once(metal: Executor, tokens: int) -> None:
    glu, chosen = _glu(MANY, FOUR), _choices(tokens, MANY)
    used = len(np.unique(np.array(chosen)))
    experts_metal(draw(0, tokens, MANY.width), chosen, _weights(chosen), *glu)
    gate_up, down = (launch.traffic for launch in metal.launches)
    buffers = [(gate_up, "0", glu.gate), (gate_up, "1", glu.up), (down, "", glu.down)]
    for traffic, number, matrix in buffers:
        codes, scales, biases = (traffic[part + number] for part in ("codes", "scales", "biases"))
        assert codes.read == matrix.weight.nbytes // MANY.experts * used
        assert codes.read_total <= 1.02 * codes.read
        # Lanes that hold parts of a group all read its scale, which is one access of a cache line.
        assert scales.read == biases.read == matrix.scales.nbytes // MANY.experts * used


def test_gate_and_up_of_two_formats_have_no_kernel(metal: Executor) -> None:
    chosen = _choices(1, TINY)
    glu = _glu(TINY, FOUR)._replace(up=_glu(TINY, EIGHT).up)
    with pytest.raises(ValueError, match="gate and up in one format"):
        experts(draw(0, 1, TINY.width), chosen, _weights(chosen), *glu)
    many = Shape(16, 9, 128, 64)
    chosen = _choices(1, many)
    with pytest.raises(ValueError, match="at most 8"):
        experts(draw(0, 1, many.width), chosen, _weights(chosen), *_glu(many, PLAIN))
