"""What a pass reads: the committed cache, the keys and values it has just computed, its positions.

A reader lives as long as one pass. It holds views of the cache, so it must be gone before a commit.
"""

import copy
from functools import cache as cached
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.attention import (
    BlockSource,
    PromptSource,
    Rows,
    View,
    block_view,
    cache_view,
    read_block,
)
from gemma_mtp_mlx.cache import Cache, Seat
from gemma_mtp_mlx.config import LayerConfig


class Turn(NamedTuple):
    """How RoPE turns a pass's heads, float32: the halves of a head are x * cos + swapped x * sin.

    cos: [B, L, 1, 1, D / 2]; sin: [B, L, 1, 2, D / 2], the first half negated.
    """

    cos: mx.array
    sin: mx.array


class Turns:
    """The turns of a pass's tokens, computed once for each of the two kinds of layers."""

    def __init__(self, positions: mx.array, length: int) -> None:
        """positions: [B] int32, of the first of `length` consecutive tokens per row."""
        self._positions, self._length = positions, length
        self._turns: dict[bool, Turn] = {}

    def of(self, layer: LayerConfig) -> Turn:
        """Return the turn of the layer's heads."""
        if layer.sliding not in self._turns:
            positions = (self._positions[:, None] + mx.arange(self._length))[..., None, None, None]
            angles = positions / wavelengths(layer)
            sin = mx.sin(angles)
            turn = Turn(mx.cos(angles), mx.concatenate([-sin, sin], axis=-2))
            self._turns[layer.sliding] = turn
        return self._turns[layer.sliding]


@cached
def wavelengths(layer: LayerConfig) -> mx.array:
    """RoPE's wavelengths / 2 pi, [D / 2]; infinite, which turns by nothing, where not rotated."""
    exponents = np.arange(0, layer.rope_dims, 2) / layer.head_dim
    still = np.full((layer.head_dim - layer.rope_dims) // 2, np.inf)
    return mx.array(np.concatenate([layer.rope_theta**exponents, still]), mx.float32)


class VerifyReader:
    """One verify pass over a batch: collects each layer's block and serves what queries read."""

    def __init__(self, cache: Cache, rows: Rows, length: int) -> None:
        self.positions = rows.lengths  # [B] int32: RoPE position of the block's first token
        self.turns = Turns(rows.lengths, length)
        self.blocks: dict[int, mx.array] = {}
        self._cache = cache
        self._sources: dict[int, BlockSource] = {}
        self._views: dict[bool, View] = {
            sliding: block_view(rows, length, cache.kind(sliding=sliding))
            for sliding in (True, False)
        }

    def source(self, layer: LayerConfig, block: mx.array | None) -> BlockSource:
        """Return what the layer's queries read; block: its own new [B, 2G, L, D]."""
        if block is not None:
            self.blocks[layer.index] = block
            storage = self._cache.storage[layer.index]
            self._sources[layer.index] = read_block(storage, block, self._views[layer.sliding])
        return self._sources[layer.kv_source]


class PromptReader:
    """One prefill pass over a chunk of one row's prompt, at positions start, start + 1, ..."""

    def __init__(self, cache: Cache, seat: Seat, start: int, length: int) -> None:
        self.positions = mx.array([start])
        self.turns = Turns(self.positions, length)
        self.blocks: dict[int, mx.array] = {}
        self._cache, self._seat, self._start = cache, seat, start
        self._sources: dict[int, PromptSource] = {}
        window = cache.config.sliding_window
        seen = min(start, window - 1)
        queries = np.arange(length)[:, None]
        keys = np.arange(-seen, length)[None]
        self._sliding = mx.array((keys <= queries) & (keys > queries - window))

    def at_end(self, length: int) -> "PromptReader":
        """Return a reader of the same pass for queries at the chunk's last position only."""
        end = copy.copy(self)
        end.positions = self.positions + length - 1
        end.turns = Turns(end.positions, 1)
        return end

    def source(self, layer: LayerConfig, block: mx.array | None) -> PromptSource:
        """Return what the layer's queries read; block: its own new [B, 2G, L, D]."""
        if block is not None:
            self.blocks[layer.index] = block
            past = self._cache.read_committed(layer, self._seat, self._start)
            keys, values = mx.split(mx.concatenate([past, block], axis=2), 2, axis=1)
            mask = self._sliding if layer.sliding else "causal"
            self._sources[layer.index] = PromptSource(keys, values, mask)
        return self._sources[layer.kv_source]


class SharedKV:
    """What a drafter sees: the committed cache of the target's last full and last sliding owner.

    A full layer's queries see every committed position, a sliding layer's the last W + 1: one more
    than the target's own rule (transformers Gemma4AssistantForCausalLM.create_attention_masks).
    """

    def __init__(self, cache: Cache, rows: Rows) -> None:
        self.rows = rows
        self.positions = rows.lengths  # [B] int32: of the bonus token, constant while drafting
        self.turns = Turns(rows.lengths, 1)
        window = cache.config.sliding_window + 1
        views = {
            sliding: cache_view(rows, cache.kind(sliding=sliding, window=window))
            for sliding in (True, False)
        }
        self._sources = {
            sliding: read_block(
                cache.storage[cache.config.last_owner(sliding=sliding).index], None, view
            )
            for sliding, view in views.items()
        }

    def source(self, layer: LayerConfig, block: mx.array | None) -> BlockSource:
        """Return what the layer's queries read. A drafter's layers never own keys and values."""
        assert block is None
        return self._sources[layer.sliding]
