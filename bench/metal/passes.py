"""One pass over new positions, as mlx_lm and as this package build it: graphs to count.

Models have real sizes and 4-bit weights of no content (tracing.py). mlx_lm runs on the caches that
its generators use, as they are after a prompt; ours is a greedy round. What this package decides
when it is imported has to be decided as on a GPU, so this has to be imported before the rest of it.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache
from mlx_lm.models.gemma4_text import Model, ModelArgs

from bench.metal.tracing import Graph, empty, like_a_gpu, trace

AS_ON_A_GPU = "gemma_mtp_mlx.device" not in sys.modules
with like_a_gpu():
    from gemma_mtp_mlx.cache import Cache, Seat, seat_size
    from gemma_mtp_mlx.config import FULL, DrafterConfig, ModelConfig
    from gemma_mtp_mlx.drafter import Drafter
    from gemma_mtp_mlx.round import DecodeState, Models, Round, build_round, settings_of
    from gemma_mtp_mlx.sampling import SamplingParams
    from gemma_mtp_mlx.target import Target

DTYPE = mx.bfloat16


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass over `length` new positions of `rows` rows that stand at `context`, of any text."""

    rows: int
    length: int
    context: int

    @property
    def tokens(self) -> mx.array:
        """Token ids [B, L] to trace with."""
        return empty((self.rows, self.length), mx.int32)


class Side(Protocol):
    """Whose pass it is."""

    def graphs(self, step: Pass) -> list[Graph]:
        """Return a pass, tokens in, tokens out; what is evaluated later is a graph of its own."""


def quantised(model: nn.Module) -> nn.Module:
    """Give a model the weights that mlx_lm's converter makes: 4 bits, routers 8, norms bfloat16."""
    model.set_dtype(DTYPE)

    def choose(path: str, leaf: nn.Module) -> bool | dict[str, int]:
        if "to_quantized" not in dir(leaf):
            return False
        return {"group_size": 64, "bits": 8} if path.endswith("router.proj") else True

    nn.quantize(model, 64, 4, class_predicate=choose)
    for module in model.modules():  # computed when a model is made, and kept: not of any pass
        mx.eval([value for name, value in module.items() if name.startswith("_")])
    return model


def like(tree: Any) -> Any:
    """Return a tree of arrays to trace with that are like those of another."""
    return tree_map(lambda x: empty(x.shape, x.dtype), tree)


def flat(tree: Any) -> list[mx.array]:
    """Return a tree's arrays."""
    return [array for _, array in tree_flatten(tree)]


def filled(tree: Any, arrays: Sequence[mx.array]) -> Any:
    """Return the tree with these arrays."""
    following = iter(arrays)
    return tree_map(lambda _: next(following), tree)


def trace_tree(function: Callable[[Any], Any], given: Any) -> Graph:
    """Trace a function from a tree of arrays to a tree of arrays."""
    return trace(lambda *arrays: flat(function(filled(given, arrays))), *flat(like(given)))


class MlxLm:
    """mlx_lm's gemma4_text: over the caches of generate_step for one row, for more over those of
    BatchGenerator, without padding. All positions' logits become log-probabilities, then tokens."""

    def __init__(self, text: dict[str, Any]) -> None:
        self.text = text
        self.model = quantised(Model(ModelArgs.from_dict(text)))

    def graphs(self, step: Pass) -> list[Graph]:
        """Return a pass and its writing to the caches."""
        names, weights = zip(*tree_flatten(self.model.parameters()), strict=True)

        def run(given: Any) -> list[mx.array]:
            self.model.update(tree_unflatten(list(zip(names, given["weights"], strict=True))))
            caches = self._caches(step, given["stored"])
            logits = self.model(given["tokens"], cache=caches)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            written = [x for c in caches for x in vars(c).values() if isinstance(x, mx.array)]
            return [mx.argmax(logprobs, axis=-1), logprobs, *written]

        given = {"tokens": step.tokens, "stored": self._stored(step), "weights": list(weights)}
        graph = trace_tree(run, given)
        self.model.update(tree_unflatten(list(zip(names, weights, strict=True))))
        return [graph]

    def _stored(self, step: Pass) -> list[tuple[mx.array, mx.array]]:
        """Keys and values [B, G, S, D] of every layer that owns some, as its cache holds them."""
        found = []
        for attention in (layer.self_attn for layer in self.model.model.layers):
            if attention.has_kv:
                held = self.text["sliding_window"]
                if not attention.is_sliding:
                    held = -(-seat_size(step.context) // 256) * 256  # as such a cache grows
                shape = (step.rows, attention.n_kv_heads, held, attention.head_dim)
                found.append((empty(shape, DTYPE), empty(shape, DTYPE)))
        return found

    def _caches(self, step: Pass, stored: Sequence[tuple[mx.array, mx.array]]) -> list[Any]:
        """Return caches that hold those keys and values and stand at the context's end."""
        window, caches = self.text["sliding_window"], self.model.make_cache()
        types = self.text["layer_types"][: len(caches)]
        if step.rows > 1:
            unpadded = [0] * step.rows
            caches = [
                BatchKVCache(unpadded) if kind == FULL else BatchRotatingKVCache(window, unpadded)
                for kind in types
            ]
        for kind, cache, (keys, values) in zip(types, caches, stored, strict=True):
            facts = vars(cache)
            facts.update(keys=keys, values=values, _offset=step.context, rotated=True)
            facts["_idx"] = step.context if kind == FULL else step.context % window
            batch = [step.context] * step.rows
            facts["offset"] = step.context if step.rows == 1 else mx.array(batch)
        return caches


class Given(nn.Module):
    """A drafter that proposes what it is given."""

    def __init__(self, drafts: mx.array) -> None:
        super().__init__()
        self._drafts = drafts

    def draft(self, *_: Any) -> mx.array:
        """Propose it."""
        return self._drafts


class Ours:
    """A verify pass of a round and its commit; and the drafting of a round."""

    def __init__(self, text: dict[str, Any], drafter: DrafterConfig) -> None:
        if not AS_ON_A_GPU:
            raise RuntimeError("gemma_mtp_mlx was imported before bench.passes: start with this")
        self.models = nn.Module()
        self.models.target = quantised(Target(ModelConfig.from_dict(text)))
        self.models.drafter = quantised(Drafter(drafter))

    def graphs(self, step: Pass) -> list[Graph]:
        """Return a pass over given drafts, and the commit."""
        blocks: list[Any] = []  # what the pass leaves to be committed

        def run(given: Any) -> list[Any]:
            done = self._round(step, given, Given(given["drafts"]))
            blocks.append(like(done.blocks))
            return [done.report, *done.state, done.blocks]

        def commit(given: Any) -> Any:
            cache = self._cache(step, given["storage"])
            cache.commit(given["blocks"], self._rows(step, cache, given["lengths"]))
            return cache.storage

        given = self._given(step)
        verified = trace_tree(run, given)
        committed = {key: given[key] for key in ("storage", "lengths")} | {"blocks": blocks[0]}
        return [verified, trace_tree(commit, committed)]

    def drafting(self, step: Pass) -> list[Graph]:
        """Return the drafting of a block."""
        drafter = self.models.drafter
        return [
            trace_tree(lambda given: self._round(step, given, drafter).block, self._given(step))
        ]

    def _given(self, step: Pass) -> dict[str, Any]:
        b, width = step.rows, self.models.target.config.hidden_size
        with like_a_gpu():
            storage = self._cache(step, None).storage
        return {
            "storage": storage,
            "tokens": empty((b,), mx.int32),
            "drafts": empty((b, step.length - 1), mx.int32),
            "hidden": empty((b, width), DTYPE),
            "lengths": empty((b,), mx.int32),
            "weights": self.models.parameters(),
        }

    def _round(self, step: Pass, given: Any, drafter: Any) -> Round:
        self.models.update(given["weights"])
        target = self.models.target
        cache, b = self._cache(step, given["storage"]), step.rows
        lengths = given["lengths"]
        recent = mx.zeros((b, 0), mx.int32)
        state = DecodeState(given["tokens"], given["hidden"], lengths, recent)
        settings = settings_of([SamplingParams()] * b, [0] * b, target.config.vocab_size)
        rows = self._rows(step, cache, lengths)
        return build_round(Models(target, drafter), cache, rows, state, settings, step.length - 1)

    def _cache(self, step: Pass, storage: Any) -> Cache:
        room = seat_size(step.context + step.length)
        cache = Cache(self.models.target.config, step.rows, step.rows * room, DTYPE)
        if storage is not None:
            cache.storage = storage
        return cache

    def _rows(self, step: Pass, cache: Cache, lengths: mx.array) -> Any:
        room = seat_size(step.context + step.length)
        seats = [Seat(row * room, room, row) for row in range(step.rows)]
        return cache.rows(seats, lengths, [step.context] * step.rows)
