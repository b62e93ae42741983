"""The text that is executed is MLX's own, and only what C++ cannot express is rewritten."""

import mlx.core as mx
import pytest

from tests.metal.capture import kernel_text
from tests.metal.signature import parse_signature
from tests.metal.tokens import split, without_comments
from tests.metal.translate import program, spaces_program, translate

SOURCE = """
  uint i = thread_position_in_grid.x;
  o[i] = T(a[a_shape[0] - 1]) * s + z[0] + (B ? N : n_strides[0]) + n_ndim;
  p[i] = simdgroup_index_in_threadgroup;
"""
# What mlx 0.32.4 makes of it. `a` and `n` have 8 elements or more; z has fewer, s no dimension.
TEXT = """// header
template <typename T, int N, bool B>
[[kernel]] void custom_kernel_all__bfloat16_t__3_1_float16_t_floats_int8_tc_uint64_t_bfloat16_t_int32_t(
  const device float16_t* a [[buffer(0)]],
  const constant int* a_shape [[buffer(1)]],
  const constant float& s [[buffer(2)]],
  const constant int8_t* z [[buffer(3)]],
  const device uint64_t* n [[buffer(4)]],
  const constant int64_t* n_strides [[buffer(5)]],
  const constant int& n_ndim [[buffer(6)]],
  device bfloat16_t* o [[buffer(7)]],
  device int32_t* p [[buffer(8)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
"""


def _capture(source: str, header: str, inputs: dict[str, mx.array], template: list) -> str:
    kernel = mx.fast.metal_kernel(
        name="all",
        input_names=list(inputs),
        output_names=["o", "p"],
        source=source,
        header=header,
    )
    call = {
        "template": template,
        "grid": (64, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(64,), (64,)],
        "output_dtypes": [mx.bfloat16, mx.int32],
    }
    return kernel_text(kernel, list(inputs.values()), call)


def test_text(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    inputs = {
        "a": mx.zeros((8,), mx.float16),
        "s": mx.array(2.0),
        "z": mx.zeros((7,), mx.int8),
        "n": mx.zeros((4, 2), mx.uint64),
    }
    text = _capture(SOURCE, "// header\n", inputs, [("T", mx.bfloat16), ("N", -3), ("B", True)])
    assert text.startswith(TEXT + SOURCE + "\n}\n"), text
    name = "custom_kernel_all__bfloat16_t__3_1_float16_t_floats_int8_tc_uint64_t_bfloat16_t_int32_t"
    instance = f"{name}<bfloat16_t, -3, 1>"
    assert text[len(TEXT + SOURCE) + 3 :].strip() == (
        f'template [[host_name("{name}")]] [[kernel]] decltype({instance}) {instance};'
    )
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"

    signature = parse_signature(text)
    assert (signature.name, signature.arguments) == (name, "<bfloat16_t, -3, 1>")
    assert [p.name for p in signature.buffers] == [
        "a", "a_shape", "s", "z", "n", "n_strides", "n_ndim", "o", "p"
    ]  # fmt: skip
    assert text.splitlines()[signature.body_line - 1] == SOURCE.splitlines()[0]
    s, z = signature.buffers[2:4]
    assert (s.type, s.mark, s.element) == ("const constant float", "&", "float")
    assert (z.type, z.mark, z.attribute) == ("const constant int8_t", "*", "buffer(3)")
    assert "*(const constant float*)buffers[2], (const constant int8_t*)buffers[3]" in program(
        text, signature, unroll=True
    )


def test_without_a_template() -> None:
    signature = parse_signature(_capture("o[0] = p[0] = x[0];", "", {"x": mx.zeros(9)}, []))
    assert signature.arguments == ""
    assert [p.name for p in signature.parameters] == ["x", "o", "p"]


def _declared(text: str) -> tuple[list[tuple], str]:
    found: list[tuple] = []

    def declare(*variable: object) -> str:
        found.append(variable)
        return f"<{variable[-1]}>"

    return found, translate(text, declare)


def test_threadgroup_variables() -> None:
    text = """void f(threadgroup float* p, const threadgroup half& q) {
  threadgroup float a[N * (M + 1)],  // comment
      b[2][4];
  threadgroup vec<float, 4> c;
  threadgroup float* d = a; threadgroup float& e = a[0];
  threadgroup atomic<uint> g;
}
"""
    found, rewritten = _declared(text)
    assert found == [
        ("float", "a", "[N * (M + 1)]", 0),
        ("float", "b", "[2][4]", 1),
        ("vec<float, 4>", "c", "", 2),
        ("atomic<uint>", "g", "", 3),
    ]
    assert rewritten.count("\n") == text.count("\n")
    lines = rewritten.splitlines()
    assert lines[0] == text.splitlines()[0]
    assert lines[1].strip() == "<0><1>" and lines[3].strip() == "<2>"
    assert lines[4] == text.splitlines()[4] and lines[5].strip() == "<3>"


def test_literals() -> None:
    literals = {
        "1.5": "1.5f", "2.": "2.f", ".5": ".5f", "1e3": "1e3f", "1.5e-3": "1.5e-3f", "1": "1",
        "0x1e3": "0x1e3", "1.5f": "1.5f", "2.0h": "2.0h", "1.5bf": "bfloat(1.5f)", "3u": "3u",
    }  # fmt: skip
    for before, after in literals.items():
        assert translate(f"x = {before};", lambda *_: "") == f"x = {after};"
    text = '// 1.5 threadgroup float a;\n"1.5"; #define A 1.5\n'
    assert translate(text, lambda *_: "").startswith('// 1.5 threadgroup float a;\n"1.5";')


def test_vectors_are_made_where_pointers_have_spaces() -> None:
    text = """using F = vec<float, 4>;
vec<T, 4> f(float4 a) { return vec<T, 4>(float4(1, 2, 3, 4)) + F(a) * vec<T, 4>{1}; }
"""
    made = spaces_program(text).split('#line 1 "kernel"\n')[1]
    assert "return make_vector<vec<T, 4>>(make_vector<float4>(1, 2, 3, 4))" in made
    assert "vec<T, 4> f(float4 a)" in made and "make_vector<F>(a) * vec<T, 4>{1}" in made


def test_tokens() -> None:
    text = '#include <a>\nfloat4 x = .5e-3f*y->z; // a "comment"\n/* and\nanother */ "a\\"b";'
    tokens = split(text)
    assert "".join(tokens) == text
    assert {"#include <a>", "float4", ".5e-3f", "->", '// a "comment"', '"a\\"b"'} <= set(tokens)
    blank = without_comments(text)
    assert len(blank) == len(text) and "comment" not in blank and "another" not in blank
    assert blank.count("\n") == text.count("\n")
