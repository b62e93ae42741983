"""The heads of an attention layer, from its projections: normed, turned by RoPE, laid out.

Queries and keys are normed with a weight and turned, values only normed. A GPU computes the angles
where they are used; a CPU computes them once per pass and kind of layer, and makes all heads at
once, for there each operation has its price.
Source: transformers Gemma4TextAttention, apply_rotary_pos_emb.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx

from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.kernel import SIMDGROUP, Kernel, Output

HEADS = Kernel(
    "attention_heads",
    ["q", "k", "v", "q_weight", "k_weight", "wavelengths", "positions", "eps"],
    ["queries", "block"],
    """
    const uint length = q_shape[1];
    const uint row = threadgroup_position_in_grid.y / length;
    const uint position = threadgroup_position_in_grid.y % length;
    attention_heads<D>(
        Projection<T>{q, q_strides}, Projection<T>{k, k_strides}, Projection<T>{v, v_strides},
        q_weight, k_weight, wavelengths, positions[row * positions_strides[0]] + int(position), eps,
        q_shape[2] / D, k_shape[2] / D, queries, block,
        Place{row, position, length, thread_position_in_grid.x / 32, thread_index_in_simdgroup});
    """,
    ["attention_heads"],
    row_contiguous=False,
)
QUERY_HEADS = Kernel(
    "query_heads",
    ["q", "q_weight", "wavelengths", "positions", "eps"],
    ["queries"],
    """
    const uint length = q_shape[1];
    const uint row = threadgroup_position_in_grid.y / length;
    const uint position = threadgroup_position_in_grid.y % length;
    query_heads<D>(
        Projection<T>{q, q_strides}, q_weight, wavelengths,
        positions[row * positions_strides[0]] + int(position), eps, q_shape[2] / D, queries,
        Place{row, position, length, thread_position_in_grid.x / 32, thread_index_in_simdgroup});
    """,
    ["attention_heads"],
    row_contiguous=False,
)


class Factors(NamedTuple):
    """What RoPE multiplies with, float32: x * cos + (x with its halves swapped) * sin.

    cos: [B, L, 1, 1, D / 2]; sin: [B, L, 1, 2, D / 2], the first half negated.
    """

    cos: mx.array
    sin: mx.array


class Turn:
    """How RoPE turns the tokens of one pass in one kind of layer."""

    def __init__(self, positions: mx.array, length: int, wavelengths: mx.array) -> None:
        """positions: [B] int32, of the first of `length` consecutive tokens per row; wavelengths:
        [D / 2] float32, / 2 pi; infinite where nothing turns."""
        self.positions, self.length, self.wavelengths = positions, length, wavelengths

    @cached_property
    def factors(self) -> Factors:
        """For a CPU."""
        positions = (self.positions[:, None] + mx.arange(self.length))[..., None, None, None]
        angles = positions / self.wavelengths
        sin = mx.sin(angles)
        return Factors(mx.cos(angles), mx.concatenate([-sin, sin], axis=-2))


def attention_heads(
    projections: Sequence[mx.array], weights: Sequence[mx.array], turn: Turn, eps: float
) -> tuple[mx.array, mx.array | None]:
    """Make a layer's queries and, if it owns any, its block of new keys and values.

    projections: of the queries, [B, L, H * D], and of keys and values, [B, L, G * D] each, which
    may be the same array. weights: [D] each, of the norms of queries and of keys.
    Returns: [B, H, L, D] and, if there are keys, [B, 2G, L, D], the values' heads behind the keys'.
    Error: <= 2 x that of the reference in the projections' dtype.
    """
    path = attention_heads_metal if on_gpu() else attention_heads_reference
    return path(projections, weights, turn, eps)


def attention_heads_reference(
    projections: Sequence[mx.array], weights: Sequence[mx.array], turn: Turn, eps: float
) -> tuple[mx.array, mx.array | None]:
    """The definition, in MLX's own operations, each over all heads at once."""
    d = weights[0].shape[0]
    parts = [part.reshape(*part.shape[:2], -1, d) for part in projections]
    weight = mx.concatenate(
        [mx.broadcast_to(w, p.shape[2:]) for w, p in zip(weights, parts, strict=False)]
    )
    normed = mx.fast.rms_norm(mx.concatenate(parts, axis=2), None, eps)
    turned = _turned(normed[:, :, : len(weight)] * weight, turn.factors)
    if len(parts) == 1:
        return turned.swapaxes(1, 2), None
    heads = mx.concatenate([turned, normed[:, :, len(weight) :]], axis=2).swapaxes(1, 2)
    count = parts[0].shape[2]
    return heads[:, :count], heads[:, count:]


def _turned(x: mx.array, factors: Factors) -> mx.array:
    """RoPE of [B, L, heads, D], computed in float32."""
    halves = x.astype(mx.float32).reshape(*x.shape[:-1], 2, -1)
    turned = halves * factors.cos + halves[..., ::-1, :] * factors.sin
    return turned.reshape(x.shape).astype(x.dtype)


def attention_heads_metal(
    projections: Sequence[mx.array], weights: Sequence[mx.array], turn: Turn, eps: float
) -> tuple[mx.array, mx.array | None]:
    """The same in one launch, a simdgroup per head and position.

    Projections may be any views; weights and wavelengths must be contiguous, as a module's are.
    Raises: ValueError on a weight of another shape or dtype than the heads, or if D < 16.
    """
    assert (len(projections), len(weights)) in [(1, 1), (3, 2)], (len(projections), len(weights))
    q = projections[0]
    b, length, _ = q.shape
    d = 2 * turn.wavelengths.shape[0]
    assert (b, length) == (turn.positions.shape[0], turn.length), (q.shape, turn.length)
    for part in projections:
        assert part.shape[:2] == (b, length) and part.dtype == q.dtype, part.shape
        assert part.shape[2] % d == 0, (part.shape, d)
    if d < 16:
        raise ValueError(f"heads of {d}: they must be 16 or more")
    for weight in weights:
        if (weight.shape, weight.dtype) != ((d,), q.dtype):
            raise ValueError(
                f"norm weight {weight.shape} {weight.dtype}, expected {(d,)} {q.dtype}"
            )
    heads = [part.shape[2] // d for part in projections]
    kernel = HEADS if len(heads) == 3 else QUERY_HEADS
    counts = [heads[0], sum(heads[1:])][: 2 if len(heads) == 3 else 1]
    made = kernel.launch(
        [*projections, *weights, turn.wavelengths, turn.positions, mx.array(eps)],
        (-(-sum(heads) // (kernel.threads // SIMDGROUP)), b * length, 1),
        [Output((b, count, length, d), q.dtype) for count in counts],
        {"T": q.dtype, "D": d},
    )
    return made[0], made[1] if len(made) > 1 else None
