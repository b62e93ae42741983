"""Drawing from given logits: MLX's own argmax of logits / temperature + noise, rows unmixed."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.draw_tokens import (
    BEST_OF_CHOICES,
    BEST_OF_LOGITS,
    CHUNK,
    draw_tokens_metal,
    draw_tokens_reference,
)
from gemma_mtp_mlx.sampling import Sampling, SamplingParams, batch_sampling, gumbel

TEMPERATURES = [0.0, 1.0, 0.3, 2.5]
SIZES = [8, 128, 1001, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 8]
ULP = 2.0**-23


def _sampling(*temperatures: float) -> Sampling:
    params = [SamplingParams(temperature=temperature, top_k=1) for temperature in temperatures]
    return batch_sampling(params, [2**32 - 1 - 77 * row for row in range(len(params))])


def _positions(rows: int, length: int) -> mx.array:
    return mx.arange(length)[None] + mx.array([[1 + 65_521 * row] for row in range(rows)])


def _logits(rows: int, length: int, size: int) -> mx.array:
    return mx.random.normal((rows, length, size), key=mx.random.key(size)) * 4


def _clear(logits: mx.array, sampling: Sampling, positions: mx.array) -> np.ndarray:
    """Where the best score leads by more than the rounding of two noises and two sums."""
    noise = gumbel(sampling, positions, logits.shape[-1])
    assert noise is not None
    warm = sampling.temperature[:, None, None]
    scores = mx.where(warm > 0, logits / mx.maximum(warm, 1e-6) + noise, logits)
    second, first = np.array(mx.sort(scores, axis=-1)[..., -2:]).transpose(2, 0, 1)
    return first - second > 2 * (4.5 + 4 * np.abs(first)) * ULP


@pytest.mark.parametrize("size", SIZES)
def test_draws_what_mlx_draws(metal: object, size: int) -> None:
    logits, sampling = _logits(4, 5, size), _sampling(*TEMPERATURES)
    positions = _positions(4, 5)
    clear = _clear(logits, sampling, positions)
    assert clear.all()
    tokens = draw_tokens_metal(logits, sampling, positions)
    assert tokens.dtype == mx.int32
    assert mx.array_equal(tokens, draw_tokens_reference(logits, sampling, positions))
    assert mx.array_equal(tokens[0], mx.argmax(logits[0], axis=-1))


def test_a_whole_vocabulary(metal: object) -> None:
    logits, sampling, positions = _logits(2, 1, 262_144), _sampling(0, 1), _positions(2, 1)
    assert _clear(logits, sampling, positions).all()
    tokens = draw_tokens_metal(logits, sampling, positions)
    assert mx.array_equal(tokens, draw_tokens_reference(logits, sampling, positions))


@pytest.mark.parametrize("threads", [64, 128])
def test_other_threadgroups(metal: object, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    logits, sampling, positions = _logits(4, 2, 5001), _sampling(*TEMPERATURES), _positions(4, 2)
    expected = draw_tokens_metal(logits, sampling, positions)
    for kernel in (BEST_OF_LOGITS, BEST_OF_CHOICES):
        monkeypatch.setattr(kernel, "threads", threads)
    assert mx.array_equal(draw_tokens_metal(logits, sampling, positions), expected)


def test_rows_and_positions_do_not_see_each_other(metal: object) -> None:
    logits, sampling, positions = _logits(4, 3, 1001), _sampling(*TEMPERATURES), _positions(4, 3)
    together = draw_tokens_metal(logits, sampling, positions)
    for row, temperature in enumerate(TEMPERATURES):
        alone = _sampling(temperature)._replace(seed=sampling.seed[row : row + 1])
        for place in range(3):
            at = (slice(row, row + 1), slice(place, place + 1))
            token = draw_tokens_metal(logits[at], alone, positions[at])
            assert mx.array_equal(token, together[at])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_only_possible_token(metal: object, temperature: float) -> None:
    size = 2 * CHUNK + 9
    sampling = _sampling(temperature)
    for token in (0, 31, 32, 255, 256, CHUNK - 1, CHUNK, size - 1):
        logits = mx.where(mx.arange(size) == token, -1e4, -mx.inf)[None, None]
        assert draw_tokens_metal(logits, sampling, mx.array([[3]])).item() == token


def test_a_temperature_has_a_least_value(metal: object) -> None:
    logits, sampling, positions = (
        _logits(4, 5, 128) * 1e-6,
        _sampling(*[1e-9] * 4),
        _positions(4, 5),
    )
    assert _clear(logits, sampling, positions).all()
    tokens = draw_tokens_metal(logits, sampling, positions)
    assert mx.array_equal(tokens, draw_tokens_reference(logits, sampling, positions))


def test_greedy_is_exact(metal: object) -> None:
    """An ulp decides, and where there is none the lowest id."""
    size, sampling, positions = 2 * CHUNK + 9, _sampling(*[0] * 4), _positions(4, 2)
    for pair in [(5, 6), (31, 32), (255, 256), (300, 44), (CHUNK - 1, CHUNK), (2 * CHUNK, 64)]:
        for second in (1.0, 1 + ULP):
            logits = mx.zeros((4, 2, size))
            logits[..., pair[0]], logits[..., pair[1]] = 1.0, second
            expected = min(pair) if second == 1 else pair[1]
            assert (np.array(draw_tokens_metal(logits, sampling, positions)) == expected).all()
    for nothing in (-mx.inf, mx.nan):
        logits = mx.full((4, 2, size), nothing)
        assert not np.array(draw_tokens_metal(logits, sampling, positions)).any()


def test_the_lowest_of_equals_with_noise(metal: object) -> None:
    """A logit may be so large that it absorbs the noise."""
    logits = mx.where(mx.arange(5000) > 700, 1e9, 0.0)[None, None]
    assert draw_tokens_metal(logits, _sampling(1), mx.array([[3]])).item() == 701
