"""Cases of the kernels that read weights: linear layers, experts, heads."""

from functools import cache as cached
from itertools import count

import mlx.core as mx
import numpy as np

from bench.metal.place import ITEM, Case, Place, Work, embedding, packed, random, sampling
from gemma_mtp_mlx import dispatch
from gemma_mtp_mlx.dispatch import Call, Gpu, Weights
from gemma_mtp_mlx.families import drafter_config
from gemma_mtp_mlx.kernels.centroid_head import (
    CentroidHead,
    centroid_head,
    centroid_head_reference,
)
from gemma_mtp_mlx.kernels.token_head import token_head, token_head_reference
from gemma_mtp_mlx.kernels.verify_experts import experts, experts_reference
from gemma_mtp_mlx.kernels.verify_matmul import (
    gated,
    gated_by,
    gated_by_reference,
    gated_reference,
    project,
    project_reference,
)


def projections(place: Place, what: str, width: int, *heights: int) -> Case:
    """Linear layers of one input."""
    layers = [Weights(place.tall(height), width) for height in heights]
    outs, stream = sum(w.out_width for w in layers), sum(w.nbytes for w in layers)

    def build() -> Work:
        made = [packed(w) for w in layers]
        x = random(place.rows, place.length, width)
        return Work(x, lambda x: project(x, *made), lambda x: project_reference(x, *made))

    return Case(
        "verify_matmul",
        f"{place.model} {what}, {' + '.join(str(w.out_width) for w in layers)} x {width}",
        place.tokens,
        stream,
        stream + place.tokens * (width + outs) * ITEM,
        build,
        lambda chip: [dispatch.quantized_matmul(chip, w, place.tokens) for w in layers],
    )


def gate_up(place: Place) -> Case:
    """The inner part of an MLP."""
    width, config = place.layer(sliding=True).intermediate_size, place.config
    weights = Weights(place.tall(width), config.hidden_size)

    def build() -> Work:
        gate, up = packed(weights), packed(weights)
        x = random(place.rows, place.length, config.hidden_size)
        return Work(x, lambda x: [gated(x, gate, up)], lambda x: [gated_reference(x, gate, up)])

    return Case(
        "verify_matmul",
        f"{place.model} gate and up, 2 x {weights.out_width} x {weights.in_width}",
        place.tokens,
        2 * weights.nbytes,
        2 * weights.nbytes + place.tokens * (weights.in_width + weights.out_width) * ITEM,
        build,
        lambda chip: 2 * [dispatch.quantized_matmul(chip, weights, place.tokens)],
    )


def per_layer_gate(place: Place) -> Case:
    """The gate of a layer's own input."""
    config = place.config
    weights = Weights(config.hidden_size_per_layer_input, config.hidden_size)

    def build() -> Work:
        gate = packed(weights)
        values = random(place.rows, place.length, weights.out_width)
        x = random(place.rows, place.length, weights.in_width)
        return Work(
            x,
            lambda x: [gated_by(x, gate, values)],
            lambda x: [gated_by_reference(x, gate, values)],
        )

    return Case(
        "verify_matmul",
        f"{place.model} per-layer gate, {weights.out_width} x {weights.in_width}",
        place.tokens,
        weights.nbytes,
        weights.nbytes + place.tokens * (weights.in_width + 2 * weights.out_width) * ITEM,
        build,
        lambda chip: [dispatch.quantized_matmul(chip, weights, place.tokens)],
    )


def chosen_experts(place: Place) -> Case:
    """The experts of a layer, chosen at random; a copy chooses others among the same."""
    config, tokens = place.config, place.tokens
    total, top = config.num_experts, config.top_k_experts
    inner, width = place.tall(config.moe_intermediate_size), config.hidden_size
    up, down = Weights(inner, width), Weights(width, inner)
    rng = np.random.RandomState(0)
    picked = np.stack([rng.permutation(total)[:top] for _ in range(tokens)]).astype(np.int32)
    distinct = len(np.unique(picked))
    stream = distinct * (2 * up.nbytes + down.nbytes)
    copies, layer = count(), cached(lambda: [packed(w, total) for w in (up, up, down)])

    def build() -> Work:
        shape, made = (place.rows, place.length), layer()
        chosen = mx.array((picked + 37 * next(copies)) % total).reshape(*shape, top)
        weights = mx.full(chosen.shape, 1 / top, mx.float32)
        return Work(
            random(*shape, width),
            lambda x: [experts(x, chosen, weights, *made)],
            lambda x: [experts_reference(x, chosen, weights, *made)],
        )

    return Case(
        "verify_experts",
        f"{place.model} {distinct} experts for {tokens * top} pairs, 3 x {inner} x {width}",
        tokens,
        stream,
        stream + tokens * (2 * width * ITEM + 8 * top),
        build,
        lambda chip: [dispatch.gather_qmm(chip, w, total, tokens, top) for w in (up, up, down)],
    )


def head(place: Place) -> Case:
    """The language model head, and the choice of tokens."""
    config, tokens = place.config, place.tokens
    weights = Weights(place.tall(config.vocab_size), config.hidden_size)

    def build() -> Work:
        table, settings = embedding(weights), sampling(place)
        positions = mx.zeros((place.rows, place.length), mx.int32)
        rest = (table, config.final_logit_softcapping, settings, positions)
        return Work(
            random(place.rows, place.length, config.hidden_size),
            lambda x: [token_head(x, *rest)],
            lambda x: [token_head_reference(x, *rest)],
        )

    def theirs(chip: Gpu) -> list[Call]:
        # Logits: 16 bits written and read, 32 written, read by argmax.
        logits = tokens * weights.out_width * (2 + 2 + 4 + 4)
        matmul = dispatch.quantized_matmul(chip, weights, tokens)
        return [matmul._replace(extra_bytes=matmul.extra_bytes + logits)]

    return Case(
        "token_head",
        f"{place.model} head, {weights.out_width} x {weights.in_width}",
        tokens,
        weights.nbytes,
        weights.nbytes + tokens * (weights.in_width * ITEM + 4),
        build,
        theirs,
    )


def centroids(place: Place) -> Case:
    """A draft step's head: the best clusters of the small drafters, none chosen by two rows."""
    drafter, rows = drafter_config(place.model), place.rows
    width, total = drafter.text.hidden_size, drafter.num_centroids
    size = drafter.text.vocab_size // (place.shrink if place.shrink < 64 else 64)
    top = drafter.centroid_intermediate_top_k
    first, table = Weights(total, width), Weights(size, width)
    looked_at = rows * top * (size // total)
    stream = first.nbytes + looked_at * (table.nbytes // size + 4)

    def build() -> Work:
        ordering = mx.array(np.random.RandomState(0).permutation(size).astype(np.int32))
        what = CentroidHead(packed(first), ordering, embedding(table), top)
        rest = (what, sampling(place), mx.zeros((rows,), mx.int32))
        return Work(
            random(rows, width),
            lambda x: [centroid_head(x, *rest)],
            lambda x: [centroid_head_reference(x, *rest)],
        )

    return Case(
        "centroid_head",
        f"{place.model} drafter, {top} of {total} clusters of {size // total} x {width}",
        rows,
        stream,
        stream + rows * (width * ITEM + 4),
        build,
        lambda chip: [],
    )
