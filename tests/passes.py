"""Single passes of our models on one prompt, outside the engine: what parity tests compare."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.cache import Cache, Seat, seat_size
from gemma_mtp_mlx.drafter import Candidates, Drafter, Draw, Embed
from gemma_mtp_mlx.readers import PromptReader, SharedKV, VerifyReader
from gemma_mtp_mlx.target import Target

Array = np.ndarray
SEAT = Seat(start=0, size=0, slot=0)  # of the only row; its size is nobody's concern here


class Shared(NamedTuple):
    """What a drafter gets for a prompt of T tokens: keys and values [G, T, D] of both kinds."""

    full_keys: Array
    full_values: Array
    sliding_keys: Array
    sliding_values: Array


def relative(got: Array, want: Array) -> float:
    """Return max |got - want| / max |want|."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


def rms_relative(got: Array, want: Array) -> float:
    """Return rms(got - want) / rms(want): of rounding, where the largest is one of few draws."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def verify(target: Target, ids: list[int], block: int) -> tuple[Array, Array]:
    """Run a prompt as verify passes of `block` tokens. Returns hidden [T, E] and logits [T, V]."""
    cache = _cache(target, len(ids))
    hidden = []
    for start in range(0, len(ids), block):
        hidden.append(_verify_block(target, cache, ids[start : start + block], start))
    states = mx.concatenate(hidden)
    return _floats(states), np.array(target.logits(states))


def _floats(x: mx.array) -> Array:
    """In float32: numpy has no bfloat16."""
    return np.array(x.astype(mx.float32))


def _cache(target: Target, length: int) -> Cache:
    return Cache(target.config, 1, seat_size(length), target.dtype)


def _verify_block(target: Target, cache: Cache, tokens: list[int], start: int) -> mx.array:
    rows = cache.rows([SEAT], mx.array([start]), [start])
    reader = VerifyReader(cache, rows, len(tokens))
    hidden = target.verify(mx.array([tokens]), reader)[0]
    mx.eval(hidden, list(reader.blocks.values()))
    cache.commit(reader.blocks, rows)
    return hidden


def prefill(target: Target, ids: list[int], chunk: int) -> tuple[Array, Array, Cache]:
    """Prefill in chunks. Returns the last position's hidden [E] and logits [V], and the cache."""
    cache = _cache(target, len(ids))
    for start in range(0, len(ids), chunk):
        tokens = ids[start : start + chunk]
        reader = PromptReader(cache, SEAT, start, len(tokens))
        hidden = target.prefill(mx.array([tokens]), reader, last=start + chunk >= len(ids))
        mx.eval(hidden, list(reader.blocks.values()))
        cache.commit_prompt(reader.blocks, SEAT, start)
    assert hidden is not None
    return _floats(hidden[0]), np.array(target.logits(hidden)[0]), cache


def committed(cache: Cache, length: int) -> Shared:
    """Return what the drafter's layers would read, a sliding layer's last W + 1 positions only."""
    config = cache.config
    full, sliding = config.last_owner(sliding=False), config.last_owner(sliding=True)
    segment = slice(length)
    first = max(0, length - config.sliding_window - 1)
    places = np.arange(first, length) % cache.ring
    kept = np.split(_floats(cache.storage[full.index])[:, segment], 2)
    kept += np.split(_floats(cache.storage[sliding.index])[:, places], 2)
    return Shared(*kept)


def draft(
    target: Target, drafter: Drafter, shared: Shared, hidden: Array, tokens: list[int]
) -> tuple[Array, Array]:
    """Run a draft step per token, on given K/V and the state before the first token.

    tokens: the bonus token, then the drafts to feed. Returns logits [K, V] over the whole
    vocabulary, as transformers fills it, and the fed-back states [K, E].
    """
    config, length = target.config, shared.full_keys.shape[1]
    cache = _cache(target, length)
    given = {False: shared[:2], True: shared[2:]}
    blocks = {
        config.last_owner(sliding=kind).index: mx.array(np.concatenate(pair), target.dtype)[None]
        for kind, pair in given.items()
    }
    cache.commit_prompt(blocks, SEAT, 0)
    reader = SharedKV(cache, cache.rows([SEAT], mx.array([length]), [length]))
    state = mx.array(hidden, target.dtype)[None]
    logits, states = [], []
    for token in tokens:
        h, state = drafter.step(target.embed(mx.array([[token]]), state[:, None]), reader)
        logits.append(_whole(drafter.candidates(h), config.vocab_size))
        states.append(_floats(state[0]))
    return np.stack(logits), np.stack(states)


def _whole(candidates: Candidates, vocab_size: int) -> Array:
    """Spread one row's candidates over the vocabulary; transformers fills with their min - 1."""
    values = _floats(candidates.logits[0])
    if candidates.ids is None:
        return values
    filled = np.full(vocab_size, values.min() - 1, np.float32)
    filled[np.array(candidates.ids[0])] = values
    return filled


class Recorder(Drafter):
    """A drafter that delegates to another and keeps what it proposed, one [B, K] per round."""

    def __init__(self, inner: Drafter) -> None:
        super().__init__(inner.config)
        self._inner = inner
        self.proposals: list[mx.array] = []

    def draft(
        self, tokens: mx.array, hidden: mx.array, shared: SharedKV, embed: Embed, draw: Draw, k: int
    ) -> mx.array:
        """Propose what the other drafter proposes."""
        self.proposals.append(self._inner.draft(tokens, hidden, shared, embed, draw, k))
        return self.proposals[-1]

    def candidates(self, h: mx.array) -> Candidates:
        """Choose from what the other drafter chooses from."""
        return self._inner.candidates(h)
