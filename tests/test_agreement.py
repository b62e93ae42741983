"""What the doctor measures of drafts is what any rounds give, and chance what shuffling gives."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx import SamplingParams, agreement, hub, load, memory
from gemma_mtp_mlx.agreement import Agreement, Kept
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import Models
from tests.conftest import LoadPair


def test_watching_changes_nothing() -> None:
    pair = load(hub.builtin())
    prompts = {
        "list": pair.encode("def first(items):\n    return", template=False),
        "loop": pair.encode("for name in names:\n    print(name)\nfor", template=False),
    }
    found = agreement.measure(Models(pair.target, pair.drafter), prompts)
    params = SamplingParams(max_tokens=agreement.TOKENS)
    results = pair.endless().generate_batch(
        list(prompts.values()), params, num_draft_tokens=agreement.K
    )
    assert any(0 < kept.share < 1 for kept in found.kinds)
    for kept, result in zip(found.kinds, results, strict=True):
        assert kept.rounds == result.stats.draft_rounds
        assert list(kept.by_position) == result.stats.accepted_per_position
        assert kept.share == pytest.approx(result.stats.acceptance_rate, abs=0.05)


def test_chance_is_what_shuffled_drafts_would_agree() -> None:
    draws = np.random.RandomState(0)
    said, drafted = draws.choice(5, 400, p=[0.5, 0.2, 0.1, 0.1, 0.1]), draws.choice(5, 400)
    agreed = [np.mean(draws.permutation(drafted) == said) for _ in range(300)]
    chance = agreement._chance(drafted.tolist(), said.tolist())
    assert np.mean(agreed) == pytest.approx(chance, abs=0.01)


@pytest.mark.parametrize("first, by_chance", [(0, True), (4, True), (20, False)])
def test_what_chance_explains(first: int, by_chance: bool) -> None:
    found = Agreement((Kept("code", 100, (first, 0, 0, 0)),), 0.03, 0.5, 0.5, 0.5)
    assert found.by_chance == by_chance


def test_kinds_wait_for_each_other_where_memory_is_short(
    tiny_pair: LoadPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = tiny_pair("31b")
    requests = [Request([7] * 3000, SamplingParams(max_tokens=32), frozenset()) for _ in range(5)]
    limits = agreement._limits(pair.target, requests)
    assert limits.max_batch == 5
    one = memory.plan(pair.target.config, mx.float32, memory.Limits(1, positions=3100))
    assert one.positions == 3100
    needed = 2.5 * 3100 * memory.position_bytes(pair.target.config, mx.float32)
    left = mx.get_active_memory() + memory.RESERVED + int(needed)
    monkeypatch.setattr(memory, "device_bytes", lambda: left)
    assert agreement._limits(pair.target, requests).max_batch == 2
