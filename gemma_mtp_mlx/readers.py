"""What a pass reads: the committed cache and the keys and values it has just computed.

A reader lives as long as one pass. It holds views of the cache, so it must be gone before a commit.
"""

import copy

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.attention import (
    KV,
    BlockSource,
    PromptSource,
    Rows,
    View,
    block_view,
    cache_view,
    read_block,
)
from gemma_mtp_mlx.cache import Cache
from gemma_mtp_mlx.config import LayerConfig


class VerifyReader:
    """One verify pass over a batch: collects each layer's block and serves what queries read."""

    def __init__(self, cache: Cache, rows: Rows, length: int) -> None:
        self.positions = rows.lengths  # [B] int32: RoPE position of the block's first token
        self.blocks: dict[int, KV] = {}
        self._cache = cache
        self._sources: dict[int, BlockSource] = {}
        window = cache.config.sliding_window
        self._views: dict[bool, View] = {
            True: block_view(rows, length, window, cache.ring),
            False: block_view(rows, length, None, None),
        }

    def source(self, layer: LayerConfig, block: KV | None) -> BlockSource:
        """Return what the layer's queries read; block: its new keys and values if it owns any."""
        if block is not None:
            self.blocks[layer.index] = block
            storage = self._cache.storage[layer.index]
            self._sources[layer.index] = read_block(storage, block, self._views[layer.sliding])
        return self._sources[layer.kv_source]


class PromptReader:
    """One prefill pass over a chunk of one row's prompt, at positions start, start + 1, ..."""

    def __init__(self, cache: Cache, row: int, start: int, length: int) -> None:
        self.positions = mx.array([start])
        self.blocks: dict[int, KV] = {}
        self._cache, self._row, self._start = cache, row, start
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
        return end

    def source(self, layer: LayerConfig, block: KV | None) -> PromptSource:
        """Return what the layer's queries read; block: its new keys and values if it owns any."""
        if block is not None:
            self.blocks[layer.index] = block
            past = self._cache.prompt_keys_values(layer, self._row, self._start)
            self._sources[layer.index] = PromptSource(
                mx.concatenate([past.keys, block.keys], axis=2),
                mx.concatenate([past.values, block.values], axis=2),
                self._sliding if layer.sliding else "causal",
            )
        return self._sources[layer.kv_source]


class SharedKV:
    """What a drafter sees: the committed cache of the target's last full and last sliding owner.

    A full layer's queries see every committed position, a sliding layer's the last W + 1: one more
    than the target's own rule (transformers Gemma4AssistantForCausalLM.create_attention_masks).
    """

    def __init__(self, cache: Cache, rows: Rows) -> None:
        self.rows = rows
        self.positions = rows.lengths  # [B] int32: of the bonus token, constant while drafting
        window = cache.config.sliding_window + 1
        views = {
            True: cache_view(rows, window, cache.ring),
            False: cache_view(rows, None, None),
        }
        self._sources = {
            sliding: read_block(
                cache.storage[cache.config.last_owner(sliding=sliding).index], None, view
            )
            for sliding, view in views.items()
        }

    def source(self, layer: LayerConfig, block: KV | None) -> BlockSource:
        """Return what the layer's queries read. A drafter's layers never own keys and values."""
        assert block is None
        return self._sources[layer.sliding]
