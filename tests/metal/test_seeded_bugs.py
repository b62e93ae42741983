"""Every kind of defect is seen, where it is: a good kernel, with one thing wrong."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.kernel import Output
from tests.metal.conftest import Runner
from tests.metal.errors import MetalError

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

# A row's softmax: each of 3 rows by a threadgroup of 4 simdgroups.
SOFTMAX = """
  threadgroup float maxima[4], sums[4];
  threadgroup float total;
  const uint row = threadgroup_position_in_grid.x, n = x_shape[1];
  const uint i = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
  const uint simdgroup = simdgroup_index_in_threadgroup;
  float value = i < n ? x[row * n + i] : -INFINITY;
  float most = simd_max(value);
  if (lane == 0) maxima[simdgroup] = most;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = 0; j < 4; j++) most = max(most, maxima[j]);
  float part = exp(value - most);
  float sum = simd_sum(part);
  if (lane == 0) sums[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    sum = simd_sum(lane < 4 ? sums[lane] : 0.0f);
    if (lane == 0) total = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i < n) y[row * n + i] = part / total;
"""

# y = x w^T by 8x8 matrices, through threadgroup memory that is used again for each 8 columns.
PRODUCT = """
  threadgroup float tile[64];
  const uint lane = thread_index_in_simdgroup, i = thread_index_in_threadgroup;
  const uint simdgroup = simdgroup_index_in_threadgroup, k = x_shape[1];
  simdgroup_matrix<float, 8, 8> a, b, c = simdgroup_matrix<float, 8, 8>(0.0f);
  for (uint start = 0; start < k; start += 8) {
    tile[i] = x[i / 8 * k + start + i % 8];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(a, tile, 8);
    simdgroup_load(b, w + simdgroup * 8 * k + start, k, ulong2(0, 0), true);
    simdgroup_multiply_accumulate(c, a, b, c);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  simdgroup_store(c, y + simdgroup * 8, 16);
"""


def _softmax(run: Runner, source: str) -> np.ndarray:
    x = mx.random.normal((3, 100), key=mx.random.key(0))
    (y,) = run(source, {"y": Output(x.shape, mx.float32)}, {"x": x}, groups=(3, 1, 1), threads=128)
    return np.abs(np.array(y) - np.array(mx.softmax(x, axis=-1))).max()


def _product(run: Runner, source: str) -> np.ndarray:
    x, w = (mx.random.normal((rows, 24), key=mx.random.key(rows)) for rows in (8, 16))
    (y,) = run(
        source,
        {"y": Output((8, 16), mx.float32)},
        {"x": x, "w": w},
        header="#include <metal_simdgroup_matrix>\n",
    )
    return np.abs(np.array(y) - np.array(x @ w.T)).max()


KERNELS = {SOFTMAX: _softmax, PRODUCT: _product}


@pytest.mark.parametrize("schedule", ["natural", "reversed", "random", "lockstep"])
@pytest.mark.parametrize("source", KERNELS, ids=["softmax", "product"])
def test_the_good_kernels(run: Runner, source: str, schedule: str) -> None:
    run.executor.schedule = schedule
    assert KERNELS[source](run, source) < 1e-5


class Bug(NamedTuple):
    """old, the nth of its kind (all: -1), becomes new; `place` is in the line that is blamed."""

    label: str
    source: str
    old: str
    new: str
    kind: str
    place: str
    nth: int = 0


# fmt: off
BUGS = [
    Bug("index past the row", SOFTMAX,
        "i < n ? x", "i <= n ? x", "out-of-bounds read", "float value"),
    Bug("read before", SOFTMAX,
        "x[row * n + i]", "x[int(row * n + i) - 1]", "out-of-bounds read", "float value"),
    Bug("write past the end", SOFTMAX,
        "y[row * n + i]", "y[row * n + i + 1]", "out-of-bounds write", "part / total"),
    Bug("far write", SOFTMAX,
        "y[row", "y[(size_t(1) << 44) + row", "bad address", "part / total"),
    Bug("threadgroup array", SOFTMAX,
        "j < 4", "j < 5", "index out of bounds", "maxima[j]"),
    Bug("threadgroup read", SOFTMAX,
        "maxima[j]", "(&maxima[1])[j]", "out-of-bounds read", "(&maxima[1])[j]"),
    Bug("threadgroup write", SOFTMAX,
        "sums[simdgroup]", "(&sums[0])[simdgroup + 1]", "out-of-bounds write", "[simdgroup + 1]"),
    Bug("threadgroup pointer", PRODUCT,
        "simdgroup_load(a, tile, 8)", "simdgroup_load(a, tile + 1, 8)", "out-of-bounds read",
        "tile + 1"),
    Bug("matrix past the weights", PRODUCT,
        "(b, w + ", "(b, w + 8 + ", "out-of-bounds read", "simdgroup_load(b"),
    Bug("matrix past the output", PRODUCT,
        "(c, y + ", "(c, y + 1 + ", "out-of-bounds write", "simdgroup_store"),
    Bug("private array", SOFTMAX,
        "float value =",
        "float three[3]; for (uint j = 0; j <= i % 4; j++) three[j] = i;\n"
        "float value = 0 * three[i % 3] +", "index out of bounds", "three[j]"),
    Bug("null pointer", SOFTMAX,
        "if (lane == 0) total", "device float* z = y - (size_t)y / 4;\nif (lane == 0) z[0] = total",
        "bad address", "z[0]"),
    Bug("uninitialised threadgroup memory", SOFTMAX,
        "sum = simd_sum(lane < 4 ? sums[lane] : 0.0f)", "sum = simd_sum(maxima[lane % 4] + total)",
        "uninitialised read", "simd_sum(maxima"),
    Bug("uninitialised element", SOFTMAX,
        "if (lane == 0) maxima", "if (lane == 0 && simdgroup < 3) maxima", "uninitialised read",
        "maxima[j]"),
    Bug("output read before it is written", SOFTMAX,
        "= part / total", "+= part / total", "uninitialised read", "part / total"),
    Bug("first barrier missing", SOFTMAX,
        BARRIER, "", "uninitialised read", "maxima"),
    Bug("second barrier missing", SOFTMAX,
        BARRIER, "", "uninitialised read", "sums", 1),
    Bug("third barrier missing", SOFTMAX,
        BARRIER, "", "race", "total", 2),
    Bug("barrier of no memory", SOFTMAX,
        "mem_threadgroup", "mem_none", "race", "maxima"),
    Bug("barrier of other memory", SOFTMAX,
        "mem_threadgroup", "mem_device", "race", "maxima"),
    Bug("barrier of a simdgroup", SOFTMAX,
        "threadgroup_barrier", "simdgroup_barrier", "uninitialised read", "maxima"),
    Bug("all lanes write", SOFTMAX,
        "if (lane == 0) total", "total", "race", "total = sum"),
    Bug("memory used again too early", PRODUCT,
        BARRIER, "", "race", "tile", 1),
    Bug("rows of two threadgroups", SOFTMAX,
        "y[row * n", "y[row / 2 * n", "race", "part / total"),
    Bug("barrier in a branch", SOFTMAX,
        "= part / total;", f"= part / total;\nif (simdgroup == 0) {BARRIER}", "barrier divergence",
        "threadgroup_barrier"),
    Bug("some threads have returned", SOFTMAX,
        "float most", "if (simdgroup == 3) return;\nfloat most", "barrier divergence",
        "threadgroup_barrier"),
    Bug("different barriers", SOFTMAX,
        BARRIER, f"if (simdgroup < 2) {{ {BARRIER} }} else {{\n{BARRIER} }}", "barrier divergence",
        "threadgroup_barrier"),
    Bug("SIMD function in a branch", SOFTMAX,
        "float sum = simd_sum(part)", "float sum = 0; if (i < n)\n sum = simd_sum(part)",
        "SIMD divergence", "sum = simd_sum(part)"),
    Bug("lanes have returned", SOFTMAX,
        "float most", "if (i >= n) return;\nfloat most", "SIMD divergence", "simd_max"),
    Bug("matrix function in a branch", PRODUCT,
        "simdgroup_store", "if (lane < 16)\n simdgroup_store", "SIMD divergence",
        "simdgroup_store"),
    Bug("barrier of some lanes", SOFTMAX,
        "float most", "if (lane < 9)\nsimdgroup_barrier(mem_flags::mem_none);\nfloat most",
        "SIMD divergence", "simd_max"),
    Bug("lane 32", SOFTMAX,
        "simd_max(value)", "simd_shuffle(value, lane + 1)", "bad lane", "simd_shuffle"),
    Bug("lane xor 32", SOFTMAX,
        "simd_max(value)", "simd_shuffle_xor(value, 32)", "bad lane", "simd_shuffle_xor"),
    Bug("write to an input", SOFTMAX,
        "float most", "if (i == 0) ((device float*)x)[0] = 1;\nfloat most", "write to input",
        "((device float*)x)[0]"),
    Bug("output never written", SOFTMAX,
        "if (i < n) y", "if (i < n - 1) y", "unwritten output", ""),
    Bug("too much threadgroup memory", SOFTMAX,
        "threadgroup float total", "threadgroup float many[8190];\nthreadgroup float total",
        "threadgroup memory", "many"),
    Bug("misaligned vector", SOFTMAX,
        "float value =",
        "float value = i < n - 4 ? ((const device float4*)(x + i))->x : 0.0f;\n"
        "value =", "misaligned access", "float4"),
    Bug("misaligned word", SOFTMAX,
        "float value =",
        "float value = *(const device float*)((const device char*)x + i);\nvalue =",
        "misaligned access", "device char"),
    Bug("division by zero", SOFTMAX,
        "thread_index_in_threadgroup, lane", "thread_index_in_threadgroup + 0 / (n - 100), lane",
        "division by zero", "0 / (n"),
    Bug("endless loop", PRODUCT,
        "start += 8", "start += 0", "timeout", ""),
    Bug("endless loop without effect", SOFTMAX,
        "float most", "while (x_shape[0] == 3) {}\nfloat most", "timeout", ""),
    Bug("waiting for another thread", SOFTMAX,
        "float most",
        "threadgroup atomic_uint flag;\n"
        "if (simdgroup == 3) atomic_store_explicit(&flag, 1u, memory_order_relaxed);\n"
        "else if (simdgroup == 0) atomic_store_explicit(&flag, 0u, memory_order_relaxed);\n"
        "while (atomic_load_explicit(&flag, memory_order_relaxed) == 0) {}\n" "float most",
        "timeout", ""),
]
# fmt: on


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.label)
def test_bug(run: Runner, bug: Bug) -> None:
    pieces = bug.source.split(bug.old)
    at = bug.nth + 1
    assert len(pieces) > at
    source = bug.old.join(pieces[:at]) + bug.new + bug.old.join(pieces[at:])
    run.executor.timeout = 0.5
    with pytest.raises(MetalError) as raised:
        KERNELS[bug.source](run, source)
    error = raised.value
    assert (error.kernel, error.kind) == ("test", bug.kind), error
    assert bug.place in "".join(error.places), error
    assert bool(bug.place) == bool(error.places), error
    assert "kernel test: " + bug.kind in str(error)


@pytest.mark.parametrize("schedule", ["natural", "reversed", "random", "lockstep"])
def test_a_race_is_seen_in_every_schedule(run: Runner, schedule: str) -> None:
    run.executor.schedule = schedule
    with pytest.raises(MetalError) as raised:
        _softmax(run, SOFTMAX.replace(BARRIER, "", 1))
    assert raised.value.kind in ("race", "uninitialised read")


def test_a_race_that_checks_miss_shows_in_the_schedules(run: Runner) -> None:
    # Unchecked, the same kernel computes what the order of its threads makes of it.
    run.executor.mode = "fast"
    source = SOFTMAX.replace(BARRIER, "", 1)
    errors = {}
    for schedule in ("natural", "reversed"):
        run.executor.schedule = schedule
        errors[schedule] = _softmax(run, source)
    assert not all(error < 1e-5 for error in errors.values())


@pytest.mark.parametrize("threads", [288, 48])
def test_sizes_of_threadgroups(run: Runner, threads: int) -> None:
    with pytest.raises(MetalError, match="threads"):
        run("o[0] = 1;", {"o": Output((1,), mx.float32)}, threads=threads)


def test_the_second_place_of_a_race(run: Runner) -> None:
    with pytest.raises(MetalError) as raised:
        _softmax(run, "".join(SOFTMAX.rsplit(BARRIER, 1)))
    blamed, other = raised.value.places
    assert "if (i < n) y" in blamed
    assert "total = sum" in other
    assert "race on total[0]: a read after a write by thread 1 " in str(raised.value)


def test_a_place_in_a_file(run: Runner) -> None:
    header = """// A header.
inline float first(const device float* x) {
  return x[2];
}
"""
    with pytest.raises(MetalError) as raised:
        run("o[0] = first(x);", {"o": Output((1,), mx.float32)}, {"x": mx.zeros(2)}, header=header)
    assert raised.value.kind == "address space"
    x = mx.zeros(9)
    with pytest.raises(MetalError) as raised:
        run("o[0] = first(x + 8);", {"o": Output((1,), mx.float32)}, {"x": x}, header=header)
    assert raised.value.places == ["  test.metal:3: return x[2];"]
    assert raised.value.kind == "out-of-bounds read"


@pytest.mark.parametrize("schedule", ["natural", "reversed"])
def test_a_stack_that_overflows(run: Runner, schedule: str) -> None:
    """It ends at the page behind the stack, also where what follows is another thread's stack."""
    run.executor.schedule = schedule
    large = "float large[40000]; for (uint j = 0; j < 40000; j++) large[j] = i + j;\n"
    source = SOFTMAX.replace("float most", f"{large}value += 0 * large[i * 100];\nfloat most", 1)
    with pytest.raises(MetalError, match="bad address: stack overflow"):
        KERNELS[SOFTMAX](run, source)
