"""half and bfloat round at every operation, over all of their values."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.kernel import Output
from tests.metal.conftest import Runner

ALL = np.arange(2**16, dtype=np.uint16)
# One of each kind: what rounds away, ties, overflows, vanishes, is not finite.
OTHERS = [0.0, -1.0, 3.0, 1.00390625, 0.3333, 1e-5, 6e-8, 257.0, 40000.0, 1e30, np.inf, np.nan]


def _as_floats(bits: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    if dtype == mx.float16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Return the bits of float32 values in a dtype: to nearest, ties to even."""
    if dtype == mx.float16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _same(found: mx.array, expected: np.ndarray, dtype: mx.Dtype) -> None:
    """Equal bits, but for which NaN it is."""
    bits = np.array(found.view(mx.uint16))
    with np.errstate(invalid="ignore"):
        nan = np.isnan(expected)
        assert np.isnan(_as_floats(bits, dtype))[nan].all()
        np.testing.assert_array_equal(bits[~nan], _rounded(expected, dtype)[~nan])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_operations(run: Runner, dtype: mx.Dtype) -> None:
    source = """
      uint i = thread_position_in_grid.x, n = threads_per_grid.x;
      uint j = threadgroup_position_in_grid.y;
      T a = x[i], b = y[j];
      uint at = j * n + i;
      sum[at] = a + b;
      difference[at] = a - b;
      product[at] = a * b;
      ratio[at] = a / b;
      widened[at] = float(a);
    """
    other = mx.array(OTHERS, dtype=mx.float32).astype(dtype)
    inputs = {"x": mx.array(ALL).view(dtype), "y": other}
    shape = (len(OTHERS), 2**16)
    names = ("sum", "difference", "product", "ratio")
    outputs = {name: Output(shape, dtype) for name in names} | {
        "widened": Output(shape, mx.float32)
    }
    run.executor.mode = "fast"
    found = run(
        source, outputs, inputs, template={"T": dtype}, groups=(256, len(OTHERS), 1), threads=256
    )
    a = _as_floats(ALL, dtype)[None]
    b = np.array(other.astype(mx.float32))[:, None]
    with np.errstate(all="ignore"):
        for values, result in zip((a + b, a - b, a * b, a / b), found, strict=False):
            _same(result, values.astype(np.float32), dtype)
    np.testing.assert_array_equal(np.array(found[4])[0], a[0])


@pytest.mark.parametrize("mode", ["checked", "fast"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_from_float(run: Runner, dtype: mx.Dtype, mode: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 2**14, dtype=np.uint32)
    bits[: 2**13] = bits[: 2**13] & 0x80007FFF | 0x3F000000  # ties and near 1 for bfloat
    bits[:64] = np.arange(64) << 12 | 0x3F800000
    x = bits.view(np.float32)
    run.executor.mode = mode
    source = "o[thread_position_in_grid.x] = T(x[thread_position_in_grid.x]);"
    (o,) = run(
        source,
        {"o": Output((2**14,), dtype)},
        {"x": mx.array(x)},
        template={"T": dtype},
        groups=(64, 1, 1),
        threads=256,
    )
    _same(o, x, dtype)


@pytest.mark.parametrize("mode", ["checked", "fast"])
def test_each_operation_of_an_expression(run: Runner, mode: str) -> None:
    run.executor.mode = mode
    assert run.values("half(2048) + half(1) + half(1)", mx.float16)[0] == 2048
    assert run.values("half(60000) + half(60000) - half(60000)", mx.float16)[0] == np.inf
    assert run.values("bfloat(256.0f) + bfloat(1.0f) + bfloat(1.0f)", mx.bfloat16)[0] == 256
    # x * x - 1 in one rounding would not be 0; nor is it with an explicit fma.
    x = "(1.0f + 0.00012207031f + 0.0f * i)"
    assert run.values(f"{x} * {x} - 1.0002441f")[0] == 0
    assert run.values(f"fma({x}, {x}, -1.0002441f)")[0] != 0


def test_literals(run: Runner) -> None:
    assert run.values("float(0.1h)")[0] == np.float32(np.float16(0.1))
    assert run.values("float(0.1bf)")[0] == np.float32(0.10009765625)
    # 0.1 is a float, as there are no doubles.
    assert run.values("(0.1 + i * 0.0) * 3.0 == 0.1f * 3.0f")[0] == 1
