"""The cache: keys and values of what the target has confirmed, and nothing else.

A position's place never depends on history. Full layers keep one pool per layer in which every row
owns a segment, place = segment start + position. Sliding layers keep one ring per slot, place =
position mod ring, where ring = window + 1 (a drafter sees one position more than the target) +
MAX_BLOCK (so that writing a whole block, rejected tail included, never overwrites what is still
visible). There is no trim and no rollback: a block is written behind the committed positions and
only the length says how much of it counts.

Storage of both kinds is [G, N, D], a ring being `ring` consecutive entries, so one gather and one
scatter serve both. Writes are in place as long as nobody else holds the buffer: readers are local
to a pass, a commit is evaluated only after the pass before it, and what is kept of a row is a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.attention import KV, Rows
from gemma_mtp_mlx.config import LayerConfig, ModelConfig

MAX_BLOCK = 16  # the largest block: 15 drafts and the bonus token


@dataclass(frozen=True, slots=True)
class Seat:
    """A row's memory: `size` positions of every pool from `start` on, and ring number `slot`."""

    start: int
    size: int
    slot: int


def seat_size(positions: int) -> int:
    """Positions to reserve for a row that commits at most so many: a block may end behind them."""
    return positions + MAX_BLOCK


def ring_size(config: ModelConfig) -> int:
    """Entries of one ring."""
    return config.sliding_window + 1 + MAX_BLOCK


def position_bytes(config: ModelConfig, dtype: mx.Dtype) -> int:
    """Bytes of keys and values that one position takes in the full layers' pools."""
    return sum(_entry_bytes(layer, dtype) for layer in config.layers if not layer.sliding)


def window_bytes(config: ModelConfig, dtype: mx.Dtype, entries: int) -> int:
    """Bytes of keys and values that so many positions take in the sliding layers."""
    return entries * sum(_entry_bytes(layer, dtype) for layer in config.layers if layer.sliding)


def _entry_bytes(layer: LayerConfig, dtype: mx.Dtype) -> int:
    return 2 * layer.num_key_value_heads * layer.head_dim * dtype.size if layer.owns_kv else 0


class Cache:
    """Storage of `slots` rows that share pools of `positions`, reserved once and never moved."""

    def __init__(self, config: ModelConfig, slots: int, positions: int, dtype: mx.Dtype) -> None:
        self.config = config
        self.ring = ring_size(config)
        entries = {True: slots * self.ring, False: positions}
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

    def rows(self, seats: Sequence[Seat], lengths: mx.array, bounds: Sequence[int]) -> Rows:
        """Describe the rows in those seats. lengths: [B] int32; bounds: at least those."""
        starts = [seat.start for seat in seats]
        spans = tuple(zip(starts, bounds, strict=True))
        return Rows(lengths, mx.array(starts), mx.array([seat.slot for seat in seats]), spans)

    def commit(self, blocks: dict[int, KV], rows: Rows) -> None:
        """Write whole blocks ([B, G, L, D] per owning layer) behind each row's committed length."""
        length = next(iter(blocks.values())).keys.shape[2]
        positions = rows.lengths[:, None] + mx.arange(length)
        places = {
            False: (rows.starts[:, None] + positions).reshape(1, -1, 1),
            True: (rows.slots[:, None] * self.ring + positions % self.ring).reshape(1, -1, 1),
        }

        def written(stored: mx.array, fresh: mx.array, where: mx.array) -> mx.array:
            entries = fresh.swapaxes(0, 1).reshape(len(stored), -1, stored.shape[2])
            return mx.put_along_axis(stored, where, entries, axis=1)

        for index, block in blocks.items():
            where = places[self.config.layers[index].sliding]
            stored = self.storage[index]
            self.storage[index] = KV(
                written(stored.keys, block.keys, where), written(stored.values, block.values, where)
            )

    def commit_prompt(self, blocks: dict[int, KV], seat: Seat, start: int) -> None:
        """Write a prompt chunk ([1, G, T, D] per owning layer) from position start on."""
        for index, block in blocks.items():
            chunk = block.keys.shape[2]
            for stored, fresh in zip(self.storage[index], block, strict=True):
                if self.config.layers[index].sliding:
                    kept = min(chunk, self.ring)
                    places = self._ring_places(seat, start + chunk - kept, kept)
                    stored[:, places] = fresh[0, :, -kept:]
                else:
                    begin = seat.start + start
                    stored[:, begin : begin + chunk] = fresh[0]

    def prompt_keys_values(self, layer: LayerConfig, seat: Seat, start: int) -> KV:
        """Return the committed [1, G, S, D] that a chunk at position `start` can see, in order."""
        keys, values = self.storage[layer.index]
        if layer.sliding:
            seen = min(start, self.config.sliding_window - 1)
            places = self._ring_places(seat, start - seen, seen)
            return KV(mx.take(keys, places, axis=1)[None], mx.take(values, places, axis=1)[None])
        begin = seat.start
        return KV(keys[None, :, begin : begin + start], values[None, :, begin : begin + start])

    def copy_window(self, seat: Seat, position: int) -> dict[int, KV]:
        """Copy what a drafter may see in the sliding layers once `position` positions are there.

        Returns: [G, n, D] per owning sliding layer, the last n = min(position, W + 1) in order.
        """
        seen = min(position, self.config.sliding_window + 1)
        places = self._ring_places(seat, position - seen, seen)
        window = {
            layer.index: KV(*(mx.take(kv, places, axis=1) for kv in self.storage[layer.index]))
            for layer in self.config.layers
            if layer.owns_kv and layer.sliding
        }
        mx.eval(list(window.values()))  # a copy that is not made yet would hold the rings
        return window

    def write_window(self, window: dict[int, KV], seat: Seat, position: int) -> None:
        """Write what `copy_window` has copied, for a row that stands at that position."""
        for index, kv in window.items():
            count = kv.keys.shape[1]
            places = self._ring_places(seat, position - count, count)
            for stored, kept in zip(self.storage[index], kv, strict=True):
                stored[:, places] = kept

    def read_prompt(self, start: int, count: int) -> dict[int, KV]:
        """Copy the first `count` positions, [G, count, D] per owning full layer, of a segment."""
        places = mx.arange(start, start + count)
        found = {
            layer.index: KV(*(mx.take(kv, places, axis=1) for kv in self.storage[layer.index]))
            for layer in self.config.layers
            if layer.owns_kv and not layer.sliding
        }
        mx.eval(list(found.values()))
        return found

    def write_prompt(self, prompt: dict[int, KV], seat: Seat) -> None:
        """Write what `read_prompt` has copied to the beginning of a seat."""
        for index, kv in prompt.items():
            end = seat.start + kv.keys.shape[1]
            for stored, kept in zip(self.storage[index], kv, strict=True):
                stored[:, seat.start : end] = kept

    def _ring_places(self, seat: Seat, first: int, count: int) -> mx.array:
        return mx.array(seat.slot * self.ring + np.arange(first, first + count) % self.ring)
