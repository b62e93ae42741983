"""The residual connections of a layer, with the norms before and after them, in one launch each.

A layer's matmuls alternate with these: their output is normed and added to the hidden state, which
is normed again, with other weights, for the matmuls that follow.
"""

from collections.abc import Sequence

import mlx.core as mx

from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.kernel import Kernel, Output

_INPUTS = ["h", "x", "y", "weight", "x_weight", "y_weight", "scalar", "eps"]
RESIDUAL_NORMS = {
    0: Kernel(
        "residual",
        _INPUTS,
        ["out"],
        """
        threadgroup float sums[4 * STRANDS];
        residual_norm<E, THREADS, ADDED, SCALED>(
            h, Added<T>{x, y, weight, x_weight, y_weight}, scalar, out, Nexts<T, 0>{}, eps,
            sums, threadgroup_position_in_grid.x, thread_index_in_threadgroup);
        """,
        ["residual_norm"],
    ),
    1: Kernel(
        "residual_norm",
        [*_INPUTS, "next_0"],
        ["out", "normed_0"],
        """
        threadgroup float sums[4 * STRANDS];
        residual_norm<E, THREADS, ADDED, SCALED>(
            h, Added<T>{x, y, weight, x_weight, y_weight}, scalar, out,
            Nexts<T, 1>{{next_0}, {normed_0}}, eps,
            sums, threadgroup_position_in_grid.x, thread_index_in_threadgroup);
        """,
        ["residual_norm"],
    ),
    2: Kernel(
        "residual_two_norms",
        [*_INPUTS, "next_0", "next_1"],
        ["out", "normed_0", "normed_1"],
        """
        threadgroup float sums[4 * STRANDS];
        residual_norm<E, THREADS, ADDED, SCALED>(
            h, Added<T>{x, y, weight, x_weight, y_weight}, scalar, out,
            Nexts<T, 2>{{next_0, next_1}, {normed_0, normed_1}}, eps,
            sums, threadgroup_position_in_grid.x, thread_index_in_threadgroup);
        """,
        ["residual_norm"],
    ),
}


def residual_norm(
    h: mx.array,
    added: Sequence[mx.array],
    weights: Sequence[mx.array],
    scalar: mx.array | None,
    nexts: Sequence[mx.array],
    eps: float,
) -> tuple[mx.array, list[mx.array]]:
    """Add what a layer computed to its hidden state, scale the sum, norm it for what comes next.

    h: [..., E]. added: of h's shape: nothing; x, which is normed; or x and y, both normed, whose
    sum is normed. weights: [E] each, of the norm of what is added, then, of two, of each one's own.
    scalar: of one element. nexts: the weights of the next norms, none, one or two.
    Returns: (h + what is added) * scalar, and that after each of the next norms.
    Error: <= 2 x that of the reference in h's dtype.
    """
    path = residual_norm_metal if on_gpu() else residual_norm_reference
    return path(h, added, weights, scalar, nexts, eps)


def residual_norm_reference(
    h: mx.array,
    added: Sequence[mx.array],
    weights: Sequence[mx.array],
    scalar: mx.array | None,
    nexts: Sequence[mx.array],
    eps: float,
) -> tuple[mx.array, list[mx.array]]:
    """The definition, in MLX's own operations."""
    if added:
        weight, *own = weights
        normed = [mx.fast.rms_norm(x, w, eps) for x, w in zip(added, own, strict=False)]
        h = h + mx.fast.rms_norm(normed[0] + normed[1] if own else added[0], weight, eps)
    if scalar is not None:
        h = h * scalar
    return h, [mx.fast.rms_norm(h, weight, eps) for weight in nexts]


def residual_norm_metal(
    h: mx.array,
    added: Sequence[mx.array],
    weights: Sequence[mx.array],
    scalar: mx.array | None,
    nexts: Sequence[mx.array],
    eps: float,
) -> tuple[mx.array, list[mx.array]]:
    """The same in one launch, a threadgroup per row.

    Raises: ValueError if E is not a multiple of 8, or on a weight of another shape or dtype.
    """
    width = h.shape[-1]
    assert (len(added), len(weights)) in [(0, 0), (1, 1), (2, 3)], (len(added), len(weights))
    assert all((x.shape, x.dtype) == (h.shape, h.dtype) for x in added)
    if width % 8:
        raise ValueError(f"hidden states {h.shape}: the width must be a multiple of 8")
    for weight in [*weights, *nexts]:
        if (weight.shape, weight.dtype) != ((width,), h.dtype):
            raise ValueError(
                f"norm weight {weight.shape} {weight.dtype}, expected {(width,)} {h.dtype}"
            )
    if scalar is not None and (scalar.size, scalar.dtype) != (1, h.dtype):
        raise ValueError(f"scalar {scalar.shape} {scalar.dtype}, expected one {h.dtype}")
    # What is not there is not read: h stands in for it.
    x, y = (*added, h, h)[:2]
    weight, x_weight, y_weight = (*weights, h, h, h)[:3]
    factor = h if scalar is None else scalar.reshape(1)
    out, *normed = RESIDUAL_NORMS[len(nexts)].launch(
        [h, x, y, weight, x_weight, y_weight, factor, mx.array(eps), *nexts],
        (h.size // width, 1, 1),
        [Output(h.shape, h.dtype)] * (1 + len(nexts)),
        {"E": width, "T": h.dtype, "ADDED": len(added), "SCALED": scalar is not None},
    )
    return out, normed
