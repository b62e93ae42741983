"""Counting launches: where elements lie is MLX's own, counts are those worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from bench.metal import strides
from bench.metal.strides import Layout, fresh
from bench.metal.tally import launches
from bench.metal.tracing import empty, trace
from gemma_mtp_mlx.chips import find
from gemma_mtp_mlx.kernels.kernel import Kernel, Output

M3 = find("M3 Max").gpu
BF16 = mx.bfloat16


def lies(x: mx.array) -> tuple[int, ...]:
    mx.eval(x)
    view = memoryview(x)
    return tuple(step // view.itemsize for step in view.strides)


def random_view(rng: np.random.RandomState, x: mx.array, at: Layout) -> tuple[mx.array, Layout]:
    kind = rng.randint(4)
    if kind == 0:
        axes = rng.permutation(x.ndim).tolist()
        return x.transpose(axes), strides.transpose(at, axes)
    if kind == 1:
        axis = rng.randint(x.ndim)
        count, step = 1 + rng.randint(x.shape[axis]), 1 + rng.randint(2)
        index = [slice(None)] * x.ndim
        index[axis] = slice(0, count, step)
        found = x[tuple(index)]
        steps = [step if i == axis else 1 for i in range(x.ndim)]
        return found, strides.cut(at, found.shape, steps)
    if kind == 2:
        shape = [3 if n == 1 else n for n in x.shape]
        return mx.broadcast_to(x, shape), strides.broadcast(at, shape)
    sizes = [n for n in x.shape if n > 1] or [1]
    cut = rng.randint(len(sizes))
    shape = [*sizes[:cut], 1, int(np.prod(sizes[cut:]))]
    return x.reshape(shape), strides.reshape(at, shape) or fresh(shape)


@pytest.mark.parametrize("seed", range(60))
def test_views_lie_where_mlx_has_them(seed: int) -> None:
    rng = np.random.RandomState(seed)
    x = mx.arange(2 * 3 * 1 * 4 * 6).reshape(2, 3, 1, 4, 6)
    mx.eval(x)
    at = fresh(x.shape)
    for _ in range(5):
        x, at = random_view(rng, x, at)
        assert at.shape == x.shape
        real = zip(lies(x), at.strides, x.shape, strict=True)
        assert all(n == 1 or own == found for own, found, n in real), (lies(x), at)


def count(function: Callable[..., list[mx.array]], *shapes: tuple[int, ...]) -> dict[str, int]:
    return dict(launches(trace(function, *(empty(shape, BF16) for shape in shapes)), M3))


def test_views_are_free_and_elements_that_move_are_not() -> None:
    views = count(lambda x: [x[:, 2:].swapaxes(0, 1)[None], mx.broadcast_to(x, (3, 4, 8))], (4, 8))
    assert not views
    assert count(lambda x: [x.reshape(2, 2, 8)], (4, 8)) == {}
    assert count(lambda x: [x.swapaxes(0, 1).reshape(32)], (4, 8)) == {"copy": 1}
    assert count(lambda x: [mx.contiguous(x.swapaxes(0, 1))], (4, 8)) == {"copy": 1}
    assert count(lambda x: [mx.contiguous(x)], (4, 8)) == {}


def test_heads_of_one_position_are_swapped_with_it_for_nothing() -> None:
    def merge(x: mx.array) -> list[mx.array]:
        return [x.swapaxes(1, 2).reshape(1, x.shape[2], -1)]

    assert count(merge, (1, 4, 1, 8)) == {}
    assert count(merge, (1, 4, 2, 8)) == {"copy": 1}


def test_parts_of_a_concatenation_are_copied_one_by_one() -> None:
    found = count(lambda x, y: [mx.concatenate([x, y, x], axis=1)], (4, 8), (4, 2))
    assert found == {"Concatenate": 3}


def test_updates_are_in_place_where_nobody_else_looks() -> None:
    def written(cache: mx.array, fresh: mx.array) -> list[mx.array]:
        cache[:, 2:3] = fresh
        return [cache]

    def watched(cache: mx.array, fresh: mx.array) -> list[mx.array]:
        before = cache[:, 1:2] + 1
        return [*written(cache, fresh), before]

    def scattered(cache: mx.array, fresh: mx.array) -> list[mx.array]:
        return [mx.put_along_axis(cache, mx.array([[3]]), fresh, axis=1)]

    assert count(written, (4, 8), (4, 1)) == {"SliceUpdate": 1}
    assert count(watched, (4, 8), (4, 1)) == {"SliceUpdate": 1, "copy": 1, "Add": 1}
    assert count(scattered, (4, 8), (4, 1)) == {"ScatterAxis": 1}


def test_fast_operations_are_one_launch_each() -> None:
    def heads(x: mx.array, weight: mx.array) -> list[mx.array]:
        h = mx.fast.rms_norm(x.reshape(1, 3, 2, 16), weight, 1e-6).swapaxes(1, 2)
        return [mx.fast.rope(h, 16, traditional=False, base=1e4, scale=1.0, offset=7)]

    assert count(heads, (1, 3, 32), (16,)) == {"rms_norm": 1, "rope": 1}


@pytest.mark.parametrize(
    "dim, length, mask, expected",
    [
        (256, 4, None, {"attention": 1}),
        (256, 4, "causal", {"attention": 1}),
        (512, 4, None, {"Multiply": 1, "Matmul": 2, "Softmax": 1}),
        (
            512,
            4,
            "causal",
            {"Multiply": 1, "Matmul": 2, "Softmax": 1, "Arange": 2, "GreaterEqual": 1, "Select": 1},
        ),
    ],
)
def test_attention_unfolds_where_a_gpu_unfolds_it(
    dim: int, length: int, mask: str | None, expected: dict[str, int]
) -> None:
    def attend(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return [mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)]

    assert count(attend, (1, 8, length, dim), (1, 2, 40, dim), (1, 2, 40, dim)) == expected


def test_attention_over_many_keys_is_two_launches() -> None:
    def attend(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return [mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)]

    kv = (1, 2, 1024, 256)
    assert count(attend, (1, 8, 1, 256), kv, kv) == {"attention": 2}


def test_masks_of_several_rows_are_copied_for_every_head() -> None:
    def attend(q: mx.array, k: mx.array, v: mx.array, x: mx.array) -> list[mx.array]:
        return [mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=x.astype(mx.bool_))]

    kv, mask = (2, 2, 40, 256), (2, 1, 1, 40)
    found = count(attend, (2, 4, 1, 256), kv, kv, mask)
    assert found == {"attention": 1, "copy": 1, "AsType": 1}


def test_compiled_functions_are_what_mlx_fuses_them_to() -> None:
    # x ** 3 is computed before the rest: MLX fuses no deeper than eleven operations.
    assert count(lambda x: [nn.gelu_approx(x)], (4, 8)) == {"compiled": 2}
    assert count(lambda x: [nn.silu(x)], (4, 8)) == {"compiled": 1}


def test_our_kernels_are_one_launch_and_copy_what_they_must() -> None:
    def kernel(*, row_contiguous: bool) -> Kernel:
        return Kernel("twice", ["x"], ["y"], "", [], row_contiguous=row_contiguous)

    def run(strict: Kernel) -> Callable[[mx.array], list[mx.array]]:
        return lambda x: strict.launch([x.swapaxes(0, 1)], (1, 1, 1), [Output((8, 4), BF16)], {})

    assert count(run(kernel(row_contiguous=True)), (4, 8)) == {"twice": 1, "copy": 1}
    assert count(run(kernel(row_contiguous=False)), (4, 8)) == {"twice": 1}


def test_a_gemm_that_splits_its_sums_is_two_launches() -> None:
    layer = nn.QuantizedLinear(512, 256, bias=False)
    layer.set_dtype(BF16)
    mx.eval(layer.parameters())
    assert count(lambda x: [layer(x)], (1, 12, 512)) == {"QuantizedMatmul": 1}
    assert count(lambda x: [layer(x)], (1, 13, 512)) == {"QuantizedMatmul": 2}


def test_unknown_primitives_are_an_error() -> None:
    with pytest.raises(ValueError, match="Hadamard"):
        count(lambda x: [mx.hadamard_transform(x)], (4, 8))


def run_bench(*arguments: str) -> dict:
    command = [sys.executable, "-m", "bench.launches", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def counted() -> dict[str, dict]:
    found = run_bench("--models", "E4B", "26B-A4B", "--lengths", "1")
    return {each["model"]: each for each in found["passes"]}


def test_layers_of_mlx_lm_by_hand(counted: dict[str, dict]) -> None:
    kinds = counted["E4B"]["mlx_lm"]["kinds"]
    # Queries, keys, values, output; gate, up, down; the per-layer gate and projection.
    assert kinds["sliding"]["QuantizedMatmul"] == 9
    # Before and after attention and MLP, after the per-layer input; queries, keys and values.
    assert kinds["sliding"]["rms_norm"] == 8
    # 9 + 8, two RoPEs, two cache updates, attention, three residuals, two activations of two
    # launches each, the per-layer product and the layer's scalar.
    assert sum(kinds["sliding"].values()) == 31
    # Without keys and values: two matmuls, two norms, a RoPE and two updates less.
    assert sum(kinds["sliding, shared keys"].values()) == 24
    # Attention of four query heads per key head over 512 entries is not fused: scale, scores,
    # softmax, values.
    assert sum(kinds["full"].values()) == 31 - 1 + 4
    sizes = {"sliding": 20, "full": 4, "sliding, shared keys": 15, "full, shared keys": 3}
    layers = sum(sizes[kind] * sum(parts.values()) for kind, parts in kinds.items())
    assert counted["E4B"]["mlx_lm"]["layer"] == round(layers / 42, 2)


def test_experts_of_mlx_lm_by_hand(counted: dict[str, dict]) -> None:
    kind = counted["26B-A4B"]["mlx_lm"]["kinds"]["sliding"]
    # Gate, up and down of the experts; each makes the row numbers of its left operand, and the
    # first two copy theirs, for which axes of one were put in.
    assert (kind["GatherQMM"], kind["Arange"], kind["copy"]) == (3, 3, 2)
    assert kind["QuantizedMatmul"] == 8  # seven as in 31B, and the router


def test_a_pass_is_its_layers_and_little_else(counted: dict[str, dict]) -> None:
    for model, found in counted.items():
        layers = {"E4B": 42, "26B-A4B": 30}[model]
        rest = found["mlx_lm"]["pass"] - layers * found["mlx_lm"]["layer"]
        assert 8 <= rest <= 40, (model, rest)


def test_layers_take_half_of_what_mlx_lm_takes(counted: dict[str, dict]) -> None:
    for model, found in counted.items():
        ours, theirs = found["ours"]["layer"], found["mlx_lm"]["layer"]
        assert ours <= theirs / 2, (model, ours, theirs)
