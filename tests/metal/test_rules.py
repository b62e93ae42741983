"""What is C++ but not Metal is refused, where it stands; what is Metal is not."""

import mlx.core as mx
import pytest

from gemma_mtp_mlx.kernels.kernel import Output
from tests.metal.conftest import Runner
from tests.metal.errors import MetalError

# Each: label, header, source, kind and message, and what the blamed line contains.
REFUSED = [
    # Address spaces.
    ("device for threadgroup", "inline float f(const threadgroup float* p) { return p[0]; }",
     "o[0] = f(x);", "address space", "f(x)"),
    ("device for constant", "template <typename T> T f(constant T* p) { return p[0]; }",
     "o[0] = f(x);", "address space", "f(x)"),
    ("constant for device", "inline float f(const device float* p) { return p[0]; }",
     "o[0] = f(small);", "address space", "f(small)"),
    ("thread for device", "inline void f(device float* p) { p[0] = 1; }",
     "float v; f(&v); o[0] = v;", "address space", "f(&v)"),
    ("threadgroup for thread", "inline void f(thread float& p) { p = 1; }",
     "threadgroup float v;\nf(v);\no[0] = 1;", "address space", "f(v)"),
    ("const is lost", "inline void f(device float* p) { p[0] = 1; }",
     "f(x); o[0] = 1;", "no matching function", ""),
    ("in a template that is used", "template <typename P> void f(P p) { device float* q = p; }",
     "threadgroup float v[2];\nf(&v[0]);\no[0] = 1;", "address space", "device float* q = p"),
    ("cast between spaces", "", "threadgroup float* p = (threadgroup float*)o;\no[0] = p != 0;",
     "cast between", "(threadgroup float*)o"),
    ("pointer to nowhere", "inline float f(const float* p) { return p[0]; }",
     "o[0] = 1;", "no address space: const float*", "const float* p"),
    ("reference to nowhere", "template <typename T> void f(T& p) { p = 1; }",
     "o[0] = 1;", "no address space: T&", "T& p"),
    ("member that points nowhere", "struct S {\n  float* p;\n};",
     "o[0] = 1;", "no address space: float*", "float* p"),
    ("threadgroup memory of a function", "inline void f() {\n  threadgroup float v[2];\n}",
     "o[0] = 1;", "outside the kernel", "float v[2]"),
    ("assigned to an input", "", "x[0] = 1;\no[0] = 1;", "not assignable", ""),
    # Types and conversions.
    ("double", "", "double d = 1; o[0] = d;", "no double", "double d"),
    ("bfloat from float", "", "bfloat b = x[0];\no[0] = b;", "explicit conversion", "b = x[0]"),
    ("bfloat from sum", "", "bfloat b = 0.0bf;\nb += x[0];\no[0] = b;", "explicit", "b += x[0]"),
    ("vector of too few", "", "float4 v = float4(x[0], x[1], x[2]); o[0] = v.x;",
     "compile", ""),
    ("mixed maximum", "", "o[0] = max(x[0], 0);", "compile", ""),
    ("shuffled bool", "", "o[0] = simd_shuffle_xor(x[0] > 0, 1);", "compile", ""),
    # Storage and program structure.
    ("static variable", "", "static float v = 1;\no[0] = v;", "static variable", "static float v"),
    ("static in a function", "inline float f() {\n  static int v;\n  return v++;\n}",
     "o[0] = f();", "static variable", "static int v"),
    ("global variable", "float V = 1;", "o[0] = V;", "neither constant", ""),
    ("constant not in constant", "constexpr float V = 1;", "o[0] = V;",
     "not `constant`", "constexpr float V"),
    ("member not in constant", "struct S {\n  static constexpr int V = 1;\n};",
     "o[0] = S::V;", "not `constant`", "constexpr int V"),
    ("recursion", "inline int f(int n) {\n  return n < 2 ? 1 : n * f(n - 1);\n}",
     "o[0] = f(x[0]);", "recursion", "f(n - 1)"),
    ("mutual recursion",
     "int g(int n);\ninline int f(int n) {\n  return n ? g(n - 1) : 0;\n}\n"
     "inline int g(int n) {\n  return n ? f(n - 1) : 1;\n}",
     "o[0] = f(x[0]);", "recursion", "(n - 1)"),
    ("function pointer", "typedef float (*F)(float);\ninline float f(float a) { return a; }",
     "F p = i < 3 ? f : nullptr;\no[0] = p(x[0]);", "function by pointer", "p(x[0])"),
    ("lambda", "", "auto f = [=](float a) { return a + 1; };\no[0] = f(x[0]);",
     "no lambdas", "auto f"),
    ("new", "", "device float* p = 0; thread float* q = new float[2]; o[0] = q[0];",
     "no heap", "new float"),
    ("malloc", "", "thread float* q = (thread float*)__builtin_malloc(8); o[0] = q[0];",
     "there is no malloc", "malloc"),
    ("goto", "", "again:\nif (o[0] < 0) goto again;\no[0] = 1;", "no goto", "goto again"),
    ("virtual", "struct S {\n  virtual float f() { return 1; }\n};", "o[0] = 1;",
     "no virtual functions", "virtual"),
    ("std", "", "o[0] = std::max(1.0f, 2.0f);", "no standard library", "std::max"),
    ("header", "#include <cmath>\n", "o[0] = 1;", "#include of cmath", "cmath"),
    ("matrix without its header", "", "simdgroup_matrix<float, 8, 8> m; o[0] = 1;",
     "metal_simdgroup_matrix", ""),
    ("unknown function", "", "o[0] = lgamma(x[0]);", "compile", ""),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_refused(run: Runner, case: tuple[str, str, str, str, str]) -> None:
    _, header, source, message, place = case
    inputs = {"x": mx.zeros(64), "small": mx.zeros(7)}
    source = f"uint i = thread_position_in_grid.x;\nif (i == 0) {{\n{source}\n}}"
    with pytest.raises(MetalError) as raised:
        run(source, {"o": Output((1,), mx.float32)}, inputs, header=header + "\n")
    assert message in str(raised.value)
    assert place in "".join(raised.value.places)


ALLOWED = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

constant constexpr uint COUNT = 4;
constant float TABLE[COUNT] = {1, 2, 3, 4};
enum Way : uint { FORTH, BACK };
using Four = vec<float, 4>;

// Classes, by value, that hold pointers; templates over address spaces; functions by type.
template <typename T>
struct Rows {
  const device T* data;
  uint width;
  static uint twice(uint n) { return 2 * n; }
  const device T* row(uint i) const { return data + i * width; }
  thread float& first(thread float (&values)[COUNT]) const { return values[0]; }
};

template <typename P>
inline float sum(P values, uint count) {
  float total = 0;
#pragma unroll
  for (uint i = 0; i < count; i++) total += float(values[i]);
  return total;
}

template <int N>
inline float nested(float x) {
  return nested<N - 1>(x) + 1;
}
template <>
inline float nested<0>(float x) {
  return x;
}

inline half4 rounded(float4 x) { return half4(x); }

template <typename F>
inline float apply(F f, float x) {
  return f(x);
}
struct Add {
  float y;
  float operator()(float x) const { return x + y; }
};

inline float scaled(thread const float* values, constant float* by) {
  return values[0] * by[0] + float(as_type<half2>(as_type<uint>(1.0f)).x);
}
"""


def test_allowed(run: Runner) -> None:
    source = """
      threadgroup float shared[64];
      threadgroup half4 fours[16];
      uint i = thread_index_in_threadgroup;
      const Rows<float> rows{x, 8};
      float values[COUNT] = {1, 2, 3, 4};
      rows.first(values) = TABLE[i % COUNT];
      shared[i] = sum(rows.row(i % 8), 8) + scaled(values, small);
      Four four = Four(shared[i], 1, 2, 3) * 2.0f;
      four.xy = four.yx;
      if (i % 4 == 0) fours[i / 4] = rounded(four);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float4 other = float4(fours[i / 4]);
      const device float4* loaded = (const device float4*)x;
      float total = sum(shared, 4) + sum(&values[0], 4) + other.w + dot(loaded[0], other);
      total = apply(Add{1}, nested<3>(total)) + Rows<float>::twice(BACK) + simd_max(shared[i]);
      o[i] = static_cast<bfloat>(isnan(total) ? 0 : clamp(total, -100.0f, 100.0f));
    """
    (o,) = run(
        source,
        {"o": Output((64,), mx.bfloat16)},
        {"x": mx.ones(64), "small": mx.ones(3)},
        header=ALLOWED,
    )
    assert mx.isfinite(o).all()
