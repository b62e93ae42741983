"""The centroid head of the small drafters: a token drawn among those of a few clusters.

A launch scores the centroids, one draws in each chosen cluster, one finds the best of those. A
row's token has the same bits whatever is computed with it.
Source: transformers Gemma4AssistantMaskedEmbedder.
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.draw_tokens import best_of_choices
from gemma_mtp_mlx.kernels.kernel import Kernel, Output
from gemma_mtp_mlx.kernels.token_head import head_logits_metal
from gemma_mtp_mlx.kernels.weights import decoded_rows, packing, weight_arrays
from gemma_mtp_mlx.sampling import Sampling, draw, gumbel

CHOOSE_IN_CLUSTER = Kernel(
    "choose_in_cluster",
    [
        *("centroid_scores", "h", "codes", "scales", "biases", "ordering"),
        *("temperature", "seed", "positions"),
    ],
    ["best", "ids"],
    """
    threadgroup uint memory[2 * (THREADS / 32) + 1];
    threadgroup float best_scores[THREADS / 32];
    threadgroup uint best_ids[THREADS / 32];
    choose_in_cluster<THREADS / 32, ROWS, CENTROIDS, COUNT>(
        centroid_scores, h,
        weights<FORMAT, BITS, GROUP, RUN>(codes, scales, biases, codes_shape[0], h_shape[1]),
        ordering, draws(temperature, seed, positions, 1, codes_shape[0]), best, ids,
        memory, best_scores, best_ids,
        threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
    ["centroid_head"],
)


class CentroidHead(NamedTuple):
    """What a draft step chooses from. C centroids, each with the same number of tokens.

    centroids: nn.Linear [C, E]; ordering: [V] int32, the first centroid's tokens first; tokens: the
    nn.Embedding [V, E] the head is tied to; top_k: clusters to choose from. The layers may be
    quantised.
    """

    centroids: nn.Module
    ordering: mx.array
    tokens: nn.Module
    top_k: int


def centroid_head(
    h: mx.array, head: CentroidHead, sampling: Sampling, positions: mx.array
) -> mx.array:
    """Draw one token per row among those of the best clusters.

    h: [B, E]; positions: [B] int32. Top-k, top-p and min-p of `sampling` are not looked at.
    Returns: [B] int32, the lowest id among equals; of equal centroids the first ones count.
    Raises: ValueError for weights that have no kernel.
    """
    choose = centroid_head_metal if on_gpu() else centroid_head_reference
    return choose(h, head, sampling, positions)


def centroid_head_reference(
    h: mx.array, head: CentroidHead, sampling: Sampling, positions: mx.array
) -> mx.array:
    """Define centroid_head."""
    logits, ids = centroid_candidates(h, head)
    noise = gumbel(sampling, positions[:, None], head.ordering.size)
    return draw(logits[:, None], noise, sampling._replace(filtered=False), ids[:, None])[:, 0]


def centroid_candidates(h: mx.array, head: CentroidHead) -> tuple[mx.array, mx.array]:
    """Return the logits [B, n] float32 of the best clusters' tokens, and their ids, ascending."""
    scores = head.centroids(h).astype(h.dtype)
    best = mx.argsort(-scores, axis=-1)[:, : head.top_k]
    clusters = head.ordering.reshape(head.centroids.weight.shape[0], -1)
    ids = mx.sort(clusters[best].reshape(len(h), -1), axis=-1)
    logits = (decoded_rows(head.tokens, ids, h.dtype) @ h[..., None])[..., 0]
    return logits.astype(h.dtype).astype(mx.float32), ids


def centroid_head_metal(
    h: mx.array, head: CentroidHead, sampling: Sampling, positions: mx.array
) -> mx.array:
    """Launch centroid_head: three launches."""
    rows, width = h.shape
    size, centroids = head.ordering.size, head.centroids.weight.shape[0]
    assert positions.shape == (rows,) and head.ordering.dtype == mx.int32, head.ordering.dtype
    assert size == head.tokens.weight.shape[0] and not size % centroids, (size, centroids)
    assert head.top_k <= centroids < 2**16, (head.top_k, centroids)
    found = packing(head.tokens)
    scores, ids = CHOOSE_IN_CLUSTER.launch(
        [
            head_logits_metal(h, head.centroids, None),
            h,
            *weight_arrays(head.tokens),
            head.ordering,
            *(sampling.temperature, sampling.seed, positions.astype(mx.int32)),
        ],
        (head.top_k, rows, 1),
        [Output((rows, head.top_k), mx.float32), Output((rows, head.top_k), mx.uint32)],
        {
            **found.template(width),
            "ROWS": max(1, min(4, 16 // found.bits)),
            "CENTROIDS": centroids,
            "COUNT": head.top_k,
        },
    )
    return best_of_choices(scores, ids)
