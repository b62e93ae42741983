"""Linear layers over few positions: sums, formats, and positions that do not see each other."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from gemma_mtp_mlx.kernels import verify_matmul, weights
from gemma_mtp_mlx.kernels.geglu import geglu
from gemma_mtp_mlx.kernels.kernel import Kernel
from gemma_mtp_mlx.kernels.verify_matmul import (
    gated,
    gated_by,
    gated_by_metal,
    gated_by_reference,
    gated_metal,
    gated_reference,
    project,
    project_metal,
    project_reference,
)
from tests.kernels.exact import check_errors, draw, exact
from tests.kernels.linear import (
    EIGHT,
    FOUR,
    PLAIN,
    ROUNDING,
    Format,
    check_product,
    exact_weight,
    linear,
    one_by_one,
    same_bits,
    with_scales,
)
from tests.metal.executor import Executor

# ---- the sums ----------------------------------------------------------------------------------

# Input and output widths of E2B, E4B, 12B, 26B, 31B, their drafters, the tiny families and the
# built-in pair, with all paths and the formats they are published in. Only K matters here.
SHAPES = [
    (1536, FOUR, mx.bfloat16, 1),
    (6144, FOUR, mx.bfloat16, 5),
    (2560, EIGHT, mx.bfloat16, 2),
    (3840, FOUR, mx.bfloat16, 8),
    (15360, FOUR, mx.bfloat16, 3),
    (2816, EIGHT, mx.bfloat16, 9),
    (2112, FOUR, mx.bfloat16, 4),
    (704, FOUR, mx.float16, 16),
    (5376, FOUR, mx.bfloat16, 4),
    (21504, FOUR, mx.bfloat16, 6),
    (1024, PLAIN, mx.bfloat16, 1),
    (8192, PLAIN, mx.float16, 7),
    (256, FOUR, mx.float32, 17),
    (128, EIGHT, mx.float32, 3),
    (64, FOUR, mx.float32, 33),
    (192, PLAIN, mx.float32, 64),
    (160, Format("affine", 4, 32), mx.float16, 4),
    (448, FOUR, mx.float16, 12),
    (512, EIGHT, mx.float16, 10),
]


@pytest.mark.parametrize(("width", "form", "dtype", "count"), SHAPES)
def test_is_as_exact_as_its_additions(
    metal: Executor, width: int, form: Format, dtype: mx.Dtype, count: int
) -> None:
    layer = linear(form, width, 24, dtype)
    x = draw(1, count, width, dtype=dtype)
    check_product(project_metal(x, layer)[0], x, layer)


# ---- positions do not see each other -----------------------------------------------------------
# In float32, where rounding the result does not hide another order of additions.


def test_every_number_of_positions_has_the_same_bits(metal: Executor) -> None:
    layer = linear(FOUR, 576, 16)
    x = draw(3, 17, 576, dtype=mx.float32)
    singly = one_by_one(lambda row: project_metal(row, layer)[0], x)
    for count in range(2, 18):
        assert same_bits(project_metal(x[-count:], layer)[0], singly[-count:])


def test_so_has_the_matrix_unit_alone(metal: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(FOUR, 576, 16)
    x = draw(3, 4, 576, dtype=mx.float32)
    usual = [project_metal(x[:count], layer)[0] for count in (1, 4)]
    monkeypatch.setattr(weights, "FEW", 0)
    found = [project_metal(x[:count], layer)[0] for count in (1, 4)]
    assert all(same_bits(*pair) for pair in zip(found, usual, strict=True))
    assert [record.kernel for record in metal.launches[2:]] == ["project_tiles"] * 2


def test_sixty_four_positions_are_sixty_four_single_ones(metal: Executor) -> None:
    layer = linear(FOUR, 704, 16)
    x = draw(3, 64, 704)
    together = project_metal(x, layer)[0]
    assert same_bits(together, one_by_one(lambda row: project_metal(row, layer)[0], x))
    assert same_bits(together[:33], project_metal(x[:33], layer)[0])


@pytest.mark.parametrize("name", ["PROJECT", "GATED", "GATED_BY"])
def test_simdgroups_do_not_change_bits(
    metal: Executor, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one, two = (linear(FOUR, 704, 24, key=key) for key in (0, 1))
    values = draw(5, 9, 24, dtype=mx.float32)
    operation: Callable[[mx.array], mx.array] = {
        "PROJECT": lambda x: project_metal(x, one, two)[1],
        "GATED": lambda x: gated_metal(x, one, two),
        "GATED_BY": lambda x: gated_by_metal(x, one, values[: len(x)]),
    }[name]
    x = draw(4, 9, 704, dtype=mx.float32)
    kernels = getattr(verify_matmul, name)
    for kernel, count in ((kernels.rows, 3), (kernels.tiles, 9)):
        usual = operation(x[:count])
        for threads in (64, 128, 256):
            monkeypatch.setattr(kernel, "threads", threads)
            assert same_bits(operation(x[:count]), usual)
            assert metal.launches[-1].threads == threads


@pytest.mark.parametrize("schedule", ["reversed", "random", "lockstep"])
def test_the_order_of_threads_does_not_change_bits(metal: Executor, schedule: str) -> None:
    layer = linear(FOUR, 512, 40)
    x = draw(6, 9, 512, dtype=mx.float32)
    usual = [project_metal(x[:count], layer)[0] for count in (3, 9)]
    metal.schedule = schedule
    found = [project_metal(x[:count], layer)[0] for count in (3, 9)]
    assert all(same_bits(*pair) for pair in zip(found, usual, strict=True))


@pytest.mark.parametrize("share", [2, 4])
def test_shares_do_not_change_bits(
    metal: Executor, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    """Also where the last rows of a matrix are less than a share."""
    one, two = (linear(FOUR, 320, height, key=height) for height in (72, 8))
    up = linear(FOUR, 320, 72, key=3)
    for count in (3, 13):
        x = draw(7, count, 320, dtype=mx.float32)
        usual = [*project_metal(x, one, two), gated_metal(x, one, up)]
        with monkeypatch.context() as patch:
            patch.setattr(verify_matmul, "SHARES", ((0, share),))
            found = [*project_metal(x, one, two), gated_metal(x, one, up)]
        assert all(same_bits(*pair) for pair in zip(found, usual, strict=True))


# ---- several layers, one launch ----------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 5, 20])
def test_layers_of_one_format_are_one_launch(metal: Executor, count: int) -> None:
    layers = [linear(FOUR, 256, height, key=height) for height in (64, 16, 24)]
    x = draw(8, count, 1, 256)
    together = project_metal(x, *layers)
    assert len(metal.launches) == 1
    for layer, found in zip(layers, together, strict=True):
        assert found.shape == (count, 1, len(layer.weight))
        assert same_bits(found, project_metal(x, layer)[0])


def test_other_formats_and_more_layers_are_further_launches(metal: Executor) -> None:
    forms = [FOUR, EIGHT, EIGHT, PLAIN, FOUR, FOUR, FOUR, FOUR]
    layers = [linear(form, 128, 8 + 8 * i, key=i) for i, form in enumerate(forms)]
    x = draw(9, 2, 128)
    found = project_metal(x, *layers)
    assert [record.template["COUNT"] for record in metal.launches] == [1, 2, 1, 3, 1]
    for y, layer in zip(found, layers, strict=True):
        check_product(y, x, layer)


def test_scales_of_another_dtype_are_another_format(metal: Executor) -> None:
    layers = [linear(FOUR, 128, 8 + 8 * i, key=i) for i in range(4)]
    x = draw(9, 2, 128)
    for i in (1, 2):
        with_scales(layers[i], mx.float16)
    found = project_metal(x, *layers)
    assert [record.template["COUNT"] for record in metal.launches] == [1, 2, 1]
    for y, layer in zip(found, layers, strict=True):
        check_product(y, x, layer)


# ---- gated -------------------------------------------------------------------------------------


def _nearly(found: mx.array, gate: mx.array, up: mx.array) -> bool:
    """Whether found is geglu(gate, up), but for roundings that go the other way.

    In float32 those of tanh and its argument move gelu's factor, at most 1, by less than 2**-22.
    That seldom changes a narrower dtype's result.
    """
    right, size = exact(geglu(gate, up)), exact(gate) * exact(up)
    allowed = 2 * ROUNDING[found.dtype] * np.abs(right) + 2**-22 * np.abs(size)
    differ = exact(found) != right
    seldom = found.dtype == mx.float32 or differ.mean() < 0.1
    return seldom and bool((np.abs(exact(found) - right) <= allowed).all())


def _gelu(gate: np.ndarray) -> np.ndarray:
    return gate * (0.5 + 0.5 * np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("count", [1, 4, 13])
def test_gated_is_geglu_of_what_project_returns(
    metal: Executor, dtype: mx.Dtype, count: int
) -> None:
    gate, up = (linear(FOUR, 448, 40, dtype, key) for key in (0, 1))
    x = draw(10, count, 448, dtype=dtype, scale=3)
    g, u = project_metal(x, gate, up)
    before = len(metal.launches)
    found = gated_metal(x, gate, up)
    assert len(metal.launches) == before + 1
    assert _nearly(found, g, u)
    assert _nearly(gated_by_metal(x, gate, u), g, u)
    assert same_bits(found, one_by_one(lambda row: gated_metal(row, gate, up), x))
    inner = _gelu(exact(x) @ exact_weight(gate).T)
    check_errors([found], [gated_reference(x, gate, up)], [inner * (exact(x) @ exact_weight(up).T)])
    check_errors([gated_by_metal(x, gate, u)], [gated_by_reference(x, gate, u)], [inner * exact(u)])


def test_gated_saturates(metal: Executor) -> None:
    """Gates of any size: 0 below, themselves above."""
    gate, up = linear(PLAIN, 64, 8), linear(PLAIN, 64, 8, key=1)
    size = mx.array([-3e38, -1e4, -30.0, -1e-30, 0.0, 1e-30, 30.0, 1e4])
    gate.weight = mx.zeros((8, 64)).at[:, 0].add(size).astype(mx.bfloat16)
    up.weight = mx.zeros((8, 64)).at[:, 0].add(1.0).astype(mx.bfloat16)
    x = mx.ones((5, 64), mx.bfloat16)
    for count in (1, 5):
        found = gated_metal(x[:count], gate, up)
        assert _nearly(found, gate.weight[None, :, 0], up.weight[None, :, 0])


@pytest.mark.parametrize(
    "up", [linear(EIGHT, 128, 16), with_scales(linear(FOUR, 128, 16), mx.float16)]
)
def test_gate_and_up_may_differ_in_format(metal: Executor, up: nn.Module) -> None:
    gate = linear(FOUR, 128, 16)
    x = draw(11, 6, 128)
    found = gated_metal(x, gate, up)
    assert same_bits(found, gated_by_metal(x, gate, project_metal(x, up)[0]))
    assert _nearly(found, *project_metal(x, gate), *project_metal(x, up))


@pytest.mark.parametrize("count", [2, 9])
def test_gate_and_up_are_rounded_to_the_dtype_of_activations(metal: Executor, count: int) -> None:
    """As if their scales were of it."""
    gate, up = (with_scales(linear(FOUR, 448, 40, key=key), mx.float16) for key in (0, 1))
    x = draw(10, count, 448, scale=3)
    g, u = project_metal(x, gate, up)
    found, by = gated_metal(x, gate, up), gated_by_metal(x, gate, u)
    assert g.dtype == found.dtype == by.dtype == mx.bfloat16
    assert _nearly(found, g, u) and _nearly(by, g, u)
    g, u = project_reference(x, gate, up)
    assert same_bits(gated_reference(x, gate, up), geglu(g, u))
    assert same_bits(gated_by_reference(x, gate, u), geglu(g, u))
    assert geglu(g, u).dtype == mx.bfloat16


# ---- traffic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [FOUR, Format("affine", 8, 32), PLAIN], ids=str)
@pytest.mark.parametrize(("count", "times"), [(4, 1), (8, 1), (16, 1), (32, 2)])
def test_codes_are_read_once_for_sixteen_positions(
    metal: Executor, form: Format, count: int, times: int
) -> None:
    layer = linear(form, 512, 64)
    project_metal(draw(12, count, 512), layer)
    record = metal.launches[-1]
    codes, scales = record.traffic["codes0"], record.traffic["scales0"]
    assert codes.read == layer.weight.nbytes and codes.read_total == times * codes.read
    if form != PLAIN:
        # Neighbouring lanes of a tile share a scale, and read it in the same instruction.
        lanes = min(4, form.group // 16) if count > 4 else 1
        assert scales.read == layer.scales.nbytes
        assert scales.read_total == lanes * times * scales.read
    assert record.traffic["y"].written_total == count * 64 * 2


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 6])
def test_inputs_need_not_be_contiguous(metal: Executor, count: int) -> None:
    one, two = linear(FOUR, 64, 8), linear(FOUR, 64, 8, key=1)
    columns, values = draw(14, 64, count), draw(15, 8, count)
    x, whole = columns.T, mx.contiguous(columns.T)
    assert same_bits(project_metal(x, one)[0], project_metal(whole, one)[0])
    assert same_bits(gated_metal(x, one, two), gated_metal(whole, one, two))
    assert same_bits(
        gated_by_metal(x, one, values.T), gated_by_metal(whole, one, mx.contiguous(values.T))
    )
    rows = draw(16, 3 * count, 64)[1::3]
    assert same_bits(project_metal(rows, one)[0], project_metal(mx.contiguous(rows), one)[0])


def test_the_path_depends_on_the_device(metal: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = linear(FOUR, 64, 16), linear(FOUR, 64, 16, key=1)
    x, values = draw(18, 3, 64), draw(19, 3, 16)
    found = [project(x, gate, up), [gated(x, gate, up)], [gated_by(x, gate, values)]]
    assert len(metal.launches) == 3
    monkeypatch.setattr(verify_matmul, "on_gpu", lambda: False)
    monkeypatch.setattr(Kernel, "launch", None)
    right = [
        project_reference(x, gate, up),
        [gated_reference(x, gate, up)],
        [gated_by_reference(x, gate, values)],
    ]
    again = [project(x, gate, up), [gated(x, gate, up)], [gated_by(x, gate, values)]]
    for mine, other, twice in zip(found, right, again, strict=True):
        assert all(same_bits(*pair) for pair in zip(other, twice, strict=True))
        for one, two in zip(mine, other, strict=True):
            assert np.abs(exact(one) - exact(two)).max() <= 2**-5 * np.abs(exact(two)).max()
