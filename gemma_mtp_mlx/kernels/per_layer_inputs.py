"""The per-layer inputs of a pass's tokens, all layers' in one launch."""

import mlx.core as mx

from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.kernel import SIMDGROUP, Kernel, Output

PER_LAYER_INPUTS = Kernel(
    "per_layer_inputs",
    ["context", "by_token", "weight", "scales", "eps"],
    ["inputs"],
    """
    per_layer_input<P>(
        context, by_token, weight, scales, eps, inputs, context_shape[0], context_shape[1],
        thread_position_in_grid.x / 32, thread_index_in_simdgroup);
    """,
    ["per_layer_inputs"],
)


def per_layer_inputs(
    context: mx.array, by_token: mx.array, weight: mx.array, width: int, eps: float
) -> list[mx.array]:
    """Make each layer's input, [B, L, P], from the token and from its embedding.

    context: [B, L, layers * P], what was projected from the embedding, of `width` elements;
    by_token: the same shape, of the embedding per layer, not scaled; weight: [P] of the norm.
    Error: <= 2 x that of the reference in context's dtype.
    Source: transformers Gemma4TextModel.project_per_layer_inputs.
    """
    path = per_layer_inputs_metal if on_gpu() else per_layer_inputs_reference
    return path(context, by_token, weight, width, eps)


def per_layer_inputs_reference(
    context: mx.array, by_token: mx.array, weight: mx.array, width: int, eps: float
) -> list[mx.array]:
    """The definition, in MLX's own operations."""
    size = weight.shape[0]
    shape = (*context.shape[:2], -1, size)
    by_token = by_token * mx.array(size**0.5, by_token.dtype)
    context = mx.fast.rms_norm((context * width**-0.5).reshape(shape), weight, eps)
    inputs = (context + by_token.reshape(shape)) * 2.0**-0.5
    return [inputs[:, :, i] for i in range(inputs.shape[2])]


def per_layer_inputs_metal(
    context: mx.array, by_token: mx.array, weight: mx.array, width: int, eps: float
) -> list[mx.array]:
    """The same in one launch, a simdgroup per token and layer; each layer's result contiguous.

    Raises: ValueError unless all have one dtype.
    """
    size = weight.shape[0]
    assert context.shape == by_token.shape, (context.shape, by_token.shape)
    if not context.dtype == by_token.dtype == weight.dtype:
        raise ValueError(f"dtypes {context.dtype}, {by_token.dtype}, {weight.dtype} must be one")
    b, length, total = context.shape
    layers = total // size
    tasks = b * length * layers
    (inputs,) = PER_LAYER_INPUTS.launch(
        [
            context.reshape(b * length, layers, size),
            by_token,
            weight,
            mx.array([width**-0.5, size**0.5, 2.0**-0.5], context.dtype),
            mx.array(eps),
        ],
        (-(-tasks // (PER_LAYER_INPUTS.threads // SIMDGROUP)), 1, 1),
        [Output((layers, b, length, size), context.dtype)],
        {"P": size, "T": context.dtype},
    )
    return list(inputs)
