"""The cache: keys and values of what the target has confirmed, and nothing else.

A position's place never depends on history. Full layers keep one pool per layer in which every row
owns a segment, place = segment start + position. Sliding layers keep one ring per row, place =
position mod ring, where ring = window + 1 (a drafter sees one position more than the target) +
MAX_BLOCK (so that writing a whole block, rejected tail included, never overwrites what is still
visible). There is no trim and no rollback: a block is written behind the committed positions and
only the length says how much of it counts.

Storage of both kinds is [G, N, D], a ring being `ring` consecutive entries, so one gather and one
scatter serve both. Writes are in place as long as nobody else holds the buffer: readers are local
to a pass, and a commit is evaluated only after the pass before it.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.attention import KV, Rows
from gemma_mtp_mlx.config import LayerConfig, ModelConfig

MAX_BLOCK = 16  # the largest block: 15 drafts and the bonus token


class Cache:
    """Storage of a batch: one segment and one ring per row, reserved for the row's whole life."""

    def __init__(self, config: ModelConfig, capacities: Sequence[int], dtype: mx.Dtype) -> None:
        """Reserve memory. capacities: positions each row may ever commit, prompt included."""
        self.config = config
        self.ring = config.sliding_window + 1 + MAX_BLOCK
        sizes = [capacity + MAX_BLOCK for capacity in capacities]
        self.starts = [sum(sizes[:row]) for row in range(len(sizes))]
        entries = {True: len(sizes) * self.ring, False: sum(sizes)}
        self.storage: dict[int, KV] = {}
        for layer in config.layers:
            if layer.owns_kv:
                shape = (layer.num_key_value_heads, entries[layer.sliding], layer.head_dim)
                self.storage[layer.index] = KV(mx.zeros(shape, dtype), mx.zeros(shape, dtype))
        try:
            mx.eval(list(self.storage.values()))
        except RuntimeError as error:
            raise ValueError(
                f"{self.nbytes / 1e9:.1f} GB for keys and values cannot be had; "
                "use fewer or shorter prompts, or a lower max_tokens"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(kv.keys.nbytes + kv.values.nbytes for kv in self.storage.values())

    def rows(self, members: Sequence[int], lengths: mx.array, bounds: Sequence[int]) -> Rows:
        """Describe the rows `members` of this cache. lengths: [B] int32; bounds: at least those."""
        starts = [self.starts[row] for row in members]
        spans = tuple(zip(starts, bounds, strict=True))
        return Rows(lengths, mx.array(starts), mx.array(list(members)), spans)

    def commit(self, blocks: dict[int, KV], rows: Rows) -> None:
        """Write whole blocks ([B, G, L, D] per owning layer) behind each row's committed length."""
        length = next(iter(blocks.values())).keys.shape[2]
        positions = rows.lengths[:, None] + mx.arange(length)
        place = {
            False: (rows.starts[:, None] + positions).reshape(-1),
            True: (rows.slots[:, None] * self.ring + positions % self.ring).reshape(-1),
        }
        for index, block in blocks.items():
            where = place[self.config.layers[index].sliding]
            for stored, fresh in zip(self.storage[index], block, strict=True):
                g, d = stored.shape[0], stored.shape[2]
                stored[:, where] = fresh.swapaxes(0, 1).reshape(g, -1, d)

    def commit_prompt(self, blocks: dict[int, KV], row: int, start: int) -> None:
        """Write a prompt chunk ([1, G, T, D] per owning layer) from position start on."""
        for index, block in blocks.items():
            chunk = block.keys.shape[2]
            for stored, fresh in zip(self.storage[index], block, strict=True):
                if self.config.layers[index].sliding:
                    kept = min(chunk, self.ring)
                    stored[:, self._ring_places(row, start + chunk - kept, kept)] = fresh[
                        0, :, -kept:
                    ]
                else:
                    begin = self.starts[row] + start
                    stored[:, begin : begin + chunk] = fresh[0]

    def _ring_places(self, row: int, first: int, count: int) -> mx.array:
        return mx.array(row * self.ring + np.arange(first, first + count) % self.ring)

    def prompt_keys_values(self, layer: LayerConfig, row: int, start: int) -> KV:
        """Return the committed [1, G, S, D] that a chunk at position `start` can see, in order."""
        keys, values = self.storage[layer.index]
        if layer.sliding:
            seen = min(start, self.config.sliding_window - 1)
            places = self._ring_places(row, start - seen, seen)
            return KV(mx.take(keys, places, axis=1)[None], mx.take(values, places, axis=1)[None])
        begin = self.starts[row]
        return KV(keys[None, :, begin : begin + start], values[None, :, begin : begin + start])
