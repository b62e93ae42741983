"""The noise of noise.metal is sampling.gumbel's: the words bit for bit, the values to rounding."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.kernel import Kernel, Output
from gemma_mtp_mlx.sampling import SamplingParams, batch_sampling, gumbel

KEYS = [(0, 0), (0, 1), (1, 0), (5, 262_143), (2**32 - 1, 9), (2**31, 2**31 - 1)]
SIZES = [1, 2, 7, 8, 128, 192, 1001, 4096]
ULP = 2.0**-23

WORDS = Kernel(
    "noise_words",
    ["keys", "vocab"],
    ["words"],
    """
    const uint row = threadgroup_position_in_grid.y;
    const uint id = thread_position_in_grid.x;
    if (id < vocab) {
        words[row * vocab + id] = noise_word(keys[2 * row], keys[2 * row + 1], id, vocab);
    }
    """,
    ["noise"],
)
VALUES = Kernel(
    "noise_values",
    ["words", "count"],
    ["values"],
    """
    const uint i = thread_position_in_grid.x;
    if (i < count) {
        values[i] = gumbel(words[i]);
    }
    """,
    ["noise"],
)


def _words(keys: list[tuple[int, int]], size: int) -> mx.array:
    (words,) = WORDS.launch(
        [mx.array(keys, mx.uint32), mx.array(size, mx.uint32)],
        (-(-size // WORDS.threads), len(keys), 1),
        [Output((len(keys), size), mx.uint32)],
        {},
    )
    return words


def _values(words: mx.array) -> mx.array:
    (values,) = VALUES.launch(
        [words, mx.array(words.size, mx.uint32)],
        (-(-words.size // VALUES.threads), 1, 1),
        [Output(words.shape, mx.float32)],
        {},
    )
    return values


def _mlx_words(keys: list[tuple[int, int]], size: int) -> mx.array:
    split = [mx.random.split(mx.array(key, mx.uint32), (size + 1) // 2) for key in keys]
    return mx.stack(split).reshape(len(keys), -1)[:, :size]


def _truth(words: np.ndarray) -> np.ndarray:
    """Gumbel of the float32 v that words stand for, in float64."""
    v = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    v = np.minimum(v, np.float32(1 - 2.0**-24)).astype(np.float64)
    return -np.log(-np.log1p(-v))


def _bound(values: np.ndarray) -> np.ndarray:
    """Rounding of a logarithm good to 3 ulp (what Metal promises) of another one, of 1 - v rounded,
    times and divided by numbers that add an ulp between them and the rounding of 1 - v half."""
    return (4.5 + 3 * np.abs(values)) * ULP


@pytest.mark.parametrize("size", SIZES)
def test_words_are_mlxs(metal: object, size: int) -> None:
    assert mx.array_equal(_words(KEYS, size), _mlx_words(KEYS, size))


def test_words_of_a_whole_vocabulary(metal: object) -> None:
    assert mx.array_equal(_words(KEYS[3:4], 262_144), _mlx_words(KEYS[3:4], 262_144))


def test_values_are_gumbel_to_rounding(metal: object) -> None:
    edges = [0, 1, 2, 2**23 - 1, 2**23, 2**24, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 1]
    drawn = np.random.default_rng(0).integers(0, 2**32, 8192, np.uint32)
    small = drawn[:2048] >> np.arange(2048, dtype=np.uint32) % 32
    words = np.concatenate([np.array(edges, np.uint32), drawn, small])
    values = np.array(_values(mx.array(words)))
    truth = _truth(words)
    assert np.isfinite(values).all()
    assert (np.abs(values - truth) <= _bound(truth)).all()


@pytest.mark.parametrize("size", [128, 1001])
def test_values_are_those_of_sampling(metal: object, size: int) -> None:
    params = [SamplingParams(temperature=1.0)] * len(KEYS)
    sampling = batch_sampling(params, [seed for seed, _ in KEYS])
    noise = gumbel(sampling, mx.array([[position] for _, position in KEYS]), size)
    assert noise is not None
    values = np.array(_values(_words(KEYS, size)))
    assert (np.abs(values - np.array(noise)[:, 0]) <= 2 * _bound(values)).all()
