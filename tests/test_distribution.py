"""Sampled tokens are distributed as the target's softmax, at the first position and later.

The expected count of a token is the sum, over many requests that differ in their seed only, of its
probability after that request's own prefix; the observed counts must fit by chi-square. The odds
of a false alarm are 1 in 10,000 per test, and the seeds are fixed.
"""

import mlx.core as mx
import numpy as np
import pytest
from scipy.stats import chi2

import gemma_mtp_mlx.round
from gemma_mtp_mlx import Pair, SamplingParams
from gemma_mtp_mlx.round import Models
from gemma_mtp_mlx.sampling import batch_sampling, draw, gumbel
from tests.conftest import LoadPair
from tests.doubles import run

REQUESTS, PROMPT, NEW = 512, [7, 90, 33], 4


def _p_value(observed: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square of counts, rare tokens taken together."""
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    return float(chi2.sf(statistic, used.sum() - 1))


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _p_values(pair: Pair, k: int) -> list[float]:
    """Two p-values per generated position after the first: of token ids, and of tokens by their
    rank in the row's own distribution, which pools rows whose favourites differ."""
    params = [
        SamplingParams(max_tokens=NEW, temperature=1.0, seed=seed) for seed in range(REQUESTS)
    ]
    engine = run(Models(pair.target, pair.drafter), [PROMPT] * REQUESTS, params, k)
    logits, size = engine.logits(), pair.target.config.vocab_size
    by_id, by_rank = [], []
    for offset in range(1, NEW):
        tokens = np.array([request.tokens[offset] for request in engine.requests])
        position = len(PROMPT) + offset
        probs = _softmax(np.stack([logits[row, position] for row in range(REQUESTS)]))
        ranks = (probs > probs[np.arange(REQUESTS), tokens][:, None]).sum(-1)
        by_id.append(_p_value(np.bincount(tokens, minlength=size), probs.sum(0)))
        ordered = -np.sort(-probs, axis=-1)
        by_rank.append(_p_value(np.bincount(ranks, minlength=size), ordered.sum(0)))
    return [*by_id, *by_rank]


@pytest.mark.parametrize("k", [0, 2])
def test_later_tokens_follow_the_targets_softmax(tiny_pair: LoadPair, k: int) -> None:
    assert min(_p_values(tiny_pair("31b"), k)) > 1e-4


def test_the_test_notices_another_distribution(
    tiny_pair: LoadPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise too small, as if the temperature were 0.7, is caught at every position."""

    def damped(*args: object) -> mx.array:
        return gumbel(*args) * 0.7  # type: ignore[arg-type, operator]

    monkeypatch.setattr(gemma_mtp_mlx.round, "gumbel", damped)
    assert max(_p_values(tiny_pair("31b"), 2)[NEW - 1 :]) < 1e-6


def _first_tokens(logits: mx.array, params: SamplingParams, count: int) -> np.ndarray:
    sampling = batch_sampling([params] * count, range(count))
    size = logits.shape[-1]
    noise = gumbel(sampling, mx.full((count, 1), 9, mx.int32), size)
    tokens = draw(mx.broadcast_to(logits, (count, 1, size)), noise, sampling)
    return np.bincount(np.array(tokens)[:, 0], minlength=size)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_a_token_follows_the_softmax_at_any_temperature(temperature: float) -> None:
    logits = np.random.RandomState(3).standard_normal(64).astype(np.float32) * 2
    count = 20_000
    observed = _first_tokens(mx.array(logits), SamplingParams(temperature=temperature), count)
    assert _p_value(observed, count * _softmax(logits / temperature)) > 1e-4
    assert _p_value(observed, count * _softmax(logits / (temperature * 1.1))) < 1e-6


@pytest.mark.parametrize(
    "params, kept",
    [
        (SamplingParams(temperature=1.0, top_k=3), [0, 1, 2]),
        (SamplingParams(temperature=1.0, top_p=0.75), [0, 1, 2]),  # .4 .3 .2 .08 .02
        (SamplingParams(temperature=1.0, min_p=0.3), [0, 1, 2]),
        (SamplingParams(temperature=1.0, top_p=0.05), [0]),
        (SamplingParams(temperature=1.0, top_k=4, top_p=0.95, min_p=0.4), [0, 1, 2]),
    ],
)
def test_filters_keep_what_they_say(params: SamplingParams, kept: list[int]) -> None:
    probs = np.array([0.4, 0.3, 0.2, 0.08, 0.02])
    observed = _first_tokens(mx.array(np.log(probs).astype(np.float32)), params, 4000)
    assert np.flatnonzero(observed).tolist() == kept
    if len(kept) > 1:
        assert _p_value(observed[kept], 4000 * probs[kept] / probs[kept].sum()) > 1e-4


def test_noise_is_keyed_by_seed_and_position_only() -> None:
    params = [SamplingParams(temperature=1.0), SamplingParams(), SamplingParams(temperature=2.0)]
    batch = batch_sampling(params, [5, 6, 7])
    positions = mx.array([[3, 4], [10, 11], [4, 5]])
    noise = gumbel(batch, positions, 1001)
    assert noise is not None and bool(mx.isfinite(noise).all())
    for row, seed in enumerate([5, 6, 7]):
        alone = gumbel(batch_sampling(params[:1], [seed]), positions[row : row + 1, 1:], 1001)
        assert mx.array_equal(alone[0, 0], noise[row, 1])  # type: ignore[index]
    assert not mx.array_equal(noise[0, 1], noise[2, 0])  # same position, another seed
    assert not mx.array_equal(noise[0, 0], noise[0, 1])  # same seed, another position


def test_greedy_rows_are_greedy_in_any_company() -> None:
    logits = mx.random.normal((2, 3, 50), key=mx.random.key(0))
    mixed = batch_sampling([SamplingParams(), SamplingParams(temperature=1.0, top_k=2)], [1, 2])
    noise = gumbel(mixed, mx.zeros((2, 3), mx.int32), 50)
    assert mx.array_equal(draw(logits, noise, mixed)[0], mx.argmax(logits[0], axis=-1))
