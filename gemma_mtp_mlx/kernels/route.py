"""Choose the experts of every token, in one launch.

A token's experts and their weights have the same bits whatever other tokens are routed with it.
"""

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.kernel import Kernel, Output
from gemma_mtp_mlx.kernels.weights import packing, weight_arrays

ROUTE = Kernel(
    "route",
    ["x", "scale", "codes", "scales", "biases", "expert_scale", "eps"],
    ["chosen", "factors"],
    """
    threadgroup vec<T, 4> normed[WIDTH / 4];
    threadgroup float scores[EXPERTS];
    threadgroup uint best[TOP];
    threadgroup float squares[THREADS / 32];
    const uint token = threadgroup_position_in_grid.x;
    route<THREADS, TOP>(
        x + size_t(token) * WIDTH,
        scale,
        weights<FORMAT, BITS, GROUP, RUN>(codes, scales, biases, EXPERTS, WIDTH),
        expert_scale,
        eps,
        chosen + token * TOP,
        factors + token * TOP,
        normed,
        scores,
        best,
        squares,
        simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """,
    ["route"],
)


def route(
    x: mx.array,
    proj: nn.Module,
    scale: mx.array,
    expert_scale: mx.array,
    top_k: int,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """Choose each token's top_k experts: softmax over their scores, times each one's own scale.

    x: [..., K] in the model's dtype; proj: nn.Linear or nn.QuantizedLinear, [experts, K];
    scale: [K], of the normed x; expert_scale: [experts].
    Returns: experts [..., top_k] int32, best first and the lowest number first among equals, and
    weights [..., top_k] float32.
    Raises: ValueError for a projection that has no kernel.
    Source: transformers Gemma4TextRouter.
    """
    if on_gpu():
        return route_metal(x, proj, scale, expert_scale, top_k, eps)
    return route_reference(x, proj, scale, expert_scale, top_k, eps)


def route_reference(
    x: mx.array,
    proj: nn.Module,
    scale: mx.array,
    expert_scale: mx.array,
    top_k: int,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """The definition, in MLX's own operations."""
    normed = mx.fast.rms_norm(x, scale * x.shape[-1] ** -0.5, eps)
    scores = proj(normed).astype(x.dtype)
    # MLX's CPU sort is stable, and nothing but a CPU comes here.
    chosen = mx.argsort(-scores, axis=-1)[..., :top_k].astype(mx.int32)
    # Softmax over all, divided by the sum of the chosen, is softmax over the chosen.
    best = mx.take_along_axis(scores, chosen, axis=-1).astype(mx.float32)
    return chosen, mx.softmax(best, axis=-1) * expert_scale[chosen].astype(mx.float32)


def route_metal(
    x: mx.array,
    proj: nn.Module,
    scale: mx.array,
    expert_scale: mx.array,
    top_k: int,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """The same in one launch, with the roundings of the operations."""
    width, experts = x.shape[-1], proj.weight.shape[0]
    assert scale.shape == (width,) and expert_scale.shape == (experts,)
    assert 0 < top_k <= min(32, experts), (top_k, experts)
    flat = x.reshape(-1, width)
    shape = (len(flat), top_k)
    chosen, factors = ROUTE.launch(
        [flat, scale, *weight_arrays(proj), expert_scale, mx.array(eps, mx.float32)],
        (len(flat), 1, 1),
        [Output(shape, mx.int32), Output(shape, mx.float32)],
        {
            **packing(proj).template(width),
            "T": x.dtype,
            "WIDTH": width,
            "EXPERTS": experts,
            "TOP": top_k,
        },
    )
    lead = x.shape[:-1]
    return chosen.reshape(*lead, top_k), factors.reshape(*lead, top_k)
