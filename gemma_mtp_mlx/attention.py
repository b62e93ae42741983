"""Attention of new positions over committed keys and values and the block itself.

Every sum runs over fixed tiles of TILE absolute positions, in order of position. The tiles of a
sliding layer's window and the last STRIP tiles of a full layer are gathered, for all rows at once,
and the block's own entries put where they belong; tiles before them are read in place, row by row.
Positions that a query must not see contribute exact zeros. So the result of a row is the same, bit
for bit, whatever the number of new positions, of rows, and wherever the committed part ends:
the maximum does not depend on order, adding zero changes nothing, and the tiles never move.
This is the definition, in plain ops, that any kernel has to reproduce.

Keys (after norm and RoPE) and values lie in one array, `kv`, the values' heads behind the keys':
storage is [2G, N, D], a block [B, 2G, L, D]. One gather and one scatter serve both.
"""

from typing import NamedTuple

import mlx.core as mx

TILE = 32
STRIP = 32  # tiles gathered, and read at a time over a long committed part: bounds the temporaries


class Rows(NamedTuple):
    """The rows of one pass and where each one's memory lies.

    lengths, starts, slots: [B] int32: committed positions; first index of the row's segment in a
    full layer's pool; its ring in a sliding layer. spans: (start, bound) per row on the host,
    bound >= the row's length: the shapes of what is read in place; results do not depend on it.
    """

    lengths: mx.array
    starts: mx.array
    slots: mx.array
    spans: tuple[tuple[int, int], ...]


class View(NamedTuple):
    """Which positions a pass sees in one kind of layer: the same for every layer of that kind.

    places: [2G * B * n] where, among all heads' entries, each of the row's n = tiles * TILE
    gathered positions is stored, or would be; block_places: [2G * B * queries] which of the
    gathered ones are the block's own; mask: [B, tiles, 1, queries, TILE] float32, 0 where a query
    sees a gathered position, else -inf; first: [B] the first gathered tile; spans: of `Rows` where
    earlier tiles are read in place.
    """

    places: mx.array
    block_places: mx.array
    mask: mx.array
    first: mx.array
    spans: tuple[tuple[int, int], ...]


class Kind(NamedTuple):
    """What the layers of a kind have in common.

    window: a query sees that many positions, itself included, or None for all; ring: entries of a
    sliding layer's storage per row, or None for a full layer's pool; heads, entries: 2G and N.
    """

    window: int | None
    ring: int | None
    heads: int
    entries: int


def block_view(rows: Rows, length: int, kind: Kind) -> View:
    """View of `length` new positions per row, each seeing itself and what is before it."""
    return _view(rows, rows.lengths[:, None] + mx.arange(length), kind)


def cache_view(rows: Rows, kind: Kind) -> View:
    """View of one query per row that sees the last `window` committed positions, or all."""
    return _view(rows, rows.lengths[:, None] - 1, kind)


def _view(rows: Rows, last: mx.array, kind: Kind) -> View:
    """last: [B, queries] the last position each query sees; consecutive along a row."""
    window, ring = kind.window, kind.ring
    queries = last.shape[1]
    lengths = rows.lengths[:, None]
    if window is None:
        first = mx.maximum(lengths // TILE + 1 - STRIP, 0)
        tiles = (TILE + queries - 2) // TILE + STRIP
    else:
        first = mx.maximum(last[:, :1] + 1 - window, 0) // TILE
        tiles = (TILE + window + queries - 3) // TILE + 1
    needed = max(bound for _, bound in rows.spans) + queries
    tiles = min(tiles, -(-needed // TILE))
    positions = first * TILE + mx.arange(tiles * TILE)  # [B, n]
    if ring is None:  # what is not committed may lie in another row's segment: take any other
        places = rows.starts[:, None] + mx.where(positions < lengths, positions, 0)
    else:
        places = rows.slots[:, None] * ring + positions % ring
    begins = mx.arange(0, positions.size, tiles * TILE)[:, None] + lengths - first * TILE
    block_places = (begins + mx.arange(queries)).reshape(-1)
    heads = mx.arange(kind.heads)[:, None]
    seen = positions[:, None, :] <= last[:, :, None]  # [B, queries, n]
    if window is not None:
        seen = seen & (positions[:, None, :] > last[:, :, None] - window)
    mask = mx.where(seen, 0.0, -mx.inf).reshape(*seen.shape[:2], tiles, TILE)
    return View(
        places=(heads * kind.entries + places.reshape(-1)).reshape(-1),
        block_places=(heads * positions.size + block_places).reshape(-1),
        mask=mask.swapaxes(1, 2)[:, :, None],
        first=first[:, 0],
        spans=rows.spans if window is None else (),
    )


class BlockSource(NamedTuple):
    """What one layer's queries read in a verify or draft pass."""

    storage: mx.array  # [2G, N, D]
    gathered: mx.array  # [2G, B, tiles, TILE, D]
    view: View

    def attend(self, queries: mx.array) -> mx.array:
        """Attend. queries: [B, H, L, D]. Returns the same shape; sums and softmax in float32."""
        b, h, length, d = queries.shape
        keys, values = mx.split(self.gathered, 2)
        g, _, tiles = keys.shape[:3]
        m = h // g * length
        q = queries.reshape(b, g, 1, m, d).swapaxes(0, 1)  # [G, B, 1, M, D]
        scores = (q @ keys.swapaxes(-1, -2)).reshape(g, b, tiles, -1, length, TILE)
        scores = (scores.astype(mx.float32) + self.view.mask).reshape(g, b, tiles, m, TILE)
        peak = scores.max(axis=(2, 4), keepdims=True)  # [G, B, 1, M, 1]
        heads = [self._head_scores(q[:, row], row) for row in range(len(self.view.spans))]
        if any(heads):
            peak = mx.maximum(peak, mx.stack([_peak(strips, peak) for strips in heads], axis=1))
        totals, parts = _tile_sums(scores, peak, values)
        if any(heads):
            before = [self._head_sums(s, peak[:, row], row) for row, s in enumerate(heads)]
            totals = mx.concatenate([mx.stack([t for t, _ in before], axis=1), totals], axis=2)
            parts = mx.concatenate([mx.stack([p for _, p in before], axis=1), parts], axis=2)
        out = parts.sum(axis=2, keepdims=True) / totals.sum(axis=2, keepdims=True)
        return out.astype(queries.dtype).swapaxes(0, 1).reshape(b, h, length, d)

    def _strips(self, row: int) -> list[tuple[int, int]]:
        """Tiles [begin, end) of the row that may lie before its gathered ones, in strips."""
        tiles = self.view.spans[row][1] // TILE + 1 - STRIP
        return [(t, min(t + STRIP, tiles)) for t in range(0, tiles, STRIP)]

    def _head(self, row: int, begin: int, end: int) -> tuple[mx.array, mx.array]:
        """The row's tiles [begin, end) in place: keys and values, [G, end - begin, TILE, D]."""
        start = self.view.spans[row][0]
        tiles = self.storage[:, start + begin * TILE : start + end * TILE]
        keys, values = mx.split(tiles.reshape(len(tiles), end - begin, TILE, -1), 2)
        return keys, values

    def _head_scores(self, q: mx.array, row: int) -> list[mx.array]:
        """Scores [G, tiles, M, TILE] per strip over the row's tiles before its gathered ones.

        q: [G, 1, M, D].
        """
        strips = []
        for begin, end in self._strips(row):
            keys, _ = self._head(row, begin, end)
            scores = (q @ keys.swapaxes(-1, -2)).astype(mx.float32)
            before = mx.arange(begin, end)[:, None, None] < self.view.first[row]
            strips.append(mx.where(before, scores, -mx.inf))
        return strips

    def _head_sums(
        self, strips: list[mx.array], peak: mx.array, row: int
    ) -> tuple[mx.array, mx.array]:
        """Sum of weights [G, 1, M, 1] and of weighted values [G, 1, M, D] over those strips.

        In order of position. peak: [G, 1, M, 1].
        """
        total = mx.zeros(peak.shape)
        weighted = mx.zeros((*peak.shape[:-1], self.storage.shape[-1]))
        for scores, (begin, end) in zip(strips, self._strips(row), strict=True):
            _, values = self._head(row, begin, end)
            part_total, part = _tile_sums(scores, peak, values)
            total = mx.concatenate([total, part_total], axis=1).sum(axis=1, keepdims=True)
            weighted = mx.concatenate([weighted, part], axis=1).sum(axis=1, keepdims=True)
        return total, weighted


def read_block(storage: mx.array, block: mx.array | None, view: View) -> BlockSource:
    """Gather a layer's tiles that are not read in place, the block's entries among them."""
    heads, _, d = storage.shape
    taken = storage.reshape(-1, d)[view.places]
    if block is not None:
        taken[view.block_places] = block.swapaxes(0, 1).reshape(-1, d)
    return BlockSource(storage, taken.reshape(heads, view.first.shape[0], -1, TILE, d), view)


def _peak(strips: list[mx.array], like: mx.array) -> mx.array:
    """The largest of one row's scores before its gathered tiles, -inf if none: [G, 1, M, 1].

    like: [G, B, 1, M, 1].
    """
    if not strips:
        return mx.full(like[:, 0].shape, -mx.inf)
    peaks = [scores.max(axis=(1, 3), keepdims=True) for scores in strips]
    return mx.concatenate(peaks, axis=1).max(axis=1, keepdims=True)


def _tile_sums(scores: mx.array, peak: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """Per tile: the sum of exp(scores - peak) and the values weighted with it, in float32.

    scores: [..., tiles, M, TILE], values: [..., tiles, TILE, D] -> [..., tiles, M, 1 and D].
    """
    weights = mx.exp(scores - peak)
    totals = weights.sum(axis=-1, keepdims=True)
    return totals, (weights.astype(values.dtype) @ values).astype(mx.float32)


class PromptSource(NamedTuple):
    """What one layer's queries read in a prefill pass: committed positions, then the chunk's.

    keys, values: [1, G, S, D]; mask: [chunk, S] booleans, or "causal".
    """

    keys: mx.array
    values: mx.array
    mask: mx.array | str

    def attend(self, queries: mx.array) -> mx.array:
        """Attend from the chunk's last positions. queries: [1, H, T, D]."""
        mask = self.mask if isinstance(self.mask, str) else self.mask[-queries.shape[2] :]
        return mx.fast.scaled_dot_product_attention(
            queries, self.keys, self.values, scale=1.0, mask=mask
        )
