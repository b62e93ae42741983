"""What a pass reads: the committed cache, the keys and values it has just computed, its positions.

A reader lives as long as one pass. It holds views of the cache, so it must be gone before a commit.
"""

import copy
from functools import cache as cached
from functools import cached_property

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.attention import (
    BlockSource,
    Kind,
    PromptSource,
    Rows,
    View,
    block_view,
    cache_view,
    read_block,
)
from gemma_mtp_mlx.cache import Cache, Seat
from gemma_mtp_mlx.config import LayerConfig
from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.arithmetic import OWN, STOCK, Arithmetic
from gemma_mtp_mlx.kernels.attention_heads import Turn
from gemma_mtp_mlx.kernels.verify_attention import KernelSource


class Turns:
    """The turns of a pass's tokens, one for each of the two kinds of layers."""

    def __init__(self, positions: mx.array, length: int) -> None:
        """positions: [B] int32, of the first of `length` consecutive tokens per row."""
        self._positions, self._length = positions, length
        self._turns: dict[bool, Turn] = {}

    def of(self, layer: LayerConfig) -> Turn:
        """Return the turn of the layer's heads."""
        if layer.sliding not in self._turns:
            turn = Turn(self._positions, self._length, wavelengths(layer))
            self._turns[layer.sliding] = turn
        return self._turns[layer.sliding]


@cached
def wavelengths(layer: LayerConfig) -> mx.array:
    """RoPE's wavelengths / 2 pi, [D / 2]; infinite, which turns by nothing, where not rotated."""
    exponents = np.arange(0, layer.rope_dims, 2) / layer.head_dim
    still = np.full((layer.head_dim - layer.rope_dims) // 2, np.inf)
    return mx.array(np.concatenate([layer.rope_theta**exponents, still]), mx.float32)


class Sight:
    """What the queries of one pass see in one kind of layer."""

    def __init__(self, rows: Rows, kind: Kind, length: int | None = None) -> None:
        """length: new positions per row, or None for a drafter's query over the cache alone."""
        self._rows, self._kind, self._length = rows, kind, length

    @cached_property
    def _view(self) -> View:
        if self._length is None:
            return cache_view(self._rows, self._kind)
        return block_view(self._rows, self._length, self._kind)

    def read(self, storage: mx.array, block: mx.array | None) -> BlockSource | KernelSource:
        """Return what a layer's queries read. storage: [2G, N, D]; block: [B, 2G, L, D]."""
        if on_gpu():
            return KernelSource(storage, block, self._rows, self._kind)
        return read_block(storage, block, self._view)


class VerifyReader:
    """One verify pass over a batch: collects each layer's block and serves what queries read."""

    def __init__(self, cache: Cache, rows: Rows, length: int, arithmetic: Arithmetic = OWN) -> None:
        self.arithmetic = arithmetic
        self.turns = Turns(rows.lengths, length)
        self.blocks: dict[int, mx.array] = {}
        self._cache = cache
        self._sources: dict[int, BlockSource | KernelSource] = {}
        self._sights = {
            sliding: Sight(rows, cache.kind(sliding=sliding), length) for sliding in (True, False)
        }

    def source(self, layer: LayerConfig, block: mx.array | None) -> BlockSource | KernelSource:
        """Return what the layer's queries read; block: its own new [B, 2G, L, D]."""
        if block is not None:
            self.blocks[layer.index] = block
            storage = self._cache.storage[layer.index]
            self._sources[layer.index] = self._sights[layer.sliding].read(storage, block)
        return self._sources[layer.kv_source]


class PromptReader:
    """One prefill pass over a chunk of one row's prompt, at positions start, start + 1, ..."""

    arithmetic = STOCK  # a chunk is computed alone, always in the same one: MLX's kernels will do

    def __init__(self, cache: Cache, seat: Seat, start: int, length: int) -> None:
        self.turns = Turns(mx.array([start]), length)
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
        end.turns = Turns(mx.array([self._start + length - 1]), 1)
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

    def __init__(self, cache: Cache, rows: Rows, arithmetic: Arithmetic = OWN) -> None:
        self.arithmetic = arithmetic
        self.rows = rows
        self.turns = Turns(rows.lengths, 1)  # the bonus token's position, constant while drafting
        window = cache.config.sliding_window + 1
        self._sources = {
            sliding: Sight(rows, cache.kind(sliding=sliding, window=window)).read(
                cache.storage[cache.config.last_owner(sliding=sliding).index], None
            )
            for sliding in (True, False)
        }

    def source(self, layer: LayerConfig, block: mx.array | None) -> BlockSource | KernelSource:
        """Return what the layer's queries read. A drafter's layers never own keys and values."""
        assert block is None
        return self._sources[layer.sliding]
