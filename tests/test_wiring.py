"""What a wrong drafter input, a copied cache or a needless wait cannot survive.

A drafter's inputs never change the output, so equality of tokens says nothing about them: what it
gets must be what the text gives when it is computed anew (wiring.py), and a pair whose acceptance
is known must reach it (test_builtin.py).
"""

from collections.abc import Callable
from itertools import cycle

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx import Pair, SamplingParams, hub, load, wiring
from gemma_mtp_mlx.cache import Cache, Seat
from gemma_mtp_mlx.drafter import Draw, Embed
from gemma_mtp_mlx.readers import SharedKV
from gemma_mtp_mlx.round import DecodeState, Models, build_round, settings_of
from tests import faults
from tests.checkpoints import FAMILIES
from tests.conftest import LoadPair
from tests.doubles import ScriptedDrafter, run


def check(pair: Pair) -> wiring.Wiring:
    """Check a pair's wiring with random prompts, one of them past the window."""
    config, draws = pair.target.config, np.random.RandomState(1)
    lengths = config.sliding_window + 20, 11
    prompts = [draws.randint(6, config.vocab_size, n).tolist() for n in lengths]
    return wiring.check(Models(pair.target, pair.drafter), prompts)


@pytest.mark.parametrize(
    "family, dtype", [*((family, "float32") for family in FAMILIES), ("26b", "bfloat16")]
)
def test_rounds_hand_the_drafter_what_the_text_gives(
    tiny_pair: LoadPair, family: str, dtype: str
) -> None:
    found = check(tiny_pair(family, dtype))
    assert [finding.problem for finding in found.findings] == [None] * len(wiring.ORDER)
    assert all(finding.compared >= 12 for finding in found.findings)
    assert found.past_window
    if dtype == "float32":
        assert found.tolerance == wiring.LEAST


def test_the_built_in_pair_is_wired_right() -> None:
    found = check(load(hub.builtin()))
    assert found.problem is None and found.tolerance < 0.3


@pytest.mark.parametrize("fault, family", list(zip(faults.FAULTS, cycle(FAMILIES))))
def test_a_wrong_input_is_found_and_named(
    tiny_pair: LoadPair,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    family: str,
) -> None:
    fault(monkeypatch)
    found = check(tiny_pair(family))
    problems = [finding.problem for finding in found.findings if finding.problem is not None]
    assert len(problems) == 1 and faults.FAULTS[fault] in problems[0]


@pytest.mark.parametrize("family", ["26b", "e4b"])
@pytest.mark.parametrize("fault", [faults.hidden_of_another_position, faults.position_before])
def test_a_wrong_input_is_found_in_bfloat16(
    tiny_pair: LoadPair,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    family: str,
) -> None:
    fault(monkeypatch)
    problem = check(tiny_pair(family, "bfloat16")).problem
    assert problem is not None and faults.FAULTS[fault] in problem


class Watch(ScriptedDrafter):
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
    witness = Watch(texts, 0.6, pair.target.config.vocab_size)
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
