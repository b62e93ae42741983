"""Every thread runs, in an order that an option gives; barriers hold in all of them."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.kernel import Output
from tests.metal.conftest import Runner
from tests.metal.runtime import SCHEDULES

# In which order threads of a threadgroup arrive, before and after a barrier.
ARRIVALS = """
  threadgroup atomic_uint count;
  uint i = thread_index_in_threadgroup;
  if (i == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[i] = atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
  if (simd_sum(1) != 32) return;
  p[i] = atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_none);
  q[i] = atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
"""


def _arrivals(run: Runner, schedule: str, seed: int = 1) -> np.ndarray:
    run.executor.schedule, run.executor.seed = schedule, seed
    outputs = {name: Output((64,), mx.uint32) for name in "opq"}
    return np.stack([np.array(result) for result in run(ARRIVALS, outputs)])


def test_orders(run: Runner) -> None:
    ascending = np.arange(32)
    natural = _arrivals(run, "natural")
    # A simdgroup goes on past its SIMD functions until it waits for the others.
    assert natural[0].tolist() == [*ascending, *(64 + ascending)]
    assert natural[1].tolist() == [*(32 + ascending), *(96 + ascending)]
    assert natural[2].tolist() == list(range(128, 192))
    backwards = _arrivals(run, "reversed")
    assert backwards[0].tolist() == [*(64 + 31 - ascending), *(31 - ascending)]
    assert backwards[2].tolist() == list(range(191, 127, -1))
    # In lockstep no simdgroup is ahead of another by more than one SIMD function.
    lockstep = _arrivals(run, "lockstep")
    assert lockstep[0].tolist() == list(range(64))
    assert lockstep[1].tolist() == list(range(64, 128))


def test_random_orders(run: Runner) -> None:
    first, again, other = (_arrivals(run, "random", seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    # Barriers hold, and each round has an order of its own.
    assert sorted(first[2].tolist()) == list(range(128, 192))
    assert (np.argsort(first[0][:32]) != np.argsort(first[2][:32])).any()


@pytest.mark.parametrize("mode", ["checked", "fast"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threadgroups(run: Runner, schedule: str, mode: str) -> None:
    run.executor.schedule, run.executor.mode = schedule, mode
    for groups in ((1, 1, 1), (2, 1, 1), (3, 5, 2), (1, 1, 97)):
        source = "o[thread_position_in_grid.x + GX * 32 * (gy + GY * gz)] = i;"
        names = "uint i = thread_index_in_threadgroup, gy = thread_position_in_grid.y,"
        names += "gz = thread_position_in_grid.z;"
        count = groups[0] * groups[1] * groups[2]
        (o,) = run(
            names + source,
            {"o": Output((count, 32), mx.int32)},
            template={"GX": groups[0], "GY": groups[1]},
            groups=groups,
            threads=32,
        )
        np.testing.assert_array_equal(np.array(o), np.tile(np.arange(32), (count, 1)))


@pytest.mark.parametrize("mode", ["checked", "fast"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_barriers_in_a_loop(run: Runner, schedule: str, mode: str) -> None:
    # A sum by halves, over and over in the same memory.
    source = """
      threadgroup uint sums[256];
      uint i = thread_index_in_threadgroup, total = 0;
      for (uint round = 0; round < 5; round++) {
        sums[i] = i * (round + 1);
        for (uint half_size = 128; half_size > 0; half_size /= 2) {
          threadgroup_barrier(mem_flags::mem_threadgroup);
          if (i < half_size) sums[i] += sums[i + half_size];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        total += sums[0];
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      o[i] = total;
    """
    run.executor.schedule, run.executor.mode = schedule, mode
    (o,) = run(source, {"o": Output((256,), mx.uint32)}, threads=256)
    assert set(o.tolist()) == {255 * 128 * 15}


def test_simdgroup_barriers_order_a_simdgroup(run: Runner) -> None:
    source = """
      threadgroup uint values[64];
      uint i = thread_index_in_threadgroup;
      for (uint round = 0; round < 3; round++) {
        values[i] = i + round;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        o[round * 64 + i] = values[i ^ 5];
        simdgroup_barrier(mem_flags::mem_threadgroup);
      }
    """
    for schedule in SCHEDULES:
        run.executor.schedule = schedule
        (o,) = run(source, {"o": Output((3, 64), mx.uint32)})
        np.testing.assert_array_equal(np.array(o), (np.arange(64) ^ 5) + np.arange(3)[:, None])
