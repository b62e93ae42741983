"""Cases of the kernels that read activations: attention, and what lies between the matmuls."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from bench.metal.place import ITEM, Case, Place, Work, embedding, packed, random
from gemma_mtp_mlx import dispatch
from gemma_mtp_mlx.attention import Kind, Rows
from gemma_mtp_mlx.cache import ring_size, seat_size
from gemma_mtp_mlx.dispatch import Heads, Weights
from gemma_mtp_mlx.kernels.attention_heads import (
    Turn,
    attention_heads,
    attention_heads_reference,
)
from gemma_mtp_mlx.kernels.embed_tokens import embed_tokens, embed_tokens_reference
from gemma_mtp_mlx.kernels.per_layer_inputs import per_layer_inputs, per_layer_inputs_reference
from gemma_mtp_mlx.kernels.residual_norm import residual_norm, residual_norm_reference
from gemma_mtp_mlx.kernels.route import route, route_reference
from gemma_mtp_mlx.kernels.verify_attention import verify_attention
from gemma_mtp_mlx.readers import wavelengths


def attention(place: Place, *, sliding: bool) -> Case:
    """Attention of the new positions. Rows are equally long; MLX gets what they see in one array,
    and a mask where mlx_lm makes one: for windows and for several rows."""
    layer, config = place.layer(sliding=sliding), place.config
    heads = Heads(config.num_attention_heads, layer.num_key_value_heads, layer.head_dim)
    window = config.sliding_window if sliding else None
    ring = ring_size(config) if sliding else None
    context = place.context
    seen = min(context, window - 1) if window else context
    keys, g, d = seen + place.length, heads.kv, heads.dim
    queries = (place.rows, heads.queries, place.length, d)
    stream = 2 * place.rows * g * keys * d * ITEM
    room, before = ring or seat_size(context), range(context - seen, context)

    def build() -> Work:
        stored = random(2 * g, place.rows * room, d)
        block = random(place.rows, 2 * g, place.length, d)
        numbers = range(place.rows)
        places = mx.array([[row * room + at % room for at in before] for row in numbers])
        seen_before = stored[:, places].swapaxes(0, 1)
        whole = mx.split(mx.concatenate([seen_before, block], axis=2), 2, axis=1)
        mx.eval(whole)
        kind = Kind(window, ring, 2 * g, place.rows * room)
        rows = Rows(
            mx.array([context] * place.rows),
            mx.array([row * room for row in numbers]),
            mx.array(list(numbers)),
            tuple((row * room, context) for row in numbers),
        )

        allowed: mx.array | str | None = mask
        if mask == "array":
            allowed = mx.array(np.broadcast_to(sees, (place.rows, 1, *sees.shape)))

        def theirs(x: mx.array) -> list[mx.array]:
            return [mx.fast.scaled_dot_product_attention(x, *whole, scale=1.0, mask=allowed)]

        return Work(
            random(*queries),
            lambda x: [verify_attention(x, stored, block, rows, kind)],
            theirs,
        )

    ages = np.arange(seen, seen + place.length)[:, None] - np.arange(keys)
    sees = (ages >= 0) & (ages < (window or keys))
    mask = None if place.length == 1 else "causal"
    if place.rows > 1 or (sliding and place.length > 1):
        mask = "array"
    return Case(
        "verify_attention",
        f"{place.model} {'sliding' if sliding else 'full'}, {place.rows} rows of {keys} keys, "
        f"{heads.queries} over {g} heads of {d}",
        place.tokens,
        stream,
        stream + 2 * int(np.prod(queries)) * ITEM,
        build,
        lambda chip: [dispatch.attention(chip, heads, place.rows, place.length, keys, mask=mask)],
    )


def simple(kernel: str, place: Place, what: str, items: int, work: Callable[[], Work]) -> Case:
    """A case that reads no weights and keys to speak of. items: 16-bit ones, in and out."""
    return Case(kernel, f"{place.model} {what}", place.tokens, 0, items * ITEM, work, lambda _: [])


def residual(place: Place) -> Case:
    """What follows attention: the norm of its output, the sum, the norms of what comes next."""
    config = place.config
    width, eps = config.hidden_size, config.rms_norm_eps
    nexts = 2 if config.num_experts else 1

    def build() -> Work:
        h = random(place.rows, place.length, width)
        rest = ([random(width)], None, [random(width) for _ in range(nexts)], eps)

        def run(op: Callable[..., tuple[mx.array, list[mx.array]]], x: mx.array) -> list[mx.array]:
            out, normed = op(h, [x], *rest)
            return [out, *normed]

        return Work(
            random(*h.shape),
            lambda x: run(residual_norm, x),
            lambda x: run(residual_norm_reference, x),
        )

    items = place.tokens * width * (3 + nexts) + width * (1 + nexts)
    return simple("residual_norm", place, f"after attention, {width}", items, build)


def heads(place: Place) -> Case:
    """Queries, keys and values of a sliding layer, from their projections."""
    layer, config = place.layer(sliding=True), place.config
    d, eps = layer.head_dim, config.rms_norm_eps
    counts = [config.num_attention_heads, *[layer.num_key_value_heads] * 2]

    def build() -> Work:
        queries, keys, values = (random(place.rows, place.length, n * d) for n in counts)
        weights = [random(d), random(d)]
        turn = Turn(mx.array([place.context] * place.rows), place.length, wavelengths(layer))

        def run(op: Callable[..., tuple[mx.array, ...]], x: mx.array) -> list[mx.array]:
            return list(op([x, keys, values], weights, turn, eps))

        return Work(
            queries,
            lambda x: run(attention_heads, x),
            lambda x: run(attention_heads_reference, x),
        )

    items = 2 * place.tokens * sum(counts) * d + 2 * d
    what = f"sliding, {counts[0]} and 2 x {counts[1]} heads of {d}"
    return simple("attention_heads", place, what, items, build)


def layer_inputs(place: Place) -> Case:
    """All layers' own inputs."""
    config = place.config
    size, width = config.hidden_size_per_layer_input, config.hidden_size
    total = len(config.layers) * size

    def build() -> Work:
        rest = (random(place.rows, place.length, total), random(size), width, config.rms_norm_eps)
        return Work(
            random(place.rows, place.length, total),
            lambda x: per_layer_inputs(x, *rest),
            lambda x: per_layer_inputs_reference(x, *rest),
        )

    what = f"{len(config.layers)} layers of {size}"
    items = 3 * place.tokens * total + size
    return simple("per_layer_inputs", place, what, items, build)


def embedded(place: Place) -> Case:
    """The embedding of a draft step, with the hidden state beside it."""
    config = place.config
    table = Weights(place.tall(config.vocab_size), config.hidden_size)

    def build() -> Work:
        made, scale = embedding(table), config.hidden_size**0.5
        tokens = mx.zeros((place.rows, 1), mx.int32)
        return Work(
            random(place.rows, 1, config.hidden_size),
            lambda x: [embed_tokens(made, tokens, scale, x, x.dtype)],
            lambda x: [embed_tokens_reference(made, tokens, scale, x, x.dtype)],
        )

    # The same token in every row: what is read of the table is one of its rows.
    items = place.rows * 3 * table.in_width
    case = simple("embed_tokens", place, f"drafter's input, {table.in_width}", items, build)
    return replace(case, tokens=place.rows, least=case.least + table.nbytes // table.out_width)


def routing(place: Place) -> Case:
    """The router of a layer, in 8 bits."""
    config = place.config
    weights = Weights(config.num_experts, config.hidden_size, bits=8)

    def build() -> Work:
        rest = (packed(weights), random(weights.in_width), random(weights.out_width))
        facts = (config.top_k_experts, config.rms_norm_eps)

        def run(op: Callable[..., tuple[mx.array, mx.array]], x: mx.array) -> list[mx.array]:
            chosen, factors = op(x, *rest, *facts)
            return [factors, chosen]

        return Work(
            random(place.rows, place.length, weights.in_width),
            lambda x: run(route, x),
            lambda x: run(route_reference, x),
        )

    return Case(
        "route",
        f"{place.model} router, {weights.out_width} x {weights.in_width} in 8 bits",
        place.tokens,
        weights.nbytes,
        weights.nbytes
        + (place.tokens + 1) * weights.in_width * ITEM
        + place.tokens * config.top_k_experts * 8,
        build,
        lambda chip: [dispatch.quantized_matmul(chip, weights, place.tokens)],
    )
