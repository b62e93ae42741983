"""The cache: keys and values of what the target has confirmed, and nothing else.

A position's place never depends on history. Full layers keep one pool per layer in which every row
owns a segment, place = segment start + position. Sliding layers keep one ring per slot, place =
position mod ring, where ring = window + 1 (a drafter sees one position more than the target) +
MAX_BLOCK (so that writing a whole block, rejected tail included, never overwrites what is still
visible). There is no trim and no rollback: a block is written behind the committed positions and
only the length says how much of it counts.

Storage of both kinds is [2G, N, D], keys then values, a ring being `ring` consecutive entries, so
one gather and one scatter serve all. Writes are in place as long as nobody else holds the buffer:
readers are local to a pass, a commit is evaluated only after the pass before it, and what is kept
of a row is a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.attention import Kind, Rows
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
        self.storage: dict[int, mx.array] = {}
        for layer in config.layers:
            if layer.owns_kv:
                shape = (2 * layer.num_key_value_heads, entries[layer.sliding], layer.head_dim)
                self.storage[layer.index] = mx.zeros(shape, dtype)
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
        return sum(kv.nbytes for kv in self.storage.values())

    def kind(self, *, sliding: bool, window: int | None = None) -> Kind:
        """Describe the layers of a kind. window: of sliding layers, None for the config's."""
        heads, entries, _ = self.storage[self.config.last_owner(sliding=sliding).index].shape
        if not sliding:
            return Kind(None, None, heads, entries)
        return Kind(window or self.config.sliding_window, self.ring, heads, entries)

    def rows(self, seats: Sequence[Seat], lengths: mx.array, bounds: Sequence[int]) -> Rows:
        """Describe the rows in those seats. lengths: [B] int32; bounds: at least those."""
        starts = [seat.start for seat in seats]
        spans = tuple(zip(starts, bounds, strict=True))
        return Rows(lengths, mx.array(starts), mx.array([seat.slot for seat in seats]), spans)

    def commit(self, blocks: dict[int, mx.array], rows: Rows) -> None:
        """Write whole blocks ([B, 2G, L, D] per owning layer) behind the committed positions."""
        length = next(iter(blocks.values())).shape[2]
        positions = rows.lengths[:, None] + mx.arange(length)
        places = {
            False: (rows.starts[:, None] + positions).reshape(1, -1, 1),
            True: (rows.slots[:, None] * self.ring + positions % self.ring).reshape(1, -1, 1),
        }
        for index, block in blocks.items():
            where, stored = places[self.config.layers[index].sliding], self.storage[index]
            entries = block.swapaxes(0, 1).reshape(len(stored), -1, stored.shape[2])
            self.storage[index] = mx.put_along_axis(stored, where, entries, axis=1)

    def commit_prompt(self, blocks: dict[int, mx.array], seat: Seat, start: int) -> None:
        """Write a prompt chunk ([1, 2G, T, D] per owning layer) from position start on."""
        for index, (block,) in blocks.items():
            stored, chunk = self.storage[index], block.shape[1]
            if self.config.layers[index].sliding:
                kept = min(chunk, self.ring)
                stored[:, self._ring_places(seat, start + chunk - kept, kept)] = block[:, -kept:]
            else:
                begin = seat.start + start
                stored[:, begin : begin + chunk] = block

    def read_committed(self, layer: LayerConfig, seat: Seat, start: int) -> mx.array:
        """Return the committed [1, 2G, S, D] that a chunk at position `start` can see, in order."""
        stored = self.storage[layer.index]
        if layer.sliding:
            seen = min(start, self.config.sliding_window - 1)
            return mx.take(stored, self._ring_places(seat, start - seen, seen), axis=1)[None]
        return stored[None, :, seat.start : seat.start + start]

    def copy_window(self, seat: Seat, position: int) -> dict[int, mx.array]:
        """Copy what a drafter may see in the sliding layers once `position` positions are there.

        Returns: [2G, n, D] per owning sliding layer, the last n = min(position, W + 1) in order.
        """
        seen = min(position, self.config.sliding_window + 1)
        return self._copy(self._ring_places(seat, position - seen, seen), sliding=True)

    def write_window(self, window: dict[int, mx.array], seat: Seat, position: int) -> None:
        """Write what `copy_window` has copied, for a row that stands at that position."""
        for index, kept in window.items():
            count = kept.shape[1]
            self.storage[index][:, self._ring_places(seat, position - count, count)] = kept

    def read_prompt(self, start: int, count: int) -> dict[int, mx.array]:
        """Copy the first `count` positions, [2G, count, D] per owning full layer, of a segment."""
        return self._copy(mx.arange(start, start + count), sliding=False)

    def write_prompt(self, prompt: dict[int, mx.array], seat: Seat) -> None:
        """Write what `read_prompt` has copied to the beginning of a seat."""
        for index, kept in prompt.items():
            self.storage[index][:, seat.start : seat.start + kept.shape[1]] = kept

    def _copy(self, places: mx.array, *, sliding: bool) -> dict[int, mx.array]:
        """Copy those entries of every owning layer of a kind."""
        copied = {
            index: mx.take(stored, places, axis=1)
            for index, stored in self.storage.items()
            if self.config.layers[index].sliding == sliding
        }
        mx.eval(list(copied.values()))  # a copy that is not made yet would hold the buffers
        return copied

    def _ring_places(self, seat: Seat, first: int, count: int) -> mx.array:
        return mx.array(seat.slot * self.ring + np.arange(first, first + count) % self.ring)
