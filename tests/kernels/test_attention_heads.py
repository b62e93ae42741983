"""Heads from projections: norms, RoPE and layout, positions and rows that do not see each other."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.attention_heads import (
    HEADS,
    QUERY_HEADS,
    Turn,
    attention_heads,
    attention_heads_metal,
    attention_heads_reference,
)
from tests.kernels.exact import DTYPES, EPS, check_errors, draw, exact, norm
from tests.metal.executor import Executor


class Layer(NamedTuple):
    """As much of a layer's config as counts: g 0 if it owns no keys and values."""

    h: int
    g: int
    d: int
    k_eq_v: bool = False
    sliding: bool = True


# Sliding and full layers of E2B, E4B, 12B, 26B and 31B, their layers that share keys and values,
# their drafters, the tiny families and the built-in pair.
LAYERS = [
    Layer(8, 1, 256),
    Layer(8, 1, 512, sliding=False),
    Layer(8, 2, 256),
    Layer(8, 2, 512, sliding=False),
    Layer(16, 8, 256),
    Layer(16, 1, 512, k_eq_v=True, sliding=False),
    Layer(16, 2, 512, k_eq_v=True, sliding=False),
    Layer(32, 16, 256),
    Layer(32, 4, 512, k_eq_v=True, sliding=False),
    Layer(8, 0, 256),
    Layer(8, 0, 512, sliding=False),
    Layer(4, 0, 256),
    Layer(4, 0, 512, sliding=False),
    Layer(32, 0, 256),
    Layer(32, 0, 512, sliding=False),
    Layer(4, 2, 16),
    Layer(4, 0, 16),
    Layer(8, 2, 32, k_eq_v=True, sliding=False),
    Layer(8, 0, 32, sliding=False),
    Layer(4, 1, 48),
    Layer(4, 0, 48),
    Layer(4, 1, 96, sliding=False),
    Layer(4, 0, 96, sliding=False),
]
SMALL = [Layer(4, 2, 16), Layer(4, 1, 96, k_eq_v=True, sliding=False), Layer(4, 0, 256)]
POSITIONS = [0, 7, 262_143 - 16, 100_003, 1, 512, 65_521, 31_337]


class Case(NamedTuple):
    """The arguments of a call but eps."""

    projections: list[mx.array]
    weights: list[mx.array]
    turn: Turn


def _wavelengths(layer: Layer) -> mx.array:
    turned = layer.d if layer.sliding else layer.d // 4
    exponents = np.arange(0, turned, 2) / layer.d
    lengths = np.full(layer.d // 2, np.inf)
    lengths[: turned // 2] = (1e4 if layer.sliding else 1e6) ** exponents
    return mx.array(lengths, mx.float32)


def _case(layer: Layer, positions: Sequence[int], length: int, dtype: mx.Dtype) -> Case:
    b, heads = len(positions), [layer.h, layer.g, layer.g] if layer.g else [layer.h]
    parts = [
        draw(i, b, length, count * layer.d, dtype=dtype, scale=10.0 ** (i - 1))
        for i, count in enumerate(heads)
    ]
    if layer.k_eq_v:
        parts[2] = parts[1]
    weights = [draw(10 + i, layer.d, dtype=dtype) for i in range(2 if layer.g else 1)]
    return Case(parts, weights, Turn(mx.array(positions), length, _wavelengths(layer)))


def _metal(case: Case) -> list[mx.array]:
    return _apart(attention_heads_metal(*case, EPS))


def _apart(made: tuple[mx.array, mx.array | None]) -> list[mx.array]:
    """Queries, keys and values."""
    queries, block = made
    return [queries] if block is None else [queries, *mx.split(block, 2, axis=1)]


def _truth(case: Case) -> list[np.ndarray]:
    """Exact but for the angles, which are float32 by definition."""
    wavelengths = np.array(case.turn.wavelengths)
    d = 2 * len(wavelengths)
    positions = np.array(case.turn.positions)[:, None, None] + np.arange(case.turn.length)[:, None]
    angles = positions.astype(np.float32) / wavelengths  # [B, L, D / 2]
    turns = np.exp(1j * angles.astype(np.float64))[:, None]
    made = []
    for i, part in enumerate(case.projections):
        heads = norm(exact(part).reshape(*part.shape[:2], -1, d)).swapaxes(1, 2)
        if i < 2:
            heads = heads * exact(case.weights[i])
            turned = (heads[..., : d // 2] + 1j * heads[..., d // 2 :]) * turns
            heads = np.concatenate([turned.real, turned.imag], axis=-1)
        made.append(heads)
    return made


def _equal(found: list[mx.array], expected: list[mx.array]) -> bool:
    return all(mx.array_equal(a, b).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "layer, dtype",
    [(layer, mx.bfloat16) for layer in LAYERS]
    + [(layer, dtype) for layer in SMALL for dtype in DTYPES[1:]],
)
def test_values(metal: object, layer: Layer, dtype: mx.Dtype) -> None:
    case = _case(layer, POSITIONS[:3], 2, dtype)
    reference = _apart(attention_heads_reference(*case, EPS))
    check_errors(_metal(case), reference, _truth(case))


@pytest.mark.parametrize(
    "layer, dtype",
    [*((layer, mx.float32) for layer in SMALL), (Layer(16, 2, 512, sliding=False), mx.bfloat16)],
)
def test_a_position_depends_on_nothing_else(metal: object, layer: Layer, dtype: mx.Dtype) -> None:
    """Alone, or in whatever block and batch: the same bits."""
    case = _case(layer, POSITIONS, 16, dtype)
    together = _metal(case)
    for row, place, rows, places in [(0, 0, 8, 1), (2, 3, 1, 13), (7, 15, 1, 1), (3, 6, 1, 1)]:
        at = (slice(row, row + rows), slice(place, place + places))
        positions = case.turn.positions[at[0]] + place
        part = Case(
            [x[at] for x in case.projections],
            case.weights,
            Turn(positions, places, case.turn.wavelengths),
        )
        assert _equal(_metal(part), [x[at[0], :, at[1]] for x in together])


@pytest.mark.parametrize("threads", [32, 96, 128])
@pytest.mark.parametrize("layer", SMALL)
def test_other_threadgroups_give_the_same_bits(
    metal: object, monkeypatch: pytest.MonkeyPatch, layer: Layer, threads: int
) -> None:
    case = _case(layer, [5, 70_000], 3, mx.float32)
    expected = _metal(case)
    for kernel in (HEADS, QUERY_HEADS):
        monkeypatch.setattr(kernel, "threads", threads)
    assert _equal(_metal(case), expected)


@pytest.mark.parametrize("layer", [Layer(4, 2, 16), Layer(4, 1, 96, sliding=False)])
def test_views(metal: object, layer: Layer) -> None:
    """Projections that one matmul wrote beside each other, or whose rows or entries are apart."""
    case = _case(layer, [3, 9], 3, mx.bfloat16)
    expected = _metal(case)
    joined = mx.concatenate(case.projections, axis=-1)
    ends = np.cumsum([x.shape[-1] for x in case.projections[:-1]]).tolist()
    swapped = [mx.contiguous(x.swapaxes(0, 2)).swapaxes(0, 2) for x in case.projections]
    gaps = [mx.stack([x, x + 1], axis=-1).flatten(-2)[..., ::2] for x in case.projections]
    for parts in (mx.split(joined, ends, axis=-1), swapped, gaps):
        assert _equal(_metal(case._replace(projections=parts)), expected)
    apart = mx.stack([case.turn.positions, mx.array([77, 78])], axis=1)[:, 0]
    turn = Turn(apart, case.turn.length, case.turn.wavelengths)
    assert _equal(_metal(case._replace(turn=turn)), expected)


def test_position_zero_and_still_pairs_do_not_turn(metal: object) -> None:
    layer = Layer(4, 2, 32, k_eq_v=True, sliding=False)
    case = _case(layer, [0, 1000], 1, mx.float32)
    case = case._replace(weights=[mx.ones(32), mx.ones(32)])
    _, keys, values = _metal(case)
    assert mx.array_equal(keys[0], values[0])
    assert mx.array_equal(keys[..., 4:16], values[..., 4:16])
    assert mx.array_equal(keys[..., 20:], values[..., 20:])
    assert not mx.array_equal(keys[1, ..., :4], values[1, ..., :4])


def test_a_head_of_zeros(metal: object) -> None:
    case = _case(Layer(4, 2, 16), [5], 1, mx.float16)
    assert not any(
        x.any().item() for x in _metal(case._replace(projections=[x * 0 for x in case.projections]))
    )


def test_heads_are_read_and_written_once(metal: Executor) -> None:
    case = _case(Layer(4, 2, 32), [5, 6], 2, mx.bfloat16)
    made = _metal(case)
    traffic = metal.launches[-1].traffic
    for name, part in zip("qkv", case.projections, strict=True):
        assert traffic[name].read == traffic[name].read_total == part.nbytes
    for name, nbytes in [("queries", made[0].nbytes), ("block", made[1].nbytes + made[2].nbytes)]:
        assert traffic[name].written == traffic[name].written_total == nbytes


def test_the_path_follows_the_device(metal: object) -> None:
    """On a GPU, the kernel: float32 sums in another order than the reference's."""
    case = _case(Layer(4, 2, 256), [5], 3, mx.float32)
    found = _apart(attention_heads(*case, EPS))
    assert _equal(found, _metal(case))
    assert not _equal(found, _apart(attention_heads_reference(*case, EPS)))


@pytest.mark.parametrize("weight", [mx.ones(16), mx.ones(32, mx.bfloat16)])
def test_what_a_checkpoint_may_not_hold(metal: object, weight: mx.array) -> None:
    case = _case(Layer(4, 0, 16), [5], 1, mx.bfloat16)
    with pytest.raises(ValueError, match=r"expected \(16,\) mlx.core.bfloat16"):
        _metal(case._replace(weights=[weight]))
    with pytest.raises(ValueError, match="heads of 8"):
        _metal(_case(Layer(4, 0, 8), [5], 1, mx.bfloat16))
