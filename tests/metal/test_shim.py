"""The shim's types and functions: vectors, mathematics, integers, atomics."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.kernel import Output
from tests.metal.conftest import Runner

GRID = np.concatenate([np.linspace(-4, 4, 61), [0.0, 30.0, -30.0]]).astype(np.float32)


def _same_values(run: Runner, expressions: dict[str, float], dtype: mx.Dtype = mx.float32) -> None:
    """Each expression has the value given."""
    source = "".join(f"o[{i}] = {expression};\n" for i, expression in enumerate(expressions))
    source = f"if (thread_position_in_grid.x == 0) {{\n{source}}}"
    (o,) = run(source, {"o": Output((len(expressions),), dtype)})
    assert dict(zip(expressions, o.tolist(), strict=True)) == expressions


def test_vectors(run: Runner) -> None:
    _same_values(
        run,
        {
            "float4(1, 2, 3, 4).w": 4,
            "float4(float2(1, 2), 3, 4).z": 3,
            "float4(1, float3(2, 3, 4)).w": 4,
            "float4(float3(1, 2, 3), 4).w": 4,
            "float4(float2(1, 2), float2(3, 4)).z": 3,
            "float3(1, float2(2, 3)).z": 3,
            "float4(7).y": 7,
            "float4(uchar4(1, 2, 3, 200)).w": 200,
            "float4(1, 2, 3, 4).wzyx.xy.y": 3,
            "float3(1, 2, 3).zxy.x": 3,
            "float2(1, 2).yx.x": 2,
            "(float2(1, 2) * 3 + float2(10, 20)).y": 26,
            "(2.0f / float2(1, 4)).y": 0.5,
            "(-float2(1, 4)).y": -4,
            "(uint2(6, 5) >> 1).y + (uint2(1, 2) << uint2(3, 4)).y": 34,
            "any(float2(1, 2) > 1.5f) + 2 * all(float2(1, 2) > 1.5f)": 1,
            "select(float2(1, 2), float2(3, 4), float2(1, 2) > 1.5f).y": 4,
            "dot(float4(1, 2, 3, 4), float4(2))": 20,
            "length(float2(3, 4))": 5,
            "max(float2(1, 5), float2(3, 4)).x": 3,
            "clamp(float2(-1, 5), 0.0f, 2.0f).y": 2,
            "sizeof(float3) + sizeof(packed_float3)": 28,
            "as_type<float>(0x3f800000u)": 1,
            "float(as_type<half2>(0x3c004000u).x)": 2,
        },
    )


def test_parts_of_vectors_are_assigned(run: Runner) -> None:
    source = """
      float4 v(0);
      v.yw = float2(3, 4);
      v.zyx = float3(1, v.y, 2);
      v[3] += 1;
      v *= 2;
      packed_float3 p = float3(v.xyz);
      for (int i = 0; i < 4; i++) o[i] = v[i];
      o[4] = p[2];
    """
    (o,) = run(
        f"if (thread_position_in_grid.x == 0) {{ {source} }}", {"o": Output((5,), mx.float32)}
    )
    assert o.tolist() == [4, 6, 2, 10, 2]


def test_integers(run: Runner) -> None:
    _same_values(
        run,
        {
            "max(3u, 5u) + min(-3, 5) * 10": -25,
            "clamp(7, 1, 5)": 5,
            "abs(-7)": 7,
            "popcount(0xf0f0u)": 8,
            "clz(1u) * 100 + ctz(8u)": 3103,
            "clz(ushort(1))": 15,
            "rotate(0x80000001u, 1u)": 3,
            "extract_bits(0xabcdu, 4, 8)": 0xBC,
            "extract_bits(0x00f0, 4, 4) + extract_bits(0x0070, 4, 4)": -1 + 7,
            "insert_bits(0xffffu, 0u, 4, 8)": 0xF00F,
            "mulhi(0x80000000u, 6u)": 3,
            "uchar(300) + ushort(65537)": 45,
            "numeric_limits<short>::lowest()": -32768,
            "int(uchar4(0xff)[3])": 255,
        },
        mx.int32,
    )


@pytest.mark.parametrize("space", ["", "precise::", "fast::"])
def test_mathematics(run: Runner, space: str) -> None:
    functions = {
        "exp": np.exp, "exp2": np.exp2, "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
        "floor": np.floor, "ceil": np.ceil, "rint": np.rint, "trunc": np.trunc, "fabs": np.abs,
    }  # fmt: skip
    positive = {"log": np.log, "log2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x)}
    source = "uint i = thread_position_in_grid.x;\n"
    for n, name in enumerate([*functions, *positive]):
        argument = "x[i]" if name in functions else "fabs(x[i]) + 0.5f"
        source += f"o[{n} * 64 + i] = {space}{name}({argument});\n"
    shape = (len(functions) + len(positive), 64)
    (o,) = run(source, {"o": Output(shape, mx.float32)}, {"x": mx.array(GRID)})
    x = GRID.astype(np.float64)
    expected = [f(x) for f in functions.values()]
    expected += [f((np.abs(GRID) + np.float32(0.5)).astype(np.float64)) for f in positive.values()]
    # libm's error is under one unit in the last place, 2^-23; rsqrt's under two.
    np.testing.assert_allclose(np.array(o), expected, rtol=2**-22, atol=2**-126)


def test_mathematics_in_half_and_bfloat(run: Runner) -> None:
    half = np.float16(1.7)
    assert run.values("exp(half(1.7h))", mx.float16)[0] == np.float16(np.exp(np.float32(half)))
    assert run.values("max(half(1), half(2))", mx.float16)[0] == 2
    assert run.values("isnan(half(NAN)) + isinf(bfloat(INFINITY)) + isfinite(1.0f)")[0] == 3
    assert run.values("Limits<bfloat16_t>::finite_max", mx.bfloat16)[0] == 3.3895313892515355e38


def test_atomics(run: Runner) -> None:
    source = """
      threadgroup atomic_uint count, most, bits, one;
      threadgroup atomic<float> sum;
      uint i = thread_position_in_threadgroup.x;
      if (i == 0) {
        atomic_store_explicit(&count, 0u, memory_order_relaxed);
        atomic_store_explicit(&most, 0u, memory_order_relaxed);
        atomic_store_explicit(&bits, 0u, memory_order_relaxed);
        atomic_store_explicit(&one, 0u, memory_order_relaxed);
        atomic_store_explicit(&sum, 0.0f, memory_order_relaxed);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint place = atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
      atomic_fetch_max_explicit(&most, i * 3, memory_order_relaxed);
      atomic_fetch_or_explicit(&bits, 1u << i % 32, memory_order_relaxed);
      atomic_fetch_add_explicit(&sum, 0.5f, memory_order_relaxed);
      uint expected = 0;
      bool won = atomic_compare_exchange_weak_explicit(
          &one, &expected, 1u, memory_order_relaxed, memory_order_relaxed);
      o[place] = i;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (won) {
        p[0] = atomic_load_explicit(&count, memory_order_relaxed);
        p[1] = atomic_load_explicit(&most, memory_order_relaxed);
        p[2] = atomic_load_explicit(&bits, memory_order_relaxed);
        p[3] = uint(atomic_load_explicit(&sum, memory_order_relaxed));
      }
    """
    outputs = {"o": Output((64,), mx.uint32), "p": Output((4,), mx.uint32)}
    for schedule in ("natural", "reversed", "random"):
        run.executor.schedule = schedule
        o, p = run(source, outputs)
        assert sorted(o.tolist()) == list(range(64))
        assert p.tolist() == [64, 63 * 3, 2**32 - 1, 32]
    assert o.tolist() != sorted(o.tolist())  # at random


def test_atomics_on_an_output(run: Runner) -> None:
    source = """
      device atomic_uint* counts = (device atomic_uint*)o;
      uint i = thread_position_in_threadgroup.x;
      if (i < 2) atomic_store_explicit(&counts[i], 0u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_device);
      atomic_fetch_add_explicit(&counts[i % 2], i, memory_order_relaxed);
    """
    (o,) = run(source, {"o": Output((2,), mx.uint32)})
    assert o.tolist() == [sum(range(0, 64, 2)), sum(range(1, 64, 2))]


def test_what_mlx_gives_every_kernel(run: Runner) -> None:
    source = """
      uint i = thread_position_in_grid.x;
      o[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)] + T(ceildiv(i, 2u));
    """
    x = mx.arange(256).astype(mx.float16).reshape(16, 16)[::2, 1::2]
    (o,) = run(
        source,
        {"o": Output((64,), mx.float16)},
        {"x": x},
        template={"T": mx.float16},
        row_contiguous=False,
    )
    expected = np.arange(256).reshape(16, 16)[::2, 1::2].ravel() + (np.arange(64) + 1) // 2
    np.testing.assert_array_equal(np.array(o), expected)
