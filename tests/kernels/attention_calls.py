"""Passes over a cache of some texts, for the attention kernel and its reference.

What a pass must not see is NaN in storage, so a result without one has not touched it.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.attention import Kind, Rows
from gemma_mtp_mlx.cache import MAX_BLOCK
from tests.kernels.exact import exact

FAR = 1 << 30  # a ring that no position goes round


class Layer(NamedTuple):
    """The shape of a model's layers of one kind."""

    heads: int
    kv_heads: int
    d: int
    window: int | None

    @property
    def ring(self) -> int | None:
        return None if self.window is None else self.window + 1 + MAX_BLOCK


class Call(NamedTuple):
    """The arguments of a call."""

    queries: mx.array
    storage: mx.array
    block: mx.array | None
    rows: Rows
    kind: Kind


class Row(NamedTuple):
    """A row of a batch: which text it is, how much of it is committed."""

    text: int
    length: int


class Texts(NamedTuple):
    """What every position of some texts asks, is found by and says: [texts, heads, S, D]."""

    queries: mx.array
    keys: mx.array
    values: mx.array


def make_texts(layer: Layer, count: int, size: int, dtype: mx.Dtype) -> Texts:
    def draw(key: int, heads: int, scale: float) -> mx.array:
        shape = (count, heads, size, layer.d)
        return (mx.random.normal(shape, key=mx.random.key(key)) * scale).astype(dtype)

    h, g, d, _ = layer
    return Texts(draw(0, h, 2 * d**-0.5), draw(1, g, 1), draw(2, g, 1))


def _rows(rows: list[Row], room: int, spare: int) -> Rows:
    """Rows in memory, the last one first; spare: by how much bounds exceed lengths."""
    starts = [2 + sum(row.length + room for row in rows[n + 1 :]) for n in range(len(rows))]
    bounds = [row.length + spare for row in rows]
    return Rows(
        mx.array([row.length for row in rows]),
        mx.array(starts),
        mx.array([len(rows) - n for n in range(len(rows))]),
        tuple(zip(starts, bounds, strict=True)),
    )


def _stored(
    layer: Layer, entries: mx.array, rows: list[Row], where: Rows, seen: int, unseen: float
) -> mx.array:
    """Storage with the last `seen` committed entries of each row in place; it ends with a row's."""
    homes = [
        int(home) for home in np.array(where.slots * layer.ring if layer.ring else where.starts)
    ]
    ends = [home + (layer.ring or max(n, 1)) for home, (_, n) in zip(homes, rows, strict=True)]
    storage = mx.full((layer.kv_heads, max(ends), layer.d), unseen, entries.dtype)
    for (text, n), home in zip(rows, homes, strict=True):
        positions = np.arange(max(n - seen, 0), n)
        if positions.size:
            places = mx.array(home + positions % (layer.ring or FAR))
            storage[:, places] = entries[text][:, mx.array(positions)]
    return storage


def make_call(
    layer: Layer,
    texts: Texts,
    rows: list[Row],
    length: int,
    *,
    spare: int = 0,
    drafts: bool = False,
    unseen: float = float("nan"),
) -> Call:
    """A pass over `length` new positions of each row, or that of a drafter."""
    where = _rows(rows, length + 3, spare)
    window = layer.window and layer.window + drafts
    seen = FAR if window is None else window - (not drafts)

    def cut(entries: mx.array) -> mx.array:
        first = -int(drafts)
        return mx.stack([entries[t][:, n + first : n + first + length] for t, n in rows])

    stored = [
        _stored(layer, entries, rows, where, seen, unseen) for entries in (texts.keys, texts.values)
    ]
    storage = mx.concatenate(stored)
    block = None if drafts else mx.concatenate([cut(texts.keys), cut(texts.values)], axis=1)
    kind = Kind(window, layer.ring, *storage.shape[:2])
    return Call(cut(texts.queries), storage, block, where, kind)


def truth_of(layer: Layer, texts: Texts, rows: list[Row], length: int, drafts: bool) -> np.ndarray:
    """Softmax attention over a plain list of keys and values, in float64: [B, H, L, D]."""
    queries, keys, values = (exact(x) for x in texts)
    out = np.zeros((len(rows), layer.heads, length, layer.d))
    for n, (text, committed) in enumerate(rows):
        for j in range(length):
            last = committed + j - drafts
            first = 0 if layer.window is None else max(last + 1 - layer.window - drafts, 0)
            k, v = (
                np.repeat(x[text, :, first : last + 1], layer.heads // layer.kv_heads, axis=0)
                for x in (keys, values)
            )
            scores = np.einsum("hd,hsd->hs", queries[text, :, last], k)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[n, :, j] = np.einsum("hs,hsd->hd", weights / weights.sum(-1, keepdims=True), v)
    return out
