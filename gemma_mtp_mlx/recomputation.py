"""A text computed once more, without a cache, a round or a batch: what a drafter should be handed.

Nothing here is shared with the rounds but the models' own layers. Keys and values are one array per
layer, positions are given, attention is a softmax over what may be seen, in float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from gemma_mtp_mlx.attention import PromptSource
from gemma_mtp_mlx.config import LayerConfig, ModelConfig
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.kernels.arithmetic import STOCK
from gemma_mtp_mlx.layers import Source
from gemma_mtp_mlx.readers import Turns
from gemma_mtp_mlx.target import Target

PIECE = 16  # tokens at a time in a second opinion


class Text(NamedTuple):
    """A text as the target sees it.

    hidden: [T, E] after the final norm; kv: [2G, T, D] per layer with keys and values of its own.
    """

    hidden: mx.array
    kv: dict[int, mx.array]


def compute(target: Target, tokens: Sequence[int], *, second: bool = False) -> Text:
    """Run the target over a text.

    second: in pieces and with attention in float32, which rounds in other places.
    """
    piece = PIECE if second else len(tokens)
    kv: dict[int, mx.array] = {}
    hidden = []
    for start in range(0, len(tokens), piece):
        part = mx.array([list(tokens[start : start + piece])])
        reader = _Causal(target.config, start, part.shape[1], kv, second=second)
        hidden.append(target.verify(part, reader)[0])
        mx.eval(hidden[-1], list(kv.values()))
    return Text(mx.concatenate(hidden), kv)


def right_layer(config: ModelConfig, *, sliding: bool) -> int:
    """Return the layer whose keys and values a drafter's layers of a kind must read."""
    return max(layers_of(config, sliding=sliding))


def layers_of(config: ModelConfig, *, sliding: bool) -> list[int]:
    """Return the layers of a kind with keys and values of their own."""
    return [layer.index for layer in config.layers if layer.owns_kv and layer.sliding == sliding]


def visible(text: Text, layer: int, length: int, window: int | None) -> mx.array:
    """Keys and values [2G, S, D] that a drafter may see once `length` positions are committed.

    window: of the target, None for a full layer; a drafter sees one position more.
    """
    first = 0 if window is None else max(0, length - window - 1)
    return text.kv[layer][:, first:length]


def attend(queries: mx.array, kv: mx.array, mask: mx.array | None = None) -> mx.array:
    """queries: [B, H, L, D], kv: [2G, S, D], mask: [L, S] booleans -> [B, H, L, D] float32."""
    keys, values = mx.split(kv.astype(mx.float32)[:, None], 2)  # [G, 1, S, D]
    b, _, length, d = queries.shape
    grouped = queries.astype(mx.float32).reshape(b, len(keys), -1, length, d)
    scores = grouped @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    return (mx.softmax(scores, axis=-1, precise=True) @ values).reshape(queries.shape)


def draft_states(
    drafter: Drafter,
    target: Target,
    fed: tuple[mx.array, Sequence[mx.array]],
    kv: dict[bool, mx.array],
    positions: Sequence[Sequence[int]],
) -> list[mx.array]:
    """Draft from one row at positions of one's own, as many rows as there are of them.

    fed: the hidden state [1, E] and the token [1] of each step; kv: [2G, S, D] of either kind, by
    whether it is sliding; positions: of each step's query, one per row.
    Returns: [rows, width] per step.
    """
    hidden, tokens = fed
    hidden = mx.broadcast_to(hidden, (len(positions[0]), hidden.shape[1]))
    states = []
    for token, at in zip(tokens, positions, strict=True):
        asked = mx.broadcast_to(token[:, None], (len(at), 1))
        reader = _Given(mx.array(list(at)), kv)
        h, hidden = drafter.step(target.embed(asked, hidden[:, None]), reader)
        states.append(h)
    return states


class _Known(NamedTuple):
    """Keys and values [2G, S, D], and which of them each query sees: [L, S] booleans, None: all."""

    kv: mx.array
    mask: mx.array | None

    def attend(self, queries: mx.array) -> mx.array:
        """queries: [B, H, L, D]. Returns the same shape."""
        return attend(queries, self.kv, self.mask).astype(queries.dtype)


class _Causal:
    """One row's tokens from `start` on, over the keys and values of those before."""

    arithmetic = STOCK

    def __init__(
        self,
        config: ModelConfig,
        start: int,
        length: int,
        kv: dict[int, mx.array],
        *,
        second: bool,
    ) -> None:
        self.turns = Turns(mx.array([start]), length)
        self._kv, self._second = kv, second
        query, key = mx.arange(start, start + length)[:, None], mx.arange(start + length)
        seen = key <= query
        self._masks = {False: seen, True: seen & (key > query - config.sliding_window)}

    def source(self, layer: LayerConfig, block: mx.array | None) -> Source:
        """Return what the layer's queries read."""
        if block is not None:
            before = self._kv.get(layer.index)
            parts = [block[0]] if before is None else [before, block[0]]
            self._kv[layer.index] = mx.concatenate(parts, axis=1)
        kv, mask = self._kv[layer.kv_source], self._masks[layer.sliding]
        if self._second:
            return _Known(kv, mask)
        keys, values = mx.split(kv[None], 2, axis=1)
        return PromptSource(keys, values, mask)


class _Given:
    """A drafter's queries at these positions, over these keys and values."""

    arithmetic = STOCK

    def __init__(self, positions: mx.array, kv: dict[bool, mx.array]) -> None:
        self.turns = Turns(positions, 1)
        self._kv = kv

    def source(self, layer: LayerConfig, block: mx.array | None) -> Source:
        """Return what the layer's queries read."""
        return _Known(self._kv[layer.sliding], None)
