"""What a wrong drafter input, a copied cache or a needless wait cannot survive.

A drafter's inputs never change the output, so equality of tokens says nothing about them: the
hidden state it gets must be the one that the bonus token came from, and a pair whose acceptance
is known must reach it (test_builtin.py).
"""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx import SamplingParams
from gemma_mtp_mlx.cache import Cache, Seat
from gemma_mtp_mlx.drafter import Draw, Embed
from gemma_mtp_mlx.readers import SharedKV
from gemma_mtp_mlx.round import DecodeState, Models, build_round, settings_of
from tests.checkpoints import FAMILIES
from tests.conftest import LoadPair
from tests.doubles import ScriptedDrafter, run


class Witness(ScriptedDrafter):
    """Keeps the state each round hands to the drafter."""

    seen: list[tuple[mx.array, mx.array]]

    def draft(
        self, tokens: mx.array, hidden: mx.array, shared: SharedKV, embed: Embed, draw: Draw, k: int
    ) -> mx.array:
        self.seen.append((tokens, hidden))
        return super().draft(tokens, hidden, shared, embed, draw, k)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bonus_token_comes_from_the_hidden_state_beside_it(
    tiny_pair: LoadPair, family: str
) -> None:
    pair = tiny_pair(family)
    prompts, params = [[7, 8, 9], [50] * 30], [SamplingParams(max_tokens=24)] * 2
    plain = run(Models(pair.target, None), prompts, params, 0)
    texts = [p + r.tokens for p, r in zip(prompts, plain.requests, strict=True)]
    witness = Witness(texts, 0.6, pair.target.config.vocab_size)
    witness.seen = []
    run(Models(pair.target, witness), prompts, params, 4)  # type: ignore[arg-type]
    assert len(witness.seen) > 5
    for tokens, hidden in witness.seen:
        assert mx.array_equal(mx.argmax(pair.target.logits(hidden), axis=-1), tokens)


def test_one_wait_per_round(tiny_pair: LoadPair) -> None:
    pair = tiny_pair("31b")
    params = [SamplingParams(max_tokens=30)] * 3
    engine = run(Models(pair.target, pair.drafter), [[7], [8, 9], [10] * 20], params, 4)
    rounds = max(request.stats.draft_rounds for request in engine.requests)
    assert engine.syncs == rounds + 1  # and one for the first tokens


@pytest.mark.parametrize("k", [0, 4])
def test_rounds_copy_no_cache(tiny_pair: LoadPair, k: int) -> None:
    """200 rounds over a long cache take less extra memory than one layer's keys."""
    pair, length = tiny_pair("e4b"), 8_000
    cache = Cache(pair.target.config, 1, length + 4000, mx.float32)
    seat = Seat(start=0, size=length + 4000, slot=0)
    layer = pair.target.config.last_owner(sliding=False).index
    state = DecodeState(
        mx.array([7]), mx.zeros((1, 128)), mx.array([length]), mx.zeros((1, 0), mx.int32)
    )
    settings = settings_of([SamplingParams()], [0], pair.target.config.vocab_size)
    models, known = Models(pair.target, pair.drafter), length
    mx.reset_peak_memory()
    baseline = mx.get_active_memory()
    for _ in range(200):
        rows = cache.rows([seat], state.lengths, [known])
        done = build_round(models, cache, rows, state, settings, k)
        mx.eval(done.report, *done.state)
        known += int(np.array(done.report)[0, k + 1]) + 1
        cache.commit(done.blocks, done.rows)
        state = done.state
        del done, rows
    assert mx.get_peak_memory() - baseline < cache.storage[layer].nbytes / 2
