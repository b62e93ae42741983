"""What bench.kernels and bench.traffic say of the cases; tests/kernels executes them."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest

from bench import kernels, traffic
from bench.kernels import bandwidth, ceiling, chain, copy_count, facts, link, result, spread
from bench.metal.matrices import chosen_experts, gate_up, projections
from bench.metal.place import Case, Place, Work, packed
from gemma_mtp_mlx.dispatch import Weights
from gemma_mtp_mlx.families import TEXTS, drafter_config, target_config
from gemma_mtp_mlx.pairing import check_pair
from tests.metal.executor import Record, Traffic


def test_a_chain_needs_every_call_and_changes_nothing() -> None:
    called: list[mx.array] = []

    def op(x: mx.array) -> list[mx.array]:
        called.append(x)
        return [x @ mx.eye(8), x.sum().astype(mx.int32)]

    works = [Work(mx.random.normal((4, 8)), op, op) for _ in range(2)]
    end = chain([work.ours for work in works], works, 5)
    assert len(called) == 5 and mx.array_equal(end, works[0].x).item()
    # Each call's input comes from the one before: what is not a number goes on to the next.
    chain([op, lambda x: [x * mx.nan], op], works, 3)
    assert mx.isnan(called[-1]).all().item() and not mx.isnan(called[-2]).any().item()
    assert link(works[0].x, [mx.array([[3, 4]])]).dtype == mx.float32


def test_ceilings_by_hand() -> None:
    place = Place("31B", 1, 4)
    case = gate_up(place)
    weights = 2 * 21_504 * 5376 * 0.5625
    assert case.stream == weights == 130_056_192
    assert case.least == weights + 4 * (5376 + 21_504) * 2
    assert facts(case, 546)["ceiling_ms"] == pytest.approx(130.271_232 / 546)
    assert "130.27 MB, at least 0.2386 ms" in ceiling(case, 546)
    assert bandwidth("Apple M4 Max") == 546 and bandwidth("Apple M4") == 120
    assert bandwidth("AMD EPYC") is None
    # Copies: two of what is large, sixteen of what is small.
    assert copy_count(case) == 2
    assert copy_count(projections(Place("E2B"), "down", 6144, 1536)) == 16


def test_experts_in_use_by_hand() -> None:
    case = chosen_experts(Place("26B-A4B", 1, 1))
    assert case.stream == 8 * 3 * 704 * 2816 * 0.5625
    for tokens, most in ((4, 32), (16, 128)):
        case = chosen_experts(Place("26B-A4B", 1, tokens))
        expert = 3 * 704 * 2816 * 0.5625
        assert 0.6 * most * expert < case.stream < most * expert


def test_times_are_told_with_their_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}
    found = {
        "ceiling_ms": 0.1,
        "ours_ms": spread([0.2, 0.1, 0.3]),
        "mlx_ms": spread([0.5, 0.4, 0.6]),
    }
    told = result(found)
    assert "ours 0.2000 ms (0.1000 to 0.3000), MLX 0.5000 ms (0.4000 to 0.6000)" in told
    assert "50% of the ceiling, 2.50 times MLX's speed" in told


def test_measuring_takes_ours_and_mlx_in_turn() -> None:
    turns: list[str] = []

    def op(name: str) -> kernels.Op:
        return lambda x: turns.append(name) or [x + 1]

    work = Work(mx.zeros((2, 2)), op("ours"), op("mlx"))
    case = Case("k", "w", 1, 0, 10**9, lambda: work, lambda chip: [])
    found = kernels.measure(case, 3, 5)
    assert turns == (["ours"] * 3 + ["mlx"] * 3) * (kernels.WARM_UP + 5)
    assert set(found["ours_ms"]) == {"median", "least", "most"}


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.kernels"])
    with pytest.raises(SystemExit) as left:
        kernels.main()
    told = capsys.readouterr()
    assert left.value.code == 2 and not told.out
    assert len(told.err.splitlines()) == 1 and "Metal GPU" in told.err


def test_loads_are_counted_one_by_one() -> None:
    case = projections(Place("E4B", 1, 4), "o", 2048, 2560)
    by_buffer = {"codes0": (10, 30), "scales0": (2, 4), "x": (5, 50), "y": (0, 0)}
    launch = Record(
        kernel="project_rows",
        template={},
        groups=(1, 1, 1),
        threads=32,
        threadgroup_bytes=0,
        traffic={name: Traffic(*read, 0, 0) for name, read in by_buffer.items()},
    )
    assert traffic.loads(launch, case) == 30 + 4


def test_traffic_is_a_table() -> None:
    case = projections(Place("E4B", 1, 16), "o", 2048, 2560)
    told = traffic.row(traffic.record(case, case, traffic.Traffic(1, case.least, case.stream)))
    columns, rule = traffic.HEAD.splitlines()
    assert told.count("|") == columns.count("|") == rule.count("|")
    assert "| 1.00 | 1.00 | qmm_splitk 1.00 |" in told


def test_models_are_the_published_ones() -> None:
    shapes = {name: target_config(name) for name in TEXTS}
    assert {name: len(config.layers) for name, config in shapes.items()} == {
        "E2B": 35,
        "E4B": 42,
        "12B": 48,
        "26B-A4B": 30,
        "31B": 60,
    }
    assert shapes["E2B"].layers[-1].intermediate_size == 12_288
    assert [layer.sliding for layer in shapes["E2B"].layers[:5]] == [True] * 4 + [False]
    assert shapes["12B"].layers[5].k_eq_v and not shapes["E4B"].layers[5].k_eq_v
    for name, config in shapes.items():
        check_pair(config, drafter_config(name))


def test_random_weights_are_read_as_they_are_packed() -> None:
    weights = Weights(64, 128)
    layer = packed(weights)
    dense = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=4)
    assert dense.shape == (64, 128) and float(dense.min()) == -1 / 32
    assert layer.weight.nbytes + 2 * layer.scales.nbytes == weights.nbytes
    assert len(np.unique(np.array(dense.astype(mx.float32)))) == 16
