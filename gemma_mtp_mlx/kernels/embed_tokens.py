"""Embeddings of tokens from a table in any of MLX's formats, in one launch."""

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.kernel import Kernel, Output
from gemma_mtp_mlx.kernels.weights import decoded_rows, packing, weight_arrays

EMBED = Kernel(
    "embed_tokens",
    ["codes", "scales", "biases", "tokens", "scale", "beside"],
    ["y"],
    """
    embed_run(
        weights<FORMAT, BITS, GROUP, RUN>(codes, scales, biases, codes_shape[0], E),
        tokens, scale, beside, EXTRA, y, threadgroup_position_in_grid.y, thread_position_in_grid.x);
    """,
    ["embed_tokens"],
)


def embed_tokens(
    embedding: nn.Module,
    tokens: mx.array,
    scale: float | None,
    beside: mx.array | None,
    dtype: mx.Dtype,
) -> mx.array:
    """Return tokens' embeddings, times scale, and beside each what a drafter reads with it.

    embedding: nn.Embedding or nn.QuantizedEmbedding; tokens: [B, L] int32; beside: [B, L, E] in
    dtype, the model's, which need not be the embedding's.
    Returns: [B, L, E], or [B, L, 2 * E] with `beside`, in dtype.
    Error: <= 2 x that of the reference in that dtype.
    Raises: ValueError for weights that have no kernel.
    """
    path = embed_tokens_metal if on_gpu() else embed_tokens_reference
    return path(embedding, tokens, scale, beside, dtype)


def embed_tokens_reference(
    embedding: nn.Module,
    tokens: mx.array,
    scale: float | None,
    beside: mx.array | None,
    dtype: mx.Dtype,
) -> mx.array:
    """The definition, in MLX's own operations."""
    embedded = decoded_rows(embedding, tokens, dtype).astype(dtype)
    if scale is not None:
        embedded = embedded * mx.array(scale, dtype)
    return embedded if beside is None else mx.concatenate([embedded, beside], axis=-1)


def embed_tokens_metal(
    embedding: nn.Module,
    tokens: mx.array,
    scale: float | None,
    beside: mx.array | None,
    dtype: mx.Dtype,
) -> mx.array:
    """The same; a row of the table is read once per token."""
    found = packing(embedding)
    codes, scales, biases = weight_arrays(embedding)
    width = codes.shape[1] * 8 * codes.dtype.size // found.bits
    template = found.template(width)
    if beside is not None:
        assert (beside.shape, beside.dtype) == ((*tokens.shape, width), dtype)
    total = width if beside is None else 2 * width
    factor = mx.array(1.0 if scale is None else scale, dtype)
    behind = codes if beside is None else beside
    (y,) = EMBED.launch(
        [codes, scales, biases, tokens.astype(mx.int32), factor, behind],
        (-(-total // (template["RUN"] * EMBED.threads)), tokens.size, 1),
        [Output((*tokens.shape, total), dtype)],
        {**template, "E": width, "EXTRA": total - width},
    )
    return y
