"""Published measurements and the constants that are fitted to them: data, split, fit and claims."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from bench import calibrate, reach
from bench.published import Half, Record, fit_sources, halves, plausible_tps, published
from gemma_mtp_mlx.acceptances import KINDS
from gemma_mtp_mlx.chips import CHIPS, find
from gemma_mtp_mlx.families import TEXTS
from gemma_mtp_mlx.outline import FORMATS
from gemma_mtp_mlx.prediction import CONSTANTS, FITTED_ERROR, HELD_OUT_ERROR
from gemma_mtp_mlx.workload import MLX, OURS

DATA = published()
RESULTS = Path(__file__).parents[1] / "bench/results"
USABLE = [record for record in DATA["rounds"] if record["usable"]]


@pytest.fixture(scope="module")
def both() -> tuple[Half, Half]:
    return halves(DATA)


@pytest.fixture(scope="module")
def kept() -> Any:
    return json.loads((RESULTS / "calibration.json").read_text())


@pytest.mark.parametrize("kind", ["rounds", "curves"])
def test_every_record_has_a_link_and_unusable_ones_a_reason(kind: str) -> None:
    names = set(DATA[kind][0])
    for record in DATA[kind]:
        assert set(record) == names
        assert re.fullmatch(r"https://[^ ]+", record["source"])
        assert record["usable"] == (record["reason"] is None)
        assert record["usable"] or len(record["reason"]) > 8


@pytest.mark.parametrize("record", USABLE, ids=lambda r: f"{r['runtime']}-{r['model']}-{r['k']}")
def test_usable_records_say_what_is_needed(record: Record) -> None:
    assert record["chip"] in CHIPS and record["model"] in TEXTS
    assert record["bits"] in FORMATS and record["drafter_bits"] in FORMATS
    assert record["prompts"] in KINDS and record["runtime"] in DATA["runtimes"]
    assert record["k"] == "auto" or 1 <= record["k"] <= 15
    assert 1 <= record["rows"] <= 16 and 0.1 < record["speedup"] < 10
    if record["plain_tps"] is not None:
        if record["mtp_tps"] is not None:
            ratio = record["mtp_tps"] / record["plain_tps"]
            assert record["speedup"] == pytest.approx(ratio, rel=0.02)
        least, most = plausible_tps(record)
        assert record["plain_tps"] <= most
        assert record["rows"] == 1 or record["plain_tps"] >= least


def test_batches_that_are_left_out_for_their_baseline_break_the_rule() -> None:
    found = [r for r in DATA["rounds"] if r["reason"] is not None and "a third" in r["reason"]]
    assert len(found) == 4
    assert all(r["plain_tps"] < plausible_tps(r)[0] for r in found)


def test_sources_are_split_by_the_hash_of_their_link() -> None:
    records = [*USABLE, *(c for c in DATA["curves"] if c["usable"])]
    fit = fit_sources(records)
    assert fit == fit_sources(records[::-1])
    sizes = sum(r["source"] in fit for r in records), sum(r["source"] not in fit for r in records)
    assert sizes == (32, 51)


def test_halves_share_no_source(both: tuple[Half, Half]) -> None:
    sources = [{c.record["source"] for c in [*half.cases, *half.curves]} for half in both]
    assert not sources[0] & sources[1]
    assert sum(len(half.cases) for half in both) == len(USABLE)


def test_the_constants_are_those_that_are_fitted(both: tuple[Half, Half]) -> None:
    assert calibrate.fit(both[0]) == CONSTANTS


def test_no_neighbour_of_the_constants_fits_better(both: tuple[Half, Half]) -> None:
    least = calibrate.loss(both[0], CONSTANTS)
    for name in calibrate.FITTED:
        for factor in (0.95, 1.05):
            moved = replace(CONSTANTS, **{name: factor * getattr(CONSTANTS, name)})
            assert calibrate.loss(both[0], moved) > least


def test_what_is_said_of_the_error_is_so(both: tuple[Half, Half], kept: Any) -> None:
    errors = [calibrate.summaries(half, CONSTANTS)["speed-up"] for half in both]
    assert [round(e["median"], 3) for e in errors] == [FITTED_ERROR, HELD_OUT_ERROR]
    assert [e["count"] for e in errors] == [30, 46]
    assert errors[1]["median"] <= 0.15
    assert errors == [kept["errors"][half]["speed-up"] for half in ("fit", "held out")]


def test_results_are_those_of_the_model(both: tuple[Half, Half], kept: Any) -> None:
    assert json.loads(json.dumps(calibrate.as_json(DATA, both, CONSTANTS))) == kept
    text = (RESULTS / "calibration.md").read_text()
    assert "\n".join(calibrate.report(DATA, both, CONSTANTS)) + "\n" == text


def test_what_is_said_of_2_2_is_so() -> None:
    def least(chip: str, rows: int, kernels: str, form: str) -> float:
        found = reach.rounds(chip, rows, kernels, form).least_acceptance(reach.RATIO)
        return 2.0 if found is None else found

    batches = list(product((4, 8), (MLX, OURS)))
    for chip in ("M5 Max", "M5 Ultra"):
        assert 0.855 <= least(chip, 8, MLX, "bfloat16") <= 0.885
        assert 0.895 <= least(chip, 4, MLX, "bfloat16") <= 0.925
    for chip in ("M3 Max", "M4 Max"):
        assert all(0.905 <= least(chip, *batch, "bfloat16") <= 0.955 for batch in batches)
    for chip in ("M1 Max", "M3 Max", "M4 Max", "M5 Max", "M5 Ultra"):
        assert all(least(chip, *batch, "4-bit") >= 0.905 for batch in batches)
        one = reach.rounds(chip, 1, MLX, "4-bit").depths((0.0,))[0].tps
        if find(chip).generation >= 15:
            assert reach.rounds(chip, 8, MLX, "4-bit").depths((0.0,))[0].tps > 2.2 * one
        else:
            assert all(least(chip, *batch, "4-bit") >= 0.98 for batch in batches)
