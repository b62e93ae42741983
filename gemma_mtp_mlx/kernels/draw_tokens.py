"""Draw tokens from given logits, without writing noise or noisy logits anywhere.

A launch finds the best token of every stretch of CHUNK ids, a second one the best of those. What
decides is `score` and `better` of draw_tokens.metal, as in every kernel that draws.
"""

import mlx.core as mx

from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.kernel import Kernel, Output
from gemma_mtp_mlx.sampling import Sampling, draw, gumbel

CHUNK = 2048

BEST_OF_LOGITS = Kernel(
    "best_of_logits",
    ["logits", "temperature", "seed", "positions"],
    ["scores", "ids"],
    """
    threadgroup float best_scores[THREADS / 32];
    threadgroup uint best_ids[THREADS / 32];
    best_of_logits<THREADS, CHUNK>(
        logits,
        draws(temperature, seed, positions, positions_shape[1], logits_shape[1]),
        scores, ids, best_scores, best_ids,
        threadgroup_position_in_grid, threadgroups_per_grid, thread_index_in_threadgroup);
    """,
    ["draw_tokens"],
)

BEST_OF_CHOICES = Kernel(
    "best_of_choices",
    ["scores", "ids"],
    ["tokens"],
    """
    threadgroup float best_scores[THREADS / 32];
    threadgroup uint best_ids[THREADS / 32];
    best_of_choices<THREADS>(
        scores, ids, scores_shape[1], tokens, best_scores, best_ids,
        threadgroup_position_in_grid.x, thread_index_in_threadgroup);
    """,
    ["draw_tokens"],
)


def draw_tokens(logits: mx.array, sampling: Sampling, positions: mx.array) -> mx.array:
    """Draw one token per position, the same one as token_head does from the same logits.

    logits: [B, L, V] float32, softcapped, and filtered if they are to be: top-k, top-p and min-p
    of `sampling` are not looked at. positions: [B, L] int32.
    Returns: [B, L] int32, the lowest id among equals.
    """
    if on_gpu():
        return draw_tokens_metal(logits, sampling, positions)
    return draw_tokens_reference(logits, sampling, positions)


def draw_tokens_reference(logits: mx.array, sampling: Sampling, positions: mx.array) -> mx.array:
    """The definition, in MLX's own operations."""
    noise = gumbel(sampling, positions, logits.shape[-1])
    return draw(logits, noise, sampling._replace(filtered=False))


def draw_tokens_metal(logits: mx.array, sampling: Sampling, positions: mx.array) -> mx.array:
    """The same in two launches; logits are read once."""
    assert logits.dtype == mx.float32, logits.dtype
    assert positions.shape == logits.shape[:2], (positions.shape, logits.shape)
    flat = logits.reshape(-1, logits.shape[-1])
    groups = -(-flat.shape[1] // CHUNK)
    scores, ids = BEST_OF_LOGITS.launch(
        [flat, sampling.temperature, sampling.seed, positions.astype(mx.int32)],
        (groups, flat.shape[0], 1),
        [Output((flat.shape[0], groups), mx.float32), Output((flat.shape[0], groups), mx.uint32)],
        {"CHUNK": CHUNK},
    )
    return best_of_choices(scores, ids).reshape(positions.shape)


def best_of_choices(scores: mx.array, ids: mx.array) -> mx.array:
    """The ids [M] int32 of the best scores. scores, ids: [M, count] float32 and uint32."""
    (tokens,) = BEST_OF_CHOICES.launch(
        [scores, ids], (scores.shape[0], 1, 1), [Output((scores.shape[0],), mx.int32)], {}
    )
    return tokens
