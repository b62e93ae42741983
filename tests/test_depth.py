"""The depth controller on a clock that is not real: close to an oracle, never slower than plain."""

import dataclasses
import json
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from bench import regret as regret_bench
from gemma_mtp_mlx.config import DrafterConfig, ModelConfig
from gemma_mtp_mlx.costs import Costs, Prior, prior_for
from gemma_mtp_mlx.depth import AutoDepth, DepthState, FixedDepth
from tests.clock import (
    ACCEPTANCE,
    CHIPS,
    COSTS,
    MODELS,
    MOST,
    Drive,
    Noise,
    Segment,
    best_depth,
    drive,
    linear,
    rate,
    roofline,
    tokens_per_row,
    verify_ms,
)

DENSE = Prior(17.27, 0.24)
MOE = Prior(1.34, 0.24, 0.1004, 128, 8)
SETTLED = 100  # rounds after which regret counts
ROUNDS = 300
LEARNING = 80  # rounds whose losses are counted in plain ones
REGRET, SLOWER = 0.03, 0.01  # the bounds, and the share of runs that chance may take past one
MISSES = 0.03
ONE_BY_ONE = ["31B M4 Max, roofline", "26B-A4B M4 Max, roofline", "stock M3 Max"]


def prior(cost: str) -> Prior:
    return MOE if "26B" in cost else DENSE


@cache
def steady(cost: str, text: str, rows: int, seed: int) -> Drive:
    """Return a run with nothing changing."""
    segments = [Segment(ROUNDS, ACCEPTANCE[text], (rows,))]
    return drive(AutoDepth(prior(cost)), COSTS[cost], segments, seed=seed)


@cache
def all_steady() -> dict[tuple[str, str, int, int], Drive]:
    """Return two runs for every published curve, with texts and batch sizes in turn."""
    runs = {}
    texts = list(ACCEPTANCE)
    for number, cost in enumerate(COSTS):
        for step in (0, 1, 2):
            text, rows = texts[(number + 3 * step) % len(texts)], (1, 4, 8)[step]
            for seed in (0, 1):
                runs[cost, text, rows, seed] = steady(cost, text, rows, seed)
    return runs


def worst(figures: dict[tuple[str, str, int, int], float]) -> str:
    ranked = sorted(figures.items(), key=lambda item: -item[1])
    return ", ".join(f"{name}: {value:.3f}" for name, value in ranked[:5])


def test_regret_against_the_best_fixed_depth() -> None:
    """At most 3 %, but for the runs that `python -m bench.regret` counts: about one in 60."""
    regret = {name: run.regret(SETTLED) for name, run in all_steady().items()}
    assert sum(regret.values()) / len(regret) <= 0.007
    assert sum(value > REGRET for value in regret.values()) <= MISSES * len(regret), worst(regret)
    assert max(regret.values()) <= 0.06, worst(regret)


def test_never_slower_than_plain_once_settled() -> None:
    """By 1 % at most, but for one run in a hundred, and by 2 % then."""
    slower = {name: run.slower_than_plain(SETTLED) for name, run in all_steady().items()}
    assert sum(value > SLOWER for value in slower.values()) <= MISSES * len(slower), worst(slower)
    assert max(slower.values()) <= 0.02, worst(slower)
    plain = [v for (c, t, b, _), v in slower.items() if not best_depth(COSTS[c], ACCEPTANCE[t], b)]
    assert sum(plain) / len(plain) <= 0.007 and len(plain) >= 20
    assert min(slower.values()) < -0.7  # and it is not plain decoding


def test_a_short_run_is_not_spent_on_learning() -> None:
    """The built-in pair on a CPU, 192 tokens a row, against the best fixed depth from the start."""
    lost: dict[str, list[float]] = {}
    for name, regret, _ in regret_bench.short(0):
        lost.setdefault(name, []).append(regret)
    for name, values in lost.items():
        assert sum(values) / len(values) <= (0.05 if "1 rows" in name else REGRET), name


def test_learning_costs_a_few_plain_rounds() -> None:
    lost = {
        name: run.slower_than_plain(0, LEARNING)
        * sum(run.plain_ms[:LEARNING])
        / cost_of_plain(name)
        for name, run in all_steady().items()
    }
    assert max(lost.values()) <= 12, worst(lost)


def cost_of_plain(name: tuple[str, str, int, int]) -> float:
    return COSTS[name[0]](name[2], 0)


@pytest.mark.parametrize(
    "cost, rows, before, after, within",
    [
        ("31B M4 Max, roofline", 1, "JSON .08", "code .92, falling", 20),
        ("31B M4 Max, roofline", 4, "code .92, falling", "JSON .08", 20),
        ("31B M4 Max, roofline", 4, ".88", "prose .49", 20),
        ("26B-A4B M4 Max, roofline", 1, "code .92, falling", "JSON .08", 20),
        ("26B-A4B M4 Max, roofline", 4, "code .92, falling", "JSON .08", 20),
        # Out of plain decoding the budget for tries decides how soon it is noticed.
        ("26B-A4B M4 Max, roofline", 1, "JSON .08", "code .92, falling", 110),
        ("26B-A4B M4 Max, roofline", 4, "JSON .08", "code .92, falling", 110),
        ("stock M3 Max", 1, "JSON .08", "code .92, falling", 40),
    ],
)
def test_a_change_of_text_is_followed(
    cost: str, rows: int, before: str, after: str, within: int
) -> None:
    """In at least nine runs of ten; which of the last rounds bring luck differs by seed."""
    shift, seeds, late = 120, 10, 0
    for seed in range(seeds):
        segments = [Segment(shift, ACCEPTANCE[t], (rows,)) for t in (before, after)]
        segments[1] = dataclasses.replace(segments[1], rounds=within + 60)
        run = drive(AutoDepth(prior(cost)), COSTS[cost], segments, seed=seed)
        # What was saved up for tries is spent at once: some plain rounds, beside 1 % of the time.
        plain_ms = sum(run.plain_ms[shift + within :])
        lost = run.slower_than_plain(shift + within) * plain_ms
        slow = lost > SLOWER * plain_ms + 2 * COSTS[cost](rows, 0)
        late += slow or run.regret(shift + within) > 0.05
    assert late <= seeds / 10


@pytest.mark.parametrize("cost", ["31B M5 Max, roofline", "26B-A4B M4 Max, roofline"])
@pytest.mark.parametrize("text", ["JSON .08", ".88"])
def test_a_changing_batch_shares_what_was_learnt(cost: str, text: str) -> None:
    turns = [rows for rows in (4, 4, 6, 5, 7, 8, 3, 2) for _ in range(5)]
    run = drive(AutoDepth(prior(cost)), COSTS[cost], [Segment(280, ACCEPTANCE[text], turns)])
    assert run.regret(100) <= 0.03
    assert run.slower_than_plain(100) <= 0.01


def test_a_new_batch_size_starts_from_its_neighbours() -> None:
    """After 4 and 6 rows, the first rounds at 5 are better than rounds from nothing."""
    cost, text = COSTS["26B-A4B M4 Max, roofline"], ACCEPTANCE[".88"]
    new = Segment(12, text, (5,))
    run = drive(AutoDepth(MOE), cost, [Segment(120, text, (4,)), Segment(120, text, (6,)), new])
    alone = drive(AutoDepth(MOE), cost, [new])
    assert run.regret(240) <= 0.08
    assert run.regret(240) <= alone.regret(0) / 1.5
    assert run.k[240:].count(0) <= 2


def test_a_batch_size_that_never_ran_is_believed_from_its_neighbours() -> None:
    """Rounds of 4 and 6 rows that cost far more per draft than the prior says, none of 5."""
    costs = Costs(Prior(fixed_bytes=1e9, drafter_bytes=1e7))

    def seconds(rows: int, k: int) -> float:
        return 0.02 * rows**0.5 * (1 + 0.6 * k)

    for _ in range(10):
        for rows in (4, 6):
            for k in (0, 2, 5):
                costs.observe(rows, k, seconds(rows, k))
    believed, spread = costs.believed(5)
    for k in (0, 2, 5):
        assert abs(believed[k] - math.log(seconds(5, k))) < 0.1, k
        assert spread[k, k] ** 0.5 < 0.3


@pytest.mark.parametrize("cost", ONE_BY_ONE)
@pytest.mark.parametrize("text", ["JSON .08", ".75", ".95"])
def test_it_does_not_flap(cost: str, text: str) -> None:
    """The settled depth changes rarely, and few rounds run at another."""
    depth = AutoDepth(prior(cost))
    run = drive(depth, COSTS[cost], [Segment(100, ACCEPTANCE[text], (4,))])
    early = depth.state().switches
    more = drive(depth, COSTS[cost], [Segment(200, ACCEPTANCE[text], (4,))], seed=1)
    assert early <= 15
    assert depth.state().switches - early <= 8
    settled = max(set(more.k), key=more.k.count)
    assert more.k.count(settled) >= 75
    assert len(run.k) == 100


def test_the_same_reports_give_the_same_depths() -> None:
    def run() -> list[int]:
        segments = [Segment(80, ACCEPTANCE["chat, falling"], (1, 4, 4))]
        return drive(AutoDepth(MOE), COSTS["26B M5, oMLX"], segments, seed=3).k

    assert run() == run()


@pytest.mark.parametrize("cost", ONE_BY_ONE)
def test_outliers_are_seen_through(cost: str) -> None:
    """One round in twelve takes five times as long."""
    noise = Noise(outliers=1 / 12)
    segments = [Segment(ROUNDS, ACCEPTANCE[".88"], (1,))]
    run = drive(AutoDepth(prior(cost)), COSTS[cost], segments, noise, seed=2)
    assert run.regret(SETTLED) <= 0.03


def test_tries_stay_inside_their_budget() -> None:
    """At K = 0 for good: what is lost to plain is the start's allowance and 1 % of the time."""
    depth = AutoDepth(MOE)
    cost, text = COSTS["26B M5, oMLX"], ACCEPTANCE["JSON .08"]
    run = drive(depth, cost, [Segment(600, text, (1,))])
    assert run.slower_than_plain(SETTLED) <= 0.01
    assert set(run.k[SETTLED:]) == {0, 1}  # it goes on listening
    assert run.k[SETTLED:].count(1) >= 5
    tries = sum(k != 0 for k in run.k)
    assert depth.state().probes <= tries
    assert 0 < depth.state().probe_share <= 0.02


def test_the_state_says_what_happened() -> None:
    depth = AutoDepth(DENSE)
    cost, text = COSTS["31B M1 Max, roofline"], ACCEPTANCE["code .92, falling"]
    noise = Noise(outliers=0)
    run = drive(depth, cost, [Segment(200, text, (4,)), Segment(200, text, (1,))], noise)
    state = depth.state()
    assert state.rounds == 400
    last = run.k[-50:]
    assert set(state.depth) == {1, 4} and state.depth[1] == max(set(last), key=last.count)
    assert state.acceptance[0] == pytest.approx(0.92, abs=0.05)
    assert state.acceptance[1] == pytest.approx(0.85, abs=0.08)
    assert set(state.ms[4]) == {k for rows, k in zip(run.rows, run.k, strict=True) if rows == 4}
    for rows in (1, 4):
        k = state.depth[rows]
        assert state.ms[rows][k] == pytest.approx(cost(rows, k), rel=0.03)
    again = json.loads(json.dumps(dataclasses.asdict(state)))
    assert again["rounds"] == 400 and again["ms"]["4"]


def test_a_row_at_its_limit_says_at_least() -> None:
    """Rows that may take two drafts only and always take both have said nothing about the third."""
    told, untold = AutoDepth(DENSE), AutoDepth(DENSE)
    for _ in range(60):
        told.observe(2, 4, 0.03, [2, 2])
        untold.observe(2, 4, 0.03, [2, 2], [2, 2])
    assert told.state().acceptance[2] < 0.1
    assert untold.state().acceptance[2] > 0.7
    untold.observe(1, 4, 0.03, [0], [0])  # a row that may take none says nothing at all


def test_the_most_is_kept_and_depth_0_is_always_open() -> None:
    run = drive(AutoDepth(DENSE, most=3), linear(0.83, 0.17), [Segment(60, [0.95] * MOST, (1,))])
    assert max(run.k) == 3
    assert drive(AutoDepth(DENSE, most=0), linear(1, 1), [Segment(5, [0.9] * MOST)]).k == [0] * 5
    with pytest.raises(ValueError, match="0 to 15"):
        AutoDepth(DENSE, most=16)


def test_a_fixed_depth_stays_and_reports() -> None:
    depth = FixedDepth(3)
    run = drive(depth, linear(1, 0.1), [Segment(40, [0.75] * MOST, (4,))], Noise(outliers=0))
    assert set(run.k) == {3}
    state = depth.state()
    assert (state.depth, state.rounds, state.switches) == ({4: 3}, 40, 0)
    assert len(state.acceptance) == 3 and state.acceptance[0] == pytest.approx(0.75, abs=0.15)
    assert state.ms[4][3] == pytest.approx(linear(1, 0.1)(4, 3), rel=0.05)
    with pytest.raises(ValueError, match="0 to 15"):
        FixedDepth(-1)
    assert isinstance(state, DepthState)


@pytest.mark.parametrize(
    "model, rows, k, ms",
    [  # milliseconds at 1k context on M1 Max, M2 Ultra, M3 Max, M4 Max, M5 Max, worked out before
        ("E4B", 1, 0, (7.9, 3.9, 7.9, 5.8, 5.1)),
        ("E4B", 1, 7, (9.3, 3.9, 7.9, 5.8, 5.1)),
        ("E4B", 4, 3, (18.6, 7.1, 13.6, 10.5, 5.5)),
        ("E4B", 8, 7, (74.2, 28.4, 54.4, 42.0, 12.1)),
        ("26B-A4B", 1, 0, (7.0, 3.5, 7.0, 5.1, 4.5)),
        ("26B-A4B", 1, 3, (13.2, 6.6, 13.2, 9.7, 8.6)),
        ("26B-A4B", 4, 0, (15.3, 7.6, 15.3, 11.2, 9.9)),
        ("26B-A4B", 4, 3, (31.0, 15.5, 31.0, 22.7, 20.2)),
        ("26B-A4B", 8, 0, (24.6, 12.3, 24.6, 18.0, 16.0)),
        ("26B-A4B", 8, 3, (42.4, 21.2, 42.4, 31.0, 27.6)),
        ("26B-A4B", 8, 7, (60.9, 23.3, 46.5, 34.4, 30.3)),
        ("31B", 1, 0, (53.5, 26.7, 53.5, 39.2, 34.9)),
        ("31B", 1, 7, (61.3, 26.7, 53.5, 39.2, 34.9)),
        ("31B", 4, 3, (122.7, 46.9, 89.8, 69.3, 40.2)),
        ("31B", 8, 0, (72.5, 36.2, 72.5, 53.1, 47.2)),
        ("31B", 8, 3, (245, 93.8, 180, 139, 47.2)),
    ],
)
def test_the_roofline_is_the_published_one(
    model: str, rows: int, k: int, ms: Sequence[float]
) -> None:
    for chip, expected in zip(CHIPS.values(), ms, strict=True):
        assert verify_ms(chip, MODELS[model], rows, k) == pytest.approx(expected, rel=0.02)


def test_the_oracle_is_the_best_fixed_depth() -> None:
    cost, text = roofline("M4 Max", "31B"), [0.75] * MOST
    best = best_depth(cost, text, 4)
    rates = [drive(FixedDepth(k), cost, [Segment(3, text, (4,))]).regret(0) for k in range(16)]
    assert rates[best] == pytest.approx(0) and min(rates) >= -1e-9
    assert rate(cost, text, 4, best) > rate(cost, text, 4, 0)
    assert tokens_per_row(text, 2) == pytest.approx(1 + 0.75 + 0.75**2)


def test_the_prior_follows_bytes() -> None:
    assert DENSE.cost(1, 0) == 1
    assert DENSE.cost(4, 3) < 2.5 < MOE.cost(4, 3)
    # 8, then 29.1 distinct experts for 1 and 4 tokens: 2.14 and 4.26 GB
    experts = dataclasses.replace(MOE, token_cost=0, drafter_bytes=0)
    assert experts.cost(1, 3) == pytest.approx(4.26 / 2.14, rel=0.01)
    assert math.isclose(
        MOE.cost(1, 2) - experts.cost(1, 2), 2 * (0.24 / 2.143 + 0.07), rel_tol=0.01
    )


def text_config(
    hidden: int, layers: int, heads: int, kv: int, full_kv: int, mlp: int
) -> dict[str, Any]:
    return {
        "model_type": "gemma4_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_global_key_value_heads": full_kv,
        "attention_k_eq_v": True,
        "intermediate_size": mlp,
        "hidden_size_per_layer_input": 0,
    }


def test_the_prior_of_published_models() -> None:
    """Bytes in 4 bits, against sizes counted from the published configurations."""
    dense = ModelConfig.from_dict(text_config(5376, 60, 32, 16, 4, 21504))
    experts = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    moe = text_config(2816, 30, 16, 8, 2, 2112) | experts | {"enable_moe_block": True}
    drafter = DrafterConfig.from_dict(
        {
            "model_type": "gemma4_assistant",
            "backbone_hidden_size": 5376,
            "text_config": text_config(1024, 4, 32, 16, 4, 8192) | {"num_kv_shared_layers": 4},
        }
    )
    facts = prior_for(dense, drafter)
    assert facts.fixed_bytes / 1e9 == pytest.approx(17.27, rel=0.02)
    assert facts.drafter_bytes / 1e9 == pytest.approx(0.469 * 0.5625, rel=0.05)
    assert facts.expert_bytes == 0 == facts.num_experts
    facts = prior_for(ModelConfig.from_dict(moe), drafter, drafter_bits=16)
    assert facts.fixed_bytes / 1e9 == pytest.approx(1.34, rel=0.03)
    assert facts.expert_bytes / 1e9 == pytest.approx(0.1004, rel=0.02)
    assert facts.drafter_bytes / 1e9 == pytest.approx(0.94, rel=0.05)
