"""simdgroup_matrix: which lane holds what, and in which order it adds."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.kernel import Output
from tests.metal.conftest import Runner

HEADER = "#include <metal_simdgroup_matrix>\n"


def _place(lane: int) -> tuple[int, int]:
    """Where a lane's first element is, as published for Apple's GPUs."""
    quad = lane // 4
    return (quad & 4) + lane // 2 % 4, (quad & 2) * 2 + lane % 2 * 2


def test_lanes_hold_two_neighbours_of_a_row(run: Runner) -> None:
    source = """
      uint lane = thread_index_in_simdgroup;
      simdgroup_matrix<float, 8, 8> m;
      simdgroup_load(m, x, 8);
      o[lane * 2] = m.thread_elements()[0];
      o[lane * 2 + 1] = m.thread_elements()[1];
    """
    x = mx.arange(64).astype(mx.float32)
    (o,) = run(source, {"o": Output((32, 2), mx.float32)}, {"x": x}, header=HEADER, threads=32)
    places = np.array([8 * row + column for row, column in map(_place, range(32))])
    np.testing.assert_array_equal(np.array(o), np.stack([places, places + 1], 1))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_product_is_a_chain_of_fused_multiply_adds(run: Runner, dtype: mx.Dtype) -> None:
    source = """
      simdgroup_matrix<T, 8, 8> a, b;
      simdgroup_matrix<float, 8, 8> c, d;
      simdgroup_load(a, x, 10, ulong2(2, 1));
      simdgroup_load(b, y, 8, ulong2(0, 0), true);
      simdgroup_load(c, z);
      simdgroup_multiply_accumulate(d, a, b, c);
      simdgroup_store(d, o, 9);
      simdgroup_multiply(d, a, b);
      simdgroup_store(d, p, 8, ulong2(0, 0), true);
      if (thread_index_in_simdgroup < 8) o[thread_index_in_simdgroup * 9 + 8] = 0;
    """
    random = np.random.default_rng(0)
    # With 10 bits or less each step is exact in float64, so that it is rounded once.

    def draw(*shape: int) -> np.ndarray:
        return np.round(random.uniform(-1, 1, shape) * 128) / 128

    x, y, z = draw(9, 10), draw(8, 8), draw(8, 8) * 1000 / 7
    inputs = {"x": mx.array(x).astype(dtype), "y": mx.array(y).astype(dtype)}
    inputs["z"] = mx.array(z.astype(np.float32))
    outputs = {"o": Output((8, 9), mx.float32), "p": Output((8, 8), mx.float32)}
    o, p = run(source, outputs, inputs, header=HEADER, template={"T": dtype}, threads=32)
    for found, start in ((o, z.astype(np.float32)), (p.T, np.zeros((8, 8), np.float32))):
        value = start
        for k in range(8):
            step = np.outer(x[1:, 2:][:, k], y.T[k])
            value = (step + value.astype(np.float64)).astype(np.float32)
        np.testing.assert_array_equal(np.array(found)[:, :8], value)


def test_filled_and_diagonal(run: Runner) -> None:
    source = """
      simdgroup_matrix<half, 8, 8> m = make_filled_simdgroup_matrix<half, 8, 8>(2.5h);
      simdgroup_store(m, o);
      simdgroup_store(simdgroup_half8x8(3.0h), o + 64);
    """
    (o,) = run(source, {"o": Output((2, 8, 8), mx.float16)}, header=HEADER, threads=32)
    np.testing.assert_array_equal(np.array(o), [np.full((8, 8), 2.5), np.eye(8) * 3])
