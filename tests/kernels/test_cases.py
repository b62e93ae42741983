"""The cases of bench.kernels and bench.traffic, executed: they are what they say they are."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from bench import traffic
from bench.metal.cases import cases
from bench.metal.matrices import projections
from bench.metal.place import Case, Place
from tests.metal.executor import Executor

PLACES = [
    Place("E4B", 1, 4, context=600, shrink=1024),
    Place("E2B", 2, 3, context=40, shrink=1024),
    Place("26B-A4B", 1, 1, context=600, shrink=1024),
]
CHOOSING = ("centroid_head", "route", "token_head")  # between near equals, which MLX's CPU rounds
CASES = [
    pytest.param(case, id=f"{place.model} M={place.tokens} {case.kernel} {case.what}")
    for place in PLACES
    for case in cases(place)
]


def streamed(executor: Executor, case: Case) -> int:
    """Distinct bytes read of what a case has to read."""
    if not case.stream:
        return 0
    names = traffic.KEYS if case.kernel == "verify_attention" else traffic.STREAMS
    return sum(
        found.read
        for launch in executor.launches
        for name, found in launch.traffic.items()
        if name.rstrip("012") in names
    )


@pytest.mark.parametrize("case", CASES)
def test_ours_and_mlx_do_the_same_and_read_what_the_case_says(
    metal: Executor,
    case: Case,
) -> None:
    work = case.build()
    ours = work.ours(work.x)
    mx.eval(ours)
    if case.kernel == "centroid_head" and case.tokens > 1:
        assert streamed(metal, case) <= case.stream  # rows may choose the same clusters
    else:
        assert streamed(metal, case) == case.stream
        assert sum(launch.read + launch.written for launch in metal.launches) >= case.least
    for one, other in zip(ours, work.mlx(work.x), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if case.kernel not in CHOOSING:
            a, b = (np.array(x.astype(mx.float32)).ravel() for x in (one, other))
            # MLX's CPU sums in 16 bits. Other inputs or weights would be off by 1.4 times.
            assert np.linalg.norm(a - b) < 0.5 * np.linalg.norm(b)


def test_traffic_of_a_matmul_by_hand(metal: Executor) -> None:
    case = projections(Place("E4B", 1, 4, shrink=1024), "o", 2048, 2560)
    found = traffic.record(case, case, traffic.measure(case))
    # 64 rows of 2048: codes and scales once each, no more loads than that for four positions.
    assert found["loads"] == 1 and found["launches"] == 1
    assert found["least"] == 64 * 2048 * 0.5625 + 4 * (2048 + 64) * 2
    assert 0 <= found["touched"] - found["least"] < 64  # and the sizes
    assert found["mlx"]["M1 Max"] == {"kernels": "qmv_fast", "loads": 4, "extra": 0}
    assert found["mlx"]["M3 Max"] == {"kernels": "qmv_wide", "loads": 1, "extra": 0}
