"""Models whose scales are of other dtypes than their activations: what keeps which, and values.

MLX's operations promote where bfloat16 meets float16 or float32, and what is promoted stays so to
the end of a pass: the dtype of what leaves it, and of its keys and values, tells about all between.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx import Pair, SamplingParams
from gemma_mtp_mlx.cache import Cache, Rows
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.readers import PromptReader, SharedKV, VerifyReader
from gemma_mtp_mlx.target import Target
from tests import passes
from tests.quantised import HALF, MIXTURE, decoded, quantised_pair

CASES = [("e4b", MIXTURE), ("12b", HALF), ("26b", MIXTURE)]
# MLX's CPU adds the products of bfloat16 scales in bfloat16: none where values are looked at.
WIDE = (mx.float16, mx.float32)
TOKENS = [i * 37 % 128 for i in range(1, 25)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, scales = request.param
    return quantised_pair(tmp_path_factory.mktemp(family), family, scales)


@pytest.fixture(scope="module", params=["e4b", "12b", "26b"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return quantised_pair(tmp_path_factory.mktemp(request.param), request.param, WIDE)


def test_a_verify_pass_keeps_the_dtype(pair: Pair) -> None:
    target, cache, rows = _committed(pair)
    reader = VerifyReader(cache, rows, 4)
    hidden = target.verify(mx.array([TOKENS[:4]]), reader)
    assert {x.dtype for x in (hidden, *reader.blocks.values())} == {mx.bfloat16}
    assert len(reader.blocks) == target.config.num_owning_layers
    assert target.logits(hidden).dtype == mx.float32


def test_prefill_keeps_the_dtype(pair: Pair) -> None:
    target, cache, _ = _committed(pair)
    reader = PromptReader(cache, passes.SEAT, 0, len(TOKENS))
    hidden = target.prefill(mx.array([TOKENS]), reader, last=True)
    assert hidden is not None
    assert {x.dtype for x in (hidden, *reader.blocks.values())} == {mx.bfloat16}


def test_a_draft_step_keeps_the_dtype(pair: Pair) -> None:
    assert pair.drafter is not None
    target, cache, rows = _committed(pair)
    fed = target.embed(mx.array([[5]]), mx.zeros((1, 1, target.config.hidden_size), mx.bfloat16))
    h, back = pair.drafter.step(fed, SharedKV(cache, rows))
    assert fed.dtype == h.dtype == back.dtype == mx.bfloat16
    assert pair.drafter.candidates(h).logits.dtype == mx.float32


def _committed(pair: Pair) -> tuple[Target, Cache, Rows]:
    """The target, and a cache and its rows that hold a prompt."""
    _, _, cache = passes.prefill(pair.target, TOKENS, 16)
    assert {x.dtype for x in cache.storage.values()} == {mx.bfloat16}
    return pair.target, cache, cache.rows([passes.SEAT], mx.array([len(TOKENS)]), [len(TOKENS)])


def _check(pair: Pair, run: Callable[[Target, Drafter], Sequence[np.ndarray]]) -> None:
    """No further from float32 than twice what the same weights, rounded to bfloat16, are."""
    assert pair.drafter is not None
    models = (pair.target, pair.drafter)
    exact, plain = (
        run(decoded(pair.target, dtype), decoded(pair.drafter, dtype))
        for dtype in (mx.float32, mx.bfloat16)
    )
    for found, right, other in zip(run(*models), exact, plain, strict=True):
        assert np.abs(found - right).max() <= 2 * np.abs(other - right).max()


def test_a_verify_pass_is_as_exact_as_in_bfloat16(wide: Pair) -> None:
    _check(wide, lambda target, _: passes.verify(target, TOKENS, 5))


def test_prefill_is_as_exact_as_in_bfloat16(wide: Pair) -> None:
    _check(wide, lambda target, _: passes.prefill(target, TOKENS, 16)[:2])


def test_drafts_are_as_exact_as_in_bfloat16(wide: Pair) -> None:
    """On the same keys and values; a clustered head's choice of clusters may hang on rounding."""
    hidden, _, cache = passes.prefill(wide.target, TOKENS, 16)
    shared = passes.committed(cache, len(TOKENS))
    ordered = wide.drafter is not None and wide.drafter.config.use_ordered_embeddings

    def run(target: Target, drafter: Drafter) -> Sequence[np.ndarray]:
        logits, states = passes.draft(target, drafter, shared, hidden, [5, 9, 11])
        return [states] if ordered else [logits, states]

    _check(wide, run)


def test_a_text_is_the_same_at_any_depth(pair: Pair) -> None:
    settings = [SamplingParams(max_tokens=8), SamplingParams(max_tokens=8, temperature=1, seed=3)]
    prompts = [[7, 8, 9], [50] * 30]
    plain, drafted = (
        [r.tokens for r in pair.generate_batch(prompts, settings, num_draft_tokens=k)]
        for k in (0, 4)
    )
    assert drafted == plain
    for prompt, params, tokens in zip(prompts, settings, plain, strict=True):
        assert pair.generate(prompt, params, num_draft_tokens=4).tokens == tokens
