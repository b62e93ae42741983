"""Measuring a pair: tokens and counts are the session's own, and the pair stays as it was."""

import pytest

from gemma_mtp_mlx import Pair, SamplingParams, hub, load, machine, measure, prompt_kinds
from gemma_mtp_mlx.measure import Spread
from gemma_mtp_mlx.report import Totals

TOKENS = 12
ROWS = 2


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load(hub.builtin())


@pytest.fixture(scope="module")
def measured(pair: Pair) -> measure.Measured:
    return measure.measure(
        pair,
        "chat",
        ROWS,
        (0, 3, None),
        max_tokens=TOKENS,
        repeats=2,
    )


def test_counts_are_the_session_s_own(pair: Pair, measured: measure.Measured) -> None:
    ids = prompt_kinds.encode("chat", pair.prompts)[:ROWS]
    assert measured.prompt_tokens == tuple(map(len, ids))
    for speed in measured.speeds[:2]:
        params = SamplingParams(max_tokens=TOKENS)
        results = pair.endless().generate_batch(ids, params, num_draft_tokens=speed.depth)
        stats = [result.stats for result in results]
        assert speed.rounds == sum(each.draft_rounds for each in stats)
        assert speed.drafted == sum(each.draft_n for each in stats)
        assert speed.accepted == sum(each.draft_n_accepted for each in stats)
        for place, count in enumerate(speed.accepted_per_position):
            kept = [each.accepted_per_position[place : place + 1] for each in stats]
            assert count == sum(sum(found) for found in kept)
        assert speed.tokens_per_round == ROWS * (TOKENS - 1) / speed.rounds
    assert measured.speeds[0].tokens_per_round == 1.0
    assert measured.speeds[1].accepted > 0


def test_every_depth_has_the_same_tokens(measured: measure.Measured) -> None:
    assert [speed.depth for speed in measured.speeds] == [0, 3, None]
    assert [speed.first_difference for speed in measured.speeds] == [None, None, None]


def test_ratios_are_taken_within_a_repeat_and_depths_in_turn(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[int | None, int]] = []
    speeds = {0: iter([1.0, 10.0, 20.0, 30.0]), 3: iter([9.0, 10.0, 40.0, 90.0])}

    def run(endless: Pair, ids: list[list[int]], depth: int, max_tokens: int) -> measure._Run:
        order.append((depth, max_tokens))
        other = 2 if depth and len(order) == 5 else None  # the second repeat's, in its second row
        tokens = [[5] * max_tokens, [-1 if i == other else 5 for i in range(max_tokens)]]
        totals = Totals(requests=2, tokens=2 * max_tokens, rounds=max_tokens)
        return measure._Run(tokens, next(speeds[depth]), 1.0, totals)

    monkeypatch.setattr(measure, "_run", run)
    steps: list[tuple[int, int]] = []
    found = measure.measure(
        pair,
        "chat",
        2,
        (0, 3),
        max_tokens=40,
        repeats=3,
        progress=lambda done, total: steps.append((done, total)),
    )
    total = 2 * 2 * (32 + 3 * 40)
    assert steps == [(done, total) for done in (64, 128, 208, 288, 368, 448, 528, 608)]
    assert [depth for depth, _ in order] == [3, 0, 0, 3, 3, 0, 0, 3]
    assert [length for _, length in order] == [32] * 2 + [40] * 6
    plain, drafted = found.speeds
    assert plain.tokens_per_s == Spread(20.0, 10.0, 30.0)
    assert drafted.tokens_per_s == Spread(40.0, 10.0, 90.0)
    assert drafted.ratio == Spread(2.0, 1.0, 3.0)
    assert (plain.first_difference, drafted.first_difference) == (None, 2)


def test_no_row_ends_early_and_the_pair_stays_as_it_was(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt_kinds.encode("chat", pair.prompts)[0]
    first = pair.generate(ids, SamplingParams(max_tokens=1)).tokens[0]
    monkeypatch.setattr(pair.prompts, "eos", frozenset([first]))
    believed = pair._depth.state()
    found = measure.measure(pair, "chat", 1, (0, None), max_tokens=TOKENS, repeats=1)
    assert found.speeds[0].rounds == TOKENS - 1
    assert pair._depth.state() == believed
    assert pair.generate(ids, SamplingParams(max_tokens=TOKENS)).finish_reason == "stop"
    assert pair.tokenizer is not None and pair.prompts.eos == {first}


def test_a_pair_without_a_drafter_has_one_depth(pair: Pair) -> None:
    plain = load(hub.builtin(), None)
    with pytest.raises(ValueError, match="no drafter; only depth 0"):
        measure.measure(plain, "chat", 1, (0, 2))
    found = measure.measure(plain, "chat", 1, (0,), max_tokens=2, repeats=1)
    assert found.speeds[0].ratio == Spread(1.0, 1.0, 1.0)
    assert found.speeds[0].peak_memory_bytes > 0


@pytest.mark.parametrize(
    "rows, more, says",
    [
        (9, {}, "there are 8 prompts of each kind; give 1 to 8"),
        (0, {}, "cannot measure 0 rows"),
        (1, {"max_tokens": 10**6}, "context is"),
        (1, {"max_tokens": 1}, "cannot measure 1 tokens"),
        (1, {"repeats": 0}, "one repeat"),
        (1, {"depths": ()}, "one depth"),
        (1, {"depths": (0, 16)}, "between 0 and 15"),
    ],
)
def test_what_cannot_be_measured_is_said(pair: Pair, rows: int, more: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        measure.measure(pair, "chat", rows, **more)


def test_a_mac_says_how_many_cores_its_gpu_has() -> None:
    assert machine.gpu_cores('  | |   "gpu-core-count" = 40\n  | |   "model" = "x"') == 40
    assert machine.gpu_cores("") is None


def test_a_machine_in_words() -> None:
    here = machine.facts()
    assert here.cores >= 1 and here.memory_gb > 0.1 and here.processor
    assert not here.apple_gpu and "MLX on the CPU" in here.line()
    assert set(machine.versions()) == {"mlx-gemma-mtp", "mlx", "mlx-lm"}
