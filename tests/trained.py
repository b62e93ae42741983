"""Tiny pairs that work: a random target, and a drafter that knows some of its texts by heart.

A random target's text follows no rule that a small drafter could learn in seconds. So it is shown
what rounds would hand it along a few texts of equal lengths, and the tokens that follow.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from gemma_mtp_mlx import Pair, SamplingParams, recomputation
from gemma_mtp_mlx.attention import PromptSource
from gemma_mtp_mlx.config import LayerConfig
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.kernels.arithmetic import STOCK
from gemma_mtp_mlx.layers import Source, Stream
from gemma_mtp_mlx.readers import Turns
from gemma_mtp_mlx.target import Target

DRAFTS = 4  # in a row that are trained
STEPS, RATE = 80, 0.05


class Lesson(NamedTuple):
    """Texts [B] and the rows of them at which to draft, consecutive positions of all texts.

    tokens: [B, rows + DRAFTS] from the first row's on; hidden: [B, rows, E] before each.
    """

    tokens: mx.array
    hidden: mx.array
    sources: dict[bool, Source]
    turns: Turns


class _Rows:
    """What all rows of a lesson read at once."""

    arithmetic = STOCK

    def __init__(self, lesson: Lesson) -> None:
        self.turns = lesson.turns
        self._sources = lesson.sources

    def source(self, layer: LayerConfig, block: mx.array | None) -> Source:
        return self._sources[layer.sliding]


def learn(pair: Pair, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Train a pair's drafter on what its target says to prompts of equal lengths."""
    params = SamplingParams(max_tokens=max_tokens + DRAFTS)
    said = pair.endless().generate_batch(prompts, params, num_draft_tokens=0)
    _train(pair, _lesson(pair, prompts, [result.tokens for result in said]))


def _lesson(pair: Pair, prompts: Sequence[Sequence[int]], said: Sequence[Sequence[int]]) -> Lesson:
    config = pair.target.config
    texts = [
        recomputation.compute(pair.target, [*prompt, *tokens])
        for prompt, tokens in zip(prompts, said, strict=True)
    ]
    first, rows = len(prompts[0]), len(said[0]) - DRAFTS
    at, key = mx.arange(first, first + rows)[:, None], mx.arange(first + rows)
    sources: dict[bool, Source] = {}
    for sliding in (True, False):
        layer = recomputation.right_layer(config, sliding=sliding)
        kv = mx.stack([text.kv[layer][:, : first + rows] for text in texts])
        seen = (key < at) & (key >= at - config.sliding_window - 1) if sliding else key < at
        sources[sliding] = PromptSource(*mx.split(kv, 2, axis=1), mask=seen)
    hidden = mx.stack([text.hidden[first - 1 : first + rows - 1] for text in texts])
    turns = Turns(mx.full((len(texts),), first), rows)
    return Lesson(mx.array(said), hidden, sources, turns)


def _states(drafter: Drafter, target: Target, lesson: Lesson) -> tuple[mx.array, mx.array]:
    """What each draft is drawn from, [N, width], and the token it should be, [N]."""
    reader, hidden, layers = _Rows(lesson), lesson.hidden, drafter.model.layers
    norms = [*(layer.input_layernorm for layer in layers[1:]), drafter.model.norm]
    rows, states, labels = hidden.shape[1], [], []
    for step in range(DRAFTS):
        x = drafter.pre_projection(target.embed(lesson.tokens[:, step : step + rows], hidden))
        stream = Stream(x, layers[0].input_layernorm(x))
        for layer, norm in zip(layers, norms, strict=True):
            stream = layer(stream, reader, norm)
        hidden = drafter.post_projection(stream.normed)
        states.append(stream.normed.reshape(-1, stream.normed.shape[-1]))
        labels.append(lesson.tokens[:, step + 1 : step + 1 + rows].reshape(-1))
    return mx.concatenate(states), mx.concatenate(labels)


def _train(pair: Pair, lesson: Lesson) -> None:
    """Train the drafter's head alone: its layers stay random, so what is drawn from is computed
    once, and yet depends on all that it is handed."""
    drafter = pair.drafter
    assert drafter is not None
    states, labels = _states(drafter, pair.target, lesson)
    drafter.model.embed_tokens.weight = _classify(states, labels, pair.target.config.vocab_size)
    if drafter.config.use_ordered_embeddings:
        head, count = drafter.masked_embedding, drafter.config.num_centroids
        clusters = mx.argsort(head.token_ordering)[labels] // (head.token_ordering.size // count)
        head.centroids.weight = _classify(states, clusters, count)


def _classify(states: mx.array, labels: mx.array, count: int) -> mx.array:
    """Return weights [count, width] by which the states' labels are the best."""
    weights, optimizer = {"w": mx.zeros((count, states.shape[1]))}, optim.Adam(RATE)

    def loss(weights: dict[str, mx.array]) -> mx.array:
        return nn.losses.cross_entropy(states @ weights["w"].T, labels, reduction="mean")

    for _ in range(STEPS):
        weights = optimizer.apply_gradients(mx.grad(loss)(weights), weights)
        mx.eval(weights, optimizer.state)
    return weights["w"]
