"""A witness between rounds and drafter: what the drafter was handed, and what it made of it.

It has what a round asks of a drafter and passes everything on, so what it sees is what any other
round does. Each draft is waited for: this is for looking, not for speed.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.config import LayerConfig
from gemma_mtp_mlx.drafter import Candidates, Drafter, Draw, Embed
from gemma_mtp_mlx.layers import Source
from gemma_mtp_mlx.readers import SharedKV
from gemma_mtp_mlx.sampling import Sampling

# Drafts to propose instead, [B, K], for rows at these lengths [B]; None for the drafter's own.
Script = Callable[[np.ndarray, int], np.ndarray | None]


class Read(NamedTuple):
    """What a layer of the drafter asked and was told: [B, H, 1, D] both."""

    layer: LayerConfig
    queries: mx.array
    told: mx.array


class Seen(NamedTuple):
    """One round's drafting.

    tokens: [B]; hidden: [B, E]; lengths: [B]; states: [B, width] that each step drew from; drafts:
    [B, K] as the drafter drew them; reads: of all layers of the first step, then of the second, ...
    """

    tokens: mx.array
    hidden: mx.array
    lengths: np.ndarray
    states: list[mx.array]
    drafts: mx.array
    reads: list[Read]


class Witness:
    """Stands in front of a drafter. script: what to propose in the place of its own drafts."""

    def __init__(self, drafter: Drafter, script: Script | None = None) -> None:
        self.seen: list[Seen] = []
        self._drafter = drafter
        self._script = script

    def draft(
        self, tokens: mx.array, hidden: mx.array, shared: SharedKV, embed: Embed, draw: Draw, k: int
    ) -> mx.array:
        """Draft as `Drafter.draft` does, and remember it."""
        states: list[mx.array] = []

        def overheard(h: mx.array, step: int) -> mx.array:
            states.append(h)
            return draw(h, step)

        reader = _Listener(shared)
        drafts = self._drafter.draft(tokens, hidden, reader, embed, overheard, k)
        seen = Seen(tokens, hidden, np.array(shared.rows.lengths), states, drafts, reader.reads)
        mx.eval(tokens, hidden, states, drafts, [read[1:] for read in reader.reads])
        self.seen.append(seen)
        proposed = None if self._script is None else self._script(seen.lengths, k)
        return drafts if proposed is None else mx.array(proposed, mx.int32)

    def choose(self, h: mx.array, sampling: Sampling, positions: mx.array) -> mx.array:
        """Draw as `Drafter.choose` does."""
        return self._drafter.choose(h, sampling, positions)

    def candidates(self, h: mx.array) -> Candidates:
        """Return what `Drafter.candidates` does."""
        return self._drafter.candidates(h)


class _Listener:
    """A reader of `shared` that writes down what is asked and told."""

    def __init__(self, shared: SharedKV) -> None:
        self.arithmetic, self.turns, self.rows = shared.arithmetic, shared.turns, shared.rows
        self.reads: list[Read] = []
        self._shared = shared

    def source(self, layer: LayerConfig, block: mx.array | None) -> Source:
        """Return what the layer's queries read."""
        return _Overheard(self._shared.source(layer, block), layer, self.reads)


class _Overheard(NamedTuple):
    source: Source
    layer: LayerConfig
    reads: list[Read]

    def attend(self, queries: mx.array) -> mx.array:
        """Attend, and write it down."""
        told = self.source.attend(queries)
        self.reads.append(Read(self.layer, queries, told))
        return told
