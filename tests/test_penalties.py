"""Every position of a block gets what mlx_lm's processors give it, whoever else is in the batch."""

import random
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from gemma_mtp_mlx import SamplingParams
from gemma_mtp_mlx.penalties import (
    Penalties,
    batch_penalties,
    bias_candidates,
    check_bias,
    context_size,
    penalize,
)

V = 37  # few, so that tokens repeat
PLAIN = SamplingParams(temperature=1.0)
BIASED = SamplingParams(logit_bias={0: 3.5, 36: -100.0, 5: -0.25})


def _all_kinds(window: int, sign: float = 1) -> SamplingParams:
    """Settings whose three windows differ."""
    return SamplingParams(
        repetition_penalty=1.3,
        repetition_context_size=window,
        presence_penalty=0.7 * sign,
        presence_context_size=window + 1,
        frequency_penalty=0.3 * sign,
        frequency_context_size=window + 2,
        logit_bias={3: 1.5, 4: -2.0},
    )


MIXED = [
    PLAIN,
    _all_kinds(1),
    SamplingParams(repetition_penalty=0.8, repetition_context_size=20),
    SamplingParams(presence_penalty=-1.1),
    BIASED,
    SamplingParams(frequency_penalty=0.9, frequency_context_size=1000),
    _all_kinds(1000, sign=-1),
    _all_kinds(20),
]


def _logits(rows: int, length: int) -> mx.array:
    logits = 4 * mx.random.normal((rows, length, V), key=mx.random.key(3))
    logits[..., 7] = -0.0  # has a sign to lose
    logits[..., 8] = -mx.inf
    return logits


def _recent(histories: Sequence[Sequence[int]], size: int) -> mx.array:
    """The last tokens of each history, left-padded with -1."""
    return mx.array([([-1] * size + list(h))[-size:] for h in histories], mx.int32)


def _expected(logits: mx.array, history: Sequence[int], params: SamplingParams) -> mx.array:
    """mlx_lm's own processors, with one position's whole history. logits: [V]."""
    processors = make_logits_processors(
        logit_bias=dict(params.logit_bias),
        repetition_penalty=params.repetition_penalty,
        repetition_context_size=params.repetition_context_size,
        presence_penalty=params.presence_penalty,
        presence_context_size=params.presence_context_size,
        frequency_penalty=params.frequency_penalty,
        frequency_context_size=params.frequency_context_size,
    )
    result = mx.array(logits)[None]
    for processor in processors:
        result = processor(mx.array(history, mx.int32), result)
    return result[0]


def _bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint32))


def _history(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(V) for _ in range(length)]


def _penalties(params: Sequence[SamplingParams]) -> Penalties:
    penalties = batch_penalties(params, V)
    assert penalties is not None
    return penalties


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("length", [1, 5, 19, 20, 21, 60])
def test_each_position_equals_mlx_lm_applied_to_its_history(length: int, k: int) -> None:
    rng = random.Random(length)
    # Rows of unequal length too: what is missing is padding.
    histories = [_history(rng, max(length - row % 3, 1)) for row in range(len(MIXED))]
    drafts = [_history(rng, k) for _ in MIXED]
    logits = _logits(len(MIXED), k + 1)
    recent = _recent(histories, min(context_size(MIXED), length))
    drafted = mx.array(drafts, mx.int32).reshape(len(MIXED), k)
    result = penalize(logits, recent, drafted, _penalties(MIXED))
    for row, params in enumerate(MIXED):
        for i in range(k + 1):
            seen = histories[row] + drafts[row][:i]
            expected = _expected(logits[row, i], seen, params)
            np.testing.assert_array_equal(_bits(result[row, i]), _bits(expected))


def test_a_row_depends_on_no_other_row_nor_on_more_context_or_drafts() -> None:
    rng = random.Random(1)
    histories = [_history(rng, 30) for _ in MIXED]
    drafts = mx.array([_history(rng, 4) for _ in MIXED], mx.int32)
    logits = _logits(len(MIXED), 5)
    whole = penalize(logits, _recent(histories, 30), drafts, _penalties(MIXED))
    for row, params in enumerate(MIXED):
        alone = batch_penalties([params], V)
        if alone is None:
            np.testing.assert_array_equal(_bits(whole[row]), _bits(logits[row]))
            continue
        for k in range(5):
            for size in (max(min(context_size([params]), 30), 1), 30, 50):
                recent = _recent([histories[row]], size)
                part = penalize(
                    logits[row : row + 1, : k + 1], recent, drafts[row : row + 1, :k], alone
                )
                np.testing.assert_array_equal(_bits(part[0]), _bits(whole[row, : k + 1]))


def test_a_draft_matters_to_later_positions_only() -> None:
    params = [_all_kinds(20)]
    recent = _recent([list(range(10))], 22)
    logits = _logits(1, 4)
    one = penalize(logits, recent, mx.array([[20, 21, 22]]), _penalties(params))
    other = penalize(logits, recent, mx.array([[20, 30, 22]]), _penalties(params))
    same = (_bits(one) == _bits(other)).all(axis=-1)[0]
    assert same.tolist() == [True, True, False, False]


def test_nothing_is_built_for_nothing() -> None:
    assert batch_penalties([PLAIN, PLAIN], V) is None
    assert context_size([PLAIN, BIASED]) == 0
    assert context_size(MIXED) == 1002
    assert context_size([SamplingParams(presence_penalty=1, repetition_context_size=99)]) == 20
    penalties = _penalties([PLAIN, BIASED])
    assert penalties[1:] == (None, None, None)
    # Without penalties no context is needed at all.
    result = penalize(
        _logits(2, 1), mx.zeros((2, 0), mx.int32), mx.zeros((2, 0), mx.int32), penalties
    )
    np.testing.assert_array_equal(_bits(result[0]), _bits(_logits(2, 1)[0]))


def test_a_window_may_be_larger_than_any_context() -> None:
    params = [SamplingParams(presence_penalty=1.0, presence_context_size=10**12)]
    result = penalize(
        mx.zeros((1, 1, V)), mx.array([[5]]), mx.zeros((1, 0), mx.int32), _penalties(params)
    )
    assert result[0, 0, 5].item() == -1.0


def test_the_drafter_sees_the_same_bias() -> None:
    penalties = _penalties(MIXED)
    logits = _logits(len(MIXED), 1)[:, 0]
    biased = [logits[row] + mx.zeros(V) for row in range(len(MIXED))]
    for row, params in enumerate(MIXED):
        for token, bias in params.logit_bias.items():
            biased[row][token] += bias
    whole = bias_candidates(logits, None, penalties)
    np.testing.assert_array_equal(np.array(whole), np.array(mx.stack(biased)))
    ids = mx.array([random.Random(row).sample(range(V), 9) for row in range(len(MIXED))])
    some = bias_candidates(mx.take_along_axis(logits, ids, axis=-1), ids, penalties)
    np.testing.assert_array_equal(_bits(some), _bits(mx.take_along_axis(whole, ids, axis=-1)))
    np.testing.assert_array_equal(_bits(whole[0]), _bits(logits[0]))
    unbiased = _penalties([MIXED[2]])
    assert bias_candidates(logits, None, unbiased) is logits


@pytest.mark.parametrize("bias", [{V: 1.0}, {-1: 1.0}, {3: float("nan")}, {3: float("inf")}])
def test_a_bias_that_cannot_be_applied_is_refused(bias: dict[int, float]) -> None:
    params = SamplingParams(logit_bias=bias)
    with pytest.raises(ValueError, match=r"^logit_bias .*token -?\d+"):
        check_bias(params, V)
    with pytest.raises(ValueError, match=r"^logit_bias"):
        batch_penalties([PLAIN, params], V)
