"""The cost model: its bytes are the footprint's, its steps MLX's tiles, its answers consistent."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from gemma_mtp_mlx import footprint, outline, workload
from gemma_mtp_mlx.acceptances import KINDS, tokens_per_round
from gemma_mtp_mlx.chips import Chip, find
from gemma_mtp_mlx.families import TEXTS
from gemma_mtp_mlx.inspection import converted_bytes
from gemma_mtp_mlx.outline import FORMATS, Outline
from gemma_mtp_mlx.prediction import Rounds, seconds
from gemma_mtp_mlx.workload import MLX, OURS, Pass, Runtime, Work
from tests.test_footprint import published

M1, M3, M5 = find("M1 Max"), find("M3 Max"), find("M5 Max")
of_family = cache(outline.of_family)
KERNELS = pytest.mark.parametrize("kernels", [MLX, OURS])
FAMILIES = pytest.mark.parametrize("family", list(TEXTS))
CHAT = KINDS["chat"].chances
ROOT = Path(__file__).parents[1]


def nbytes(work: Work) -> float:
    return sum(step.nbytes for step in work.steps)


def rounds(
    family: str, chip: Chip = M3, kernels: str = MLX, rows: int = 1, bits: str = "4"
) -> Rounds:
    return Rounds(of_family(family, bits, "4"), chip, Runtime(kernels), rows, 1024)


@FAMILIES
@pytest.mark.parametrize("bits", list(FORMATS))
def test_a_pass_of_ours_reads_what_the_footprint_says(family: str, bits: str) -> None:
    pair = of_family(family, bits, "4")
    for rows, length in ((1, 1), (1, 4), (4, 4)):
        work = workload.verify(pair, M3, Runtime(OURS), Pass(rows, length, 0))
        assert nbytes(work) == pytest.approx(pair.target.reads.pass_bytes(rows * length))


@FAMILIES
@pytest.mark.parametrize("bits", ["4", "16"])
def test_nearly_all_of_a_pass_is_matrices(family: str, bits: str) -> None:
    pair = of_family(family, bits, bits)
    for part in (pair.target, pair.drafter):
        assert part is not None
        assert 0 <= part.other_bytes < 0.002 * part.reads.pass_bytes(1)


@FAMILIES
def test_keys_and_values_are_the_footprint_s(family: str) -> None:
    pair = of_family(family, "4", "4")
    for rows, context in ((1, 300), (4, 5000)):
        with_keys = nbytes(workload.verify(pair, M3, Runtime(OURS), Pass(rows, 4, context)))
        without = nbytes(workload.verify(pair, M3, Runtime(OURS), Pass(rows, 4, 0)))
        read = rows * footprint.kv_read_bytes(pair.config, pair.dtype, context)
        assert with_keys - without == pytest.approx(read)


@FAMILIES
def test_a_draft_step_reads_the_drafter_its_keys_and_embeddings(family: str) -> None:
    pair = of_family(family, "4", "4")
    assert pair.drafter is not None and pair.drafter_config is not None
    for rows, context in ((1, 300), (8, 5000)):
        read = pair.drafter.reads.pass_bytes(rows) + rows * pair.embedding_row_bytes
        read += rows * footprint.drafter_kv_read_bytes(
            pair.drafter_config, pair.config, pair.dtype, context
        )
        work = workload.draft(pair, M3, Runtime(OURS), rows, context)
        assert nbytes(work) == pytest.approx(read)


@FAMILIES
def test_a_family_is_packed_as_convert_packs_it(family: str) -> None:
    pair, plans = of_family(family, "4", "4"), published(family)
    ordered = plans.drafter.use_ordered_embeddings
    assert pair.drafter is not None
    assert pair.target.weights_bytes == converted_bytes(plans.plans[0], "", centroid_head=ordered)
    ids = plans.drafter.text.vocab_size if ordered else 0  # stored as int64, held as int32
    converted = converted_bytes(plans.plans[1], "drafter/", centroid_head=ordered)
    assert converted is not None and pair.drafter.weights_bytes == converted - 4 * ids
    whole = of_family(family, "16", "16")
    assert whole.target.weights_bytes == plans.of_target.weights_bytes
    assert whole.drafter is not None
    assert whole.drafter.weights_bytes == plans.of_drafter.weights_bytes


def decoded(chip: Chip, rows: int, runtime: Runtime) -> float:
    """Return how often a pass of a 31B model decodes its weights, head in 4 bits as well."""
    pair = of_family("31B", "4", "4", uniform=True)
    work = workload.verify(pair, chip, runtime, Pass(rows, 1, 0))
    once = workload.verify(pair, chip, runtime, Pass(1, 1, 0))
    return sum(s.decode for s in work.steps) / sum(s.decode for s in once.steps)


def test_mlx_decodes_again_for_every_five_rows() -> None:
    wide = [round(decoded(M3, rows, Runtime(MLX))) for rows in range(1, 13)]
    assert wide == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert [round(decoded(M3, rows, Runtime(MLX, wide=False))) for rows in (2, 5)] == [2, 5]
    assert [round(decoded(M1, rows, Runtime(MLX))) for rows in (2, 5)] == [2, 5]


def test_ours_loads_weights_once_for_sixteen_positions() -> None:
    pair = of_family("31B", "4", "4")
    head = pair.target.head
    assert head is not None
    read = [workload.matmul(head, 1, m, M3, Runtime(OURS)).nbytes for m in (1, 4, 5, 16, 17, 32)]
    assert read == [head.nbytes] * 4 + [2 * head.nbytes] * 2


@KERNELS
def test_experts_are_read_once_each(kernels: str) -> None:
    pair = of_family("26B-A4B", "4", "4")
    four = workload.verify(pair, M3, Runtime(kernels), Pass(1, 4, 0))
    one = workload.verify(pair, M3, Runtime(kernels), Pass(1, 1, 0))
    more = 128 * (1 - (1 - 8 / 128) ** 4) - 8
    experts = pair.target.reads.part_bytes * more + 3 * pair.target.reads.token_bytes
    assert nbytes(four) - nbytes(one) == pytest.approx(experts, rel=2e-3)  # and scores of attention


@FAMILIES
@KERNELS
def test_a_better_chip_is_never_slower(family: str, kernels: str) -> None:
    pair, runtime = of_family(family, "4", "4"), Runtime(kernels)
    for rows, k in ((1, 0), (1, 3), (8, 15)):
        work = workload.drafting_round(pair, M3, runtime, rows, k, 1024, 1.0)
        wider, quicker = replace(M3, bandwidth_gbps=500.0), replace(M3, tflops=20.0)
        assert seconds(work, wider) <= seconds(work, M3) >= seconds(work, quicker)
        assert min(seconds(work, wider), seconds(work, quicker)) < seconds(work, M3)


@FAMILIES
@KERNELS
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_answers_are_consistent(family: str, kernels: str, rows: int) -> None:
    found = rounds(family, M5, kernels, rows)
    depths = found.depths(CHAT)
    assert found.best(CHAT).k == max(range(16), key=lambda k: depths[k].tps)
    assert depths[0].tps == pytest.approx(rows / found.seconds[0])
    ratios = [found.speedup((a / 20,)) for a in range(21)]
    assert ratios == sorted(ratios) and ratios[0] >= 1
    least = found.least_acceptance()
    assert least is not None and 0 < least < 1
    below, above = found.depths((least - 0.002,)), found.depths((least,))
    assert max(depth.tps for depth in below[1:]) < below[0].tps
    assert max(depth.tps for depth in above[1:]) >= above[0].tps


def test_no_acceptance_may_be_enough() -> None:
    found = rounds("26B-A4B", M1, MLX, 8)
    assert found.least_acceptance(50.0) is None
    least = found.least_acceptance(1.2)
    assert least is not None and found.speedup((least,)) >= 1.2 > found.speedup((least - 0.002,))


def test_without_a_drafter_there_is_plain_decoding_only() -> None:
    pair: Outline = replace(of_family("12B", "4", "4"), drafter=None, drafter_config=None)
    found = Rounds(pair, M3, Runtime(OURS), 1, 1024)
    assert len(found.seconds) == 1 and found.best(CHAT).k == 0 and found.speedup(CHAT) == 1


def test_a_head_that_stops_early_costs_by_what_is_kept() -> None:
    pair = of_family("31B", "4", "4")
    took = [
        seconds(workload.drafting_round(pair, M3, runtime, 1, 3, 500, kept), M3)
        for runtime, kept in (
            (Runtime(MLX), 1.0),
            (Runtime(MLX, heads_apart=True), 1.0),
            (Runtime(MLX, heads_apart=True), 3.0),
        )
    ]
    assert took[1] <= took[0] < took[2]


def test_tokens_of_a_round() -> None:
    assert tokens_per_round((0.5,), 3) == 1 + 0.5 + 0.25 + 0.125
    assert tokens_per_round((0.9, 0.5), 3) == pytest.approx(1 + 0.9 + 0.45 + 0.225)
    assert tokens_per_round((1.0,), 0) == 1


def test_launches_are_the_counted_ones() -> None:
    # The table that bench.launches has counted from graphs, in kernels/README.md.
    text = (ROOT / "gemma_mtp_mlx/kernels/README.md").read_text()
    row = r"\| (\S+) \| ([14]) \| [\d.]+ \| [\d.]+ \| [\d.]+ \| (\d+) \| (\d+) \| (\d+) \|"
    found = re.findall(row, text)
    assert len(found) == 2 * len(TEXTS)
    for family, length, theirs, ours, draft in found:
        pair = of_family(family, "4", "4")
        for kernels, counted in ((MLX, theirs), (OURS, ours)):
            work = workload.verify(pair, M3, Runtime(kernels), Pass(1, int(length), 4000))
            assert work.launches == pytest.approx(int(counted), rel=0.04)
        step = workload.draft(pair, M3, Runtime(OURS), 1, 4000)
        assert step.launches == pytest.approx(int(draft), rel=0.04)


@pytest.mark.parametrize("name", ["26b", "26B-A4B", "26B", "e2b", "31B"])
def test_families_are_found_in_any_case(name: str) -> None:
    assert outline.family_of(name) in TEXTS


def test_what_is_no_family() -> None:
    assert outline.family_of("27B") is None and outline.family_of("") is None
