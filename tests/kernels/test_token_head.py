"""The head: logits as exact as MLX's, the tokens that are drawn from them, rows unmixed."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from gemma_mtp_mlx.kernels import token_head as module
from gemma_mtp_mlx.kernels.draw_tokens import draw_tokens_metal
from gemma_mtp_mlx.kernels.token_head import (
    CHOOSE_ROWS,
    CHOOSE_TILES,
    LOGITS_ROWS,
    LOGITS_TILES,
    head_logits_metal,
    head_logits_reference,
    token_head_metal,
    token_head_reference,
)
from gemma_mtp_mlx.kernels.verify_matmul import project_metal
from gemma_mtp_mlx.sampling import Sampling, SamplingParams, batch_sampling, gumbel
from tests.kernels.exact import exact
from tests.metal.executor import Executor

CAP = 30.0
ULP = 2.0**-23


class Form(NamedTuple):
    """How a head is stored; bits: 0 for plain weights. model: of hidden states, if not dtype."""

    bits: int
    group_size: int
    dtype: mx.Dtype
    model: mx.Dtype | None = None


FOUR = Form(4, 64, mx.bfloat16)
EIGHT = Form(8, 32, mx.float16)
PLAIN = Form(0, 0, mx.bfloat16)
SINGLE = Form(0, 0, mx.float32)
OTHERS = [Form(4, 32, mx.float16, mx.bfloat16), Form(0, 0, mx.float32, mx.bfloat16)]
# Targets, drafters, the tiny families and theirs, the built-in pair.
WIDTHS = [1536, 2560, 3840, 2816, 5376, 256, 1024, 128, 64, 192, 160]


def _head(form: Form, size: int, width: int) -> nn.Module:
    head = nn.Embedding(size, width)
    weight = mx.random.normal((size, width), key=mx.random.key(width)) * (8 / width**0.5)
    head.weight = weight.astype(form.dtype)
    if not form.bits:
        return head
    return nn.QuantizedEmbedding.from_embedding(head, form.group_size, form.bits)


def _hidden(form: Form, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(len(shape) + shape[-2])).astype(
        form.model or form.dtype
    )


def _weight(head: nn.Module) -> np.ndarray:
    if "scales" not in head:
        return exact(head.weight)
    scales, biases = (x.astype(mx.float32) for x in (head.scales, head.biases))
    return exact(mx.dequantize(head.weight, scales, biases, head.group_size, head.bits))


def _check_errors(hidden: mx.array, head: nn.Module, cap: float | None) -> None:
    truth = exact(hidden) @ _weight(head).T
    truth = truth if cap is None else np.tanh(truth / cap) * cap
    found = head_logits_metal(hidden, head, cap)
    assert found.dtype == mx.float32
    error, allowed = (
        np.abs(exact(x) - truth).max() for x in (found, head_logits_reference(hidden, head, cap))
    )
    assert error <= 2 * allowed + ULP * np.abs(truth).max()


def _sampling(count: int, *temperatures: float, first: int = 0) -> Sampling:
    """Rows of those temperatures in turn; filters that nothing here may look at."""
    rows = range(first, first + count)
    params = [
        SamplingParams(temperature=temperatures[row % len(temperatures)], top_k=1) for row in rows
    ]
    return batch_sampling(params, [2**32 - 1 - 77 * row for row in rows])


def _positions(rows: int, length: int) -> mx.array:
    return mx.arange(length)[None] + mx.arange(rows)[:, None] * 65_521 + 1


@pytest.mark.parametrize("cap", [CAP, None])
@pytest.mark.parametrize("form", [FOUR, EIGHT, PLAIN, SINGLE, *OTHERS], ids=str)
def test_logits_are_as_exact_as_mlxs(metal: Executor, form: Form, cap: float | None) -> None:
    head, hidden = _head(form, 72, 192), _hidden(form, 17, 192)
    for count in (2, 17):
        _check_errors(hidden[:count], head, cap)


@pytest.mark.parametrize("form", [FOUR._replace(group_size=32), PLAIN], ids=str)
def test_the_widths_of_gemma_4(metal: Executor, form: Form) -> None:
    for width in WIDTHS:
        head, hidden = _head(form, 40, width), _hidden(form, 5, width)
        for count in (1, 5):
            _check_errors(hidden[:count], head, CAP)


@pytest.mark.parametrize("form", OTHERS, ids=str)
def test_logits_are_rounded_to_the_dtype_of_hidden_states(metal: Executor, form: Form) -> None:
    """As those of weights and scales of that dtype are, and before they are capped."""
    head, hidden = _head(form, 72, 192), _hidden(form, 9, 192)
    for path in (head_logits_metal, head_logits_reference):
        logits = path(hidden, head, None)
        assert mx.array_equal(logits.astype(mx.bfloat16).astype(mx.float32), logits)
        capped = mx.tanh(logits / CAP) * CAP
        assert mx.allclose(path(hidden, head, CAP), capped, rtol=2**-20, atol=0)


@pytest.mark.parametrize("form", [FOUR, PLAIN], ids=str)
def test_logits_are_those_of_a_linear_layer(metal: Executor, form: Form) -> None:
    head, hidden = _head(form, 72, 192), _hidden(form, 9, 192)
    for count in (1, 4, 9):
        (linear,) = project_metal(hidden[:count], head)
        found = head_logits_metal(hidden[:count], head, None)
        assert mx.array_equal(found, linear.astype(mx.float32))


@pytest.mark.parametrize("form", [FOUR, PLAIN], ids=str)
def test_rows_and_positions_do_not_see_each_other(metal: Executor, form: Form) -> None:
    """17 rows at once, as blocks of 2 to 16, and one by one."""
    head, hidden = _head(form, 136, 192), _hidden(form, 17, 192)
    positions = _positions(17, 1)

    def run(begin: int, end: int) -> tuple[mx.array, mx.array]:
        rows = slice(begin, end)
        at, sampling = hidden[rows, None], _sampling(end - begin, 0, 1, 0.4, first=begin)
        tokens = token_head_metal(at, head, CAP, sampling, positions[rows])
        return head_logits_metal(at, head, CAP)[:, 0], tokens[:, 0]

    logits, tokens = run(0, 17)
    for size in (1, 2, 3, 4, 5, 8, 9, 16):
        for begin in {0, size, 17 - size} if size > 1 else range(17):
            end = min(begin + size, 17)
            some_logits, some_tokens = run(begin, end)
            assert mx.array_equal(some_logits, logits[begin:end])
            assert mx.array_equal(some_tokens, tokens[begin:end])


def test_a_block_is_its_positions(metal: Executor) -> None:
    head, hidden = _head(PLAIN, 136, 64), _hidden(PLAIN, 3, 5, 64)
    sampling, positions = _sampling(3, 1, 0, 2), _positions(3, 5)
    block = token_head_metal(hidden, head, CAP, sampling, positions)
    for place in range(5):
        at = slice(place, place + 1)
        one = token_head_metal(hidden[:, at], head, CAP, sampling, positions[:, at])
        assert mx.array_equal(one, block[:, at])


@pytest.mark.parametrize("cap", [CAP, None])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 2), (2, 4), (3, 7)])
@pytest.mark.parametrize("form", [FOUR, EIGHT, PLAIN, OTHERS[0]], ids=str)
def test_draws_what_is_drawn_from_its_logits(
    metal: Executor, form: Form, shape: tuple[int, int], cap: float | None
) -> None:
    head, hidden = _head(form, 1000, 128), _hidden(form, *shape, 128)
    logits = head_logits_metal(hidden, head, cap)
    for temperatures in [(0, 1, 0.3), (1,), (2.5,)]:
        sampling = _sampling(shape[0], *temperatures)
        for first in range(3):
            positions = _positions(*shape) + first
            tokens = token_head_metal(hidden, head, cap, sampling, positions)
            assert tokens.dtype == mx.int32
            assert mx.array_equal(tokens, draw_tokens_metal(logits, sampling, positions))


@pytest.mark.parametrize("shape", [(4, 1), (3, 4)])
def test_draws_what_mlx_draws(metal: Executor, shape: tuple[int, int]) -> None:
    """Where the best score leads by more than two logits and two noises can be off."""
    head, hidden = _head(SINGLE, 1000, 128), _hidden(SINGLE, *shape, 128)
    sampling, positions = _sampling(shape[0], 0, 1, 0.3), _positions(*shape)
    logits = head_logits_reference(hidden, head, CAP)
    truth = np.tanh(exact(hidden) @ exact(head.weight).T / CAP) * CAP
    error = 3 * np.abs(exact(logits) - truth).max()  # the kernel's is at most twice the reference's
    noise = gumbel(sampling, positions, 1000)
    assert noise is not None
    warm = sampling.temperature[:, None, None]
    scores = mx.where(warm > 0, logits / mx.maximum(warm, 1e-6) + noise, logits)
    second, first = exact(mx.sort(scores, axis=-1)[..., -2:]).transpose(2, 0, 1)
    coldest = 0.3
    assert (first - second > 2 * (error / coldest + (4.5 + 4 * np.abs(first)) * ULP)).all()
    tokens = token_head_metal(hidden, head, CAP, sampling, positions)
    assert mx.array_equal(tokens, token_head_reference(hidden, head, CAP, sampling, positions))


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_the_lowest_of_equals(metal: Executor, count: int) -> None:
    """Equal rows of weights in one lane's reach, in other lanes', simdgroups' and threadgroups'."""
    head = _head(PLAIN, 520, 64)
    hidden = mx.broadcast_to(_hidden(PLAIN, 1, 64), (1, count, 64))
    sampling, positions = _sampling(1, 0), _positions(1, count)
    plain = head.weight
    for pair in [(0, 1), (3, 4), (15, 16), (31, 32), (8, 24), (63, 64), (500, 7), (519, 256)]:
        head.weight = mx.array(plain)
        head.weight[mx.array(pair)] = hidden[0, 0]
        tokens = token_head_metal(hidden, head, CAP, sampling, positions)
        assert tokens.tolist() == [[min(pair)] * count]


@pytest.mark.parametrize("count", [2, 6])
def test_logits_at_the_cap_are_equal(metal: Executor, count: int) -> None:
    head, hidden = _head(PLAIN, 136, 64), _hidden(PLAIN, 1, count, 64) * 200
    assert ((exact(head_logits_metal(hidden, head, CAP)) == CAP).sum(-1) > 10).all()
    arguments = hidden, head, CAP, _sampling(1, 0), _positions(1, count)
    assert mx.array_equal(token_head_metal(*arguments), token_head_reference(*arguments))


@pytest.mark.parametrize("count", [3, 12])
def test_other_threadgroups(metal: Executor, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Fewer threads, and more tiles than threadgroups."""
    head, hidden = _head(FOUR, 520, 128), _hidden(FOUR, 1, count, 128)
    arguments = hidden, head, CAP, _sampling(1, 1), _positions(1, count)
    tokens, logits = token_head_metal(*arguments), head_logits_metal(*arguments[:3])
    for threads, groups in [(64, 3), (128, 1), (256, 2)]:
        monkeypatch.setattr(module, "GROUPS", groups)
        for kernel in (CHOOSE_ROWS, CHOOSE_TILES, LOGITS_ROWS, LOGITS_TILES):
            monkeypatch.setattr(kernel, "threads", threads)
        assert mx.array_equal(token_head_metal(*arguments), tokens)
        assert mx.array_equal(head_logits_metal(*arguments[:3]), logits)


@pytest.mark.parametrize("schedule", ["reversed", "random"])
@pytest.mark.parametrize("count", [3, 12])
def test_threads_in_another_order(metal: Executor, schedule: str, count: int) -> None:
    head, hidden = _head(FOUR, 520, 128), _hidden(FOUR, 1, count, 128)
    arguments = hidden, head, CAP, _sampling(1, 1), _positions(1, count)
    tokens = token_head_metal(*arguments)
    metal.schedule = schedule
    assert mx.array_equal(token_head_metal(*arguments), tokens)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_the_head_is_read_once(metal: Executor, count: int) -> None:
    head, hidden = _head(FOUR, 4096, 128), _hidden(FOUR, 1, count, 128)
    token_head_metal(hidden, head, CAP, _sampling(1, 1), _positions(1, count))
    choose, reduce = metal.launches
    for name, array in [("codes", head.weight), ("scales", head.scales), ("biases", head.biases)]:
        assert choose.traffic[name].read == array.nbytes
    assert choose.traffic["codes"].read_total == head.weight.nbytes
    read = sum(reduce.traffic[name].read for name in ("scores", "ids"))
    assert choose.written == read <= count * 8 * 4096 // 16


@pytest.mark.parametrize("count", [1, 8])
def test_a_whole_vocabulary(metal: Executor, count: int) -> None:
    metal.mode = "fast"
    head, hidden = _head(FOUR, 262_144, 64), _hidden(FOUR, 2, count, 64)
    sampling, positions = _sampling(2, 0, 1), _positions(2, count)
    logits = head_logits_metal(hidden, head, CAP)
    tokens = token_head_metal(hidden, head, CAP, sampling, positions)
    assert mx.array_equal(tokens, draw_tokens_metal(logits, sampling, positions))
    assert mx.array_equal(tokens[0], mx.argmax(logits[0], axis=-1))


def test_a_head_without_a_kernel_is_named(metal: Executor) -> None:
    head = nn.Embedding(130, 64)
    hidden = mx.zeros((1, 1, 64))
    with pytest.raises(ValueError, match="130 x 64"):
        head_logits_metal(hidden, head, None)
    with pytest.raises(ValueError, match="130 x 64"):
        token_head_metal(hidden, head, None, _sampling(1, 0), _positions(1, 1))
