"""What the lanes of a simdgroup do together, against what Metal says of each function."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.kernel import Output
from tests.metal.conftest import Runner

LANE = np.arange(64) % 32
FIRST = np.arange(64) // 32 * 32  # lane 0 of each thread's simdgroup


def _is(found: np.ndarray, expected: np.ndarray | int) -> None:
    np.testing.assert_array_equal(found, np.broadcast_to(expected, (64,)))


def test_lanes_read_each_other(run: Runner) -> None:
    source = """
      uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;
      o[i] = simd_shuffle(i, (lane * 5 + 3) % 32);
      o[64 + i] = simd_shuffle_xor(i, 5);
      o[128 + i] = simd_shuffle_down(i, 3);
      o[192 + i] = simd_shuffle_up(i, 3);
      o[256 + i] = simd_shuffle_rotate_down(i, 30);
      o[320 + i] = simd_shuffle_rotate_up(i, 30);
      o[384 + i] = simd_broadcast(i, 9);
      o[448 + i] = simd_broadcast_first(i);
      o[512 + i] = quad_shuffle_xor(i, 2);
      o[576 + i] = quad_broadcast(i, 1);
    """
    (o,) = run(source, {"o": Output((10, 64), mx.uint32)})
    found = np.array(o)
    _is(found[0], FIRST + (LANE * 5 + 3) % 32)
    _is(found[1], FIRST + (LANE ^ 5))
    _is(found[2], FIRST + np.where(LANE + 3 < 32, LANE + 3, LANE))
    _is(found[3], FIRST + np.where(LANE >= 3, LANE - 3, LANE))
    _is(found[4], FIRST + (LANE + 30) % 32)
    _is(found[5], FIRST + (LANE - 30) % 32)
    _is(found[6], FIRST + 9)
    _is(found[7], FIRST)
    _is(found[8], np.arange(64) ^ 2)
    _is(found[9], np.arange(64) // 4 * 4 + 1)


def test_reductions(run: Runner) -> None:
    source = """
      uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;
      o[i] = simd_sum(int(lane));
      o[64 + i] = simd_max(int(i) - 9);
      o[128 + i] = simd_min(int(i) - 9);
      o[192 + i] = simd_or(1 << lane);
      o[256 + i] = simd_and(~(1 << lane));
      o[320 + i] = simd_xor(int(lane));
      o[384 + i] = simd_product(lane < 5 ? 2 : 1);
      o[448 + i] = simd_prefix_inclusive_sum(int(lane));
      o[512 + i] = simd_prefix_exclusive_sum(int(lane));
      o[576 + i] = simd_prefix_inclusive_product(lane < 5 ? 2 : 1);
      o[640 + i] = quad_sum(int(lane));
      o[704 + i] = quad_max(int(lane));
      o[768 + i] = int((simd_vote::vote_t)simd_ballot(lane % 3 == 0));
      o[832 + i] = simd_any(lane == 40) + 2 * simd_all(lane < 32) + 4 * simd_any(lane == 7);
    """
    (o,) = run(source, {"o": Output((14, 64), mx.int32)})
    found = np.array(o)
    _is(found[0], 496)
    _is(found[1], FIRST + 31 - 9)
    _is(found[2], FIRST - 9)
    _is(found[3], -1)
    _is(found[4], 0)
    _is(found[5], 0)
    _is(found[6], 32)
    _is(found[7], LANE * (LANE + 1) // 2)
    _is(found[8], LANE * (LANE - 1) // 2)
    _is(found[9], 2 ** np.minimum(LANE + 1, 5))
    _is(found[10], LANE // 4 * 16 + 6)
    _is(found[11], LANE // 4 * 4 + 3)
    _is(found[12], sum(1 << lane for lane in range(0, 32, 3)))
    _is(found[13], 6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_sum_adds_neighbours_first(run: Runner, dtype: mx.Dtype) -> None:
    x = mx.random.normal((32,), key=mx.random.key(0)).astype(dtype)
    (o,) = run(
        "o[thread_index_in_simdgroup] = simd_sum(x[thread_index_in_simdgroup]);",
        {"o": Output((32,), dtype)},
        {"x": x},
        threads=32,
    )
    while x.size > 1:
        x = x[::2] + x[1::2]
    assert mx.array_equal(o, mx.broadcast_to(x, (32,)))


def test_types(run: Runner) -> None:
    _is(run.values("simd_shuffle_xor(float4(lane), 1).w"), LANE ^ 1)
    _is(run.values("simd_max(half(lane))", mx.float16), 31)
    _is(run.values("simd_sum(bfloat(1.0f))", mx.bfloat16), 32)
    _is(run.values("simd_shuffle(ushort2(lane, lane + 1), 3).y", mx.uint16), 4)


def test_many_calls_between_few_lanes_keep_apart(run: Runner) -> None:
    # A lane may be at the next call while others still read what they got from the last.
    source = """
      uint lane = thread_index_in_simdgroup;
      uint value = lane;
      for (uint round = 0; round < 100; round++) {
        value = simd_shuffle(value * 5 + round, (lane + round) % 32) % 1009;
      }
      o[thread_position_in_grid.x] = value;
    """
    value = np.arange(32)
    for round in range(100):
        value = (value * 5 + round)[(np.arange(32) + round) % 32] % 1009
    for schedule in ("natural", "reversed", "random", "lockstep"):
        run.executor.schedule = schedule
        (o,) = run(source, {"o": Output((64,), mx.uint32)})
        _is(np.array(o), np.tile(value, 2))
