"""What kernels read and write: arrays of MLX, and how many bytes of them."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.kernel import Output
from tests.metal.conftest import Runner
from tests.metal.errors import MetalError

DTYPES = {
    "a": mx.bool_, "b": mx.int8, "c": mx.uint8, "d": mx.int16, "e": mx.uint16, "f": mx.int32,
    "g": mx.uint32, "h": mx.int64, "i": mx.uint64, "j": mx.float16, "k": mx.bfloat16,
    "l": mx.float32,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["checked", "fast"])
def test_dtypes(run: Runner, mode: str) -> None:
    run.executor.mode = mode
    inputs = {n: (3 * mx.arange(64) % 2**7).astype(dtype) for n, dtype in DTYPES.items()}
    outputs = {f"out_{n}": Output((2, 32), dtype) for n, dtype in DTYPES.items()}
    source = "".join(f"out_{n}[at] = {n}[at];\n" for n in DTYPES)
    found = run(f"uint at = thread_position_in_grid.x;\n{source}", outputs, inputs)
    for x, result in zip(inputs.values(), found, strict=True):
        assert result.dtype == x.dtype and mx.array_equal(result, x.reshape(2, 32))


def test_small_and_scalar_inputs(run: Runner) -> None:
    (o,) = run(
        "uint i = thread_position_in_grid.x; o[i] = float(b[i % 7]) * s + t[0];",
        {"o": Output((64,), mx.float32)},
        {"b": mx.arange(7).astype(mx.bfloat16), "s": mx.array(0.5), "t": mx.array([3])},
    )
    np.testing.assert_array_equal(np.array(o), np.arange(64) % 7 * 0.5 + 3)


def test_where_a_thread_is(run: Runner) -> None:
    source = """
      uint g = threadgroup_position_in_grid.x + 2 * (threadgroup_position_in_grid.y
          + 3 * threadgroup_position_in_grid.z);
      uint i = thread_index_in_threadgroup;
      o[g * 96 + i] = thread_position_in_grid.x + 1000 * thread_position_in_grid.y
          + 10000 * thread_position_in_grid.z;
      if (i == 95) {
        p[g * 8 + 0] = simdgroup_index_in_threadgroup;
        p[g * 8 + 1] = thread_index_in_simdgroup;
        p[g * 8 + 2] = simdgroups_per_threadgroup;
        p[g * 8 + 3] = threads_per_simdgroup;
        p[g * 8 + 4] = threads_per_threadgroup.x * 10 + threads_per_threadgroup.y;
        p[g * 8 + 5] = threadgroups_per_grid.x + 10 * threadgroups_per_grid.y
            + 100 * threadgroups_per_grid.z;
        p[g * 8 + 6] = threads_per_grid.x + threads_per_grid.y;
        p[g * 8 + 7] = thread_position_in_threadgroup.x + THREADS;
      }
    """
    outputs = {"o": Output((4, 3, 2, 96), mx.uint32), "p": Output((24, 8), mx.uint32)}
    o, p = run(source, outputs, groups=(2, 3, 4), threads=96)
    z, y, x = np.meshgrid(range(4), range(3), range(192), indexing="ij")
    expected = (x + 1000 * y + 10000 * z).reshape(4, 3, 2, 96)
    np.testing.assert_array_equal(np.array(o), expected)
    assert p.tolist() == [[2, 31, 3, 32, 961, 432, 195, 191]] * 24


STRIDED = """
  uint i = thread_position_in_grid.x;
  o[i] = x[i / 4 * x_strides[0] + i % 4 * x_strides[1]];
"""


@pytest.mark.parametrize("mode", ["checked", "fast"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_strides(run: Runner, dtype: mx.Dtype, mode: str) -> None:
    run.executor.mode = mode
    whole = mx.arange(20 * 10).reshape(20, 10).astype(dtype)
    views = {
        "contiguous": whole.reshape(-1)[:64].reshape(16, 4),
        "part of a row": whole[2:18, 3:7],
        "every other": whole[:16, 1:9:2],
        "columns": whole[:4, :8].T,
        "repeated": mx.broadcast_to(whole[:1, :4], (16, 4)),
    }
    for x in views.values():
        count = x.size
        for row_contiguous in (True, False):
            (o,) = run(
                STRIDED,
                {"o": Output(x.shape, dtype)},
                {"x": x},
                groups=(count // 32, 1, 1),
                threads=32,
                row_contiguous=row_contiguous,
            )
            assert mx.array_equal(o, x)
    # Where it was not copied, the bytes between the rows were not read, nor belong to the input.
    if mode == "checked":
        traffic = run.executor.launches[3].traffic["x"]
        assert traffic.read == 64 * dtype.size


def test_the_end_of_a_view(run: Runner) -> None:
    whole = mx.zeros((20, 10))
    with pytest.raises(MetalError) as raised:
        run(
            "o[thread_position_in_grid.x] = x[thread_position_in_grid.x + 101];",
            {"o": Output((64,), mx.float32)},
            {"x": whole[2:18, 3:7]},
            row_contiguous=False,
        )
    assert "at byte 616 of buffer 'x', which has 616" in str(raised.value)


VECTORS = "o[0] = ((const device float2*)x)[0].y;"


def test_a_slice_has_the_alignment_of_its_start(run: Runner) -> None:
    whole = mx.arange(64).astype(mx.float32)
    outputs = {"o": Output((1,), mx.float32)}
    source = f"if (thread_position_in_grid.x == 0) {{ {VECTORS} }}"
    (o,) = run(source, outputs, {"x": whole[2:]})
    assert o.item() == 3
    with pytest.raises(MetalError, match="misaligned"):
        run(source, outputs, {"x": whole[3:]})
    (o,) = run(source, outputs, {"x": whole[3::2]})  # which is copied
    assert o.item() == 5


def test_traffic(run: Runner) -> None:
    # Each of 3 threadgroups reads all of x, 16 bytes at a time, and one word of y, twice.
    source = """
      uint i = thread_index_in_threadgroup, g = threadgroup_position_in_grid.x;
      threadgroup float shared[64];
      const device float4* fours = (const device float4*)x;
      float4 four = fours[i];
      shared[i] = four.x + four.y + four.z + four.w;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float before = volatile_read(y + 8 * g);
      o[g * 64 + i] = T(shared[63 - i] + before + volatile_read(y + 8 * g));
    """
    header = """inline float volatile_read(const device float* p) {
  return *(const volatile device float*)p;
}
"""
    run(
        source,
        {"o": Output((3, 64), mx.float16)},
        {"x": mx.zeros(256), "y": mx.zeros(32)},
        header=header,
        template={"T": mx.float16, "UNUSED": 3},
        groups=(3, 1, 1),
    )
    (record,) = run.executor.launches
    assert (record.kernel, record.groups, record.threads) == ("test", (3, 1, 1), 64)
    assert record.template == {"THREADS": 64, "T": mx.float16, "UNUSED": 3}
    assert record.threadgroup_bytes == 256
    assert record.traffic["x"] == (1024, 3 * 1024, 0, 0)
    assert record.traffic["y"] == (12, 3 * 64 * 2 * 4, 0, 0)
    assert record.traffic["o"] == (0, 0, 384, 384)
    assert (record.read, record.written) == (1024 + 12, 384)


def test_elements_accessed_in_parts(run: Runner) -> None:
    # Neighbouring threads write the bytes of one word: no race, though they share an element.
    source = """
      threadgroup uint words[16];
      uint i = thread_index_in_threadgroup;
      if (i < 16) words[i] = 0;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      ((threadgroup uchar*)words)[i] = i;
      ((device uchar*)o)[i] = i;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      p[i] = ((threadgroup ushort*)words)[i / 2];
    """
    outputs = {"o": Output((16,), mx.uint32), "p": Output((64,), mx.uint16)}
    o, p = run(source, outputs)
    np.testing.assert_array_equal(np.array(o).view(np.uint8), np.arange(64))
    np.testing.assert_array_equal(
        np.array(p), np.repeat(np.arange(64, dtype=np.uint8).view("<u2"), 2)
    )


def test_constants_of_the_program(run: Runner) -> None:
    header = "constant float TABLE[4] = {1, 2, 3, 4};\nconstant constexpr uint FOUR = 4;\n"
    found = run.values("TABLE[i % FOUR]", header=header)
    np.testing.assert_array_equal(found, np.arange(64) % 4 + 1)
