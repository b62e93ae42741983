"""One round: draft K tokens, verify them in one pass, keep what the target agrees with.

A round is built as a graph and never waits for the device; the host reads its `report` and
nothing else. Committing is separate, so that a round can be built before the last one is read and
its cache writes still happen in place.
"""

from typing import NamedTuple

import mlx.core as mx

from gemma_mtp_mlx.acceptance import accept
from gemma_mtp_mlx.attention import KV, Rows
from gemma_mtp_mlx.cache import MAX_BLOCK, Cache
from gemma_mtp_mlx.drafter import Candidates, Drafter
from gemma_mtp_mlx.readers import SharedKV, VerifyReader
from gemma_mtp_mlx.sampling import Sampling, draw, gumbel
from gemma_mtp_mlx.target import Target

MAX_DRAFTS = MAX_BLOCK - 1


class DecodeState(NamedTuple):
    """Where each row stands: everything a round needs besides the cache.

    tokens: [B] int32 bonus tokens, known but not in the cache; hidden: [B, E] the target's hidden
    state after its final norm at the position before them; lengths: [B] int32 committed positions.
    """

    tokens: mx.array
    hidden: mx.array
    lengths: mx.array

    def keep(self, rows: list[int]) -> "DecodeState":
        """Return the state of those rows only."""
        index = mx.array(rows)
        return DecodeState(*(field[index] for field in self))


class Models(NamedTuple):
    """The models of a round; drafter is None for plain decoding."""

    target: Target
    drafter: Drafter | None


class Round(NamedTuple):
    """A round's results.

    block: [B, L] int32, the bonus tokens and the drafts, as verified;
    report: [B, L + 1] int32: the target's L choices, then the count of accepted drafts;
    logits: [B, L, V] float32, what the choices were drawn from; rows, blocks: the new keys and
    values per owning layer and where they are to be committed; state: the rows afterwards.
    """

    block: mx.array
    report: mx.array
    logits: mx.array
    rows: Rows
    blocks: dict[int, KV]
    state: DecodeState


def build_round(
    models: Models,
    cache: Cache,
    rows: Rows,
    state: DecodeState,
    sampling: Sampling,
    k: int,
) -> Round:
    """Build the graph of one round with k drafts per row (0 without a drafter)."""
    target, drafter = models
    block = state.tokens[:, None]
    positions = rows.lengths[:, None] + 1 + mx.arange(k + 1)  # of the tokens being drawn
    noise = gumbel(sampling, positions, target.config.vocab_size)

    def draw_draft(candidates: Candidates, step: int) -> mx.array:
        at_step = None if noise is None else noise[:, step : step + 1]
        ids = None if candidates.ids is None else candidates.ids[:, None]
        return draw(candidates.logits[:, None], at_step, sampling, ids)[:, 0]

    if drafter is not None and k:
        shared = SharedKV(cache, rows)
        drafts = drafter.draft(state.tokens, state.hidden, shared, target.embed, draw_draft, k)
        block = mx.concatenate([block, drafts], axis=1)
    reader = VerifyReader(cache, rows, k + 1)
    hidden = target.verify(block, reader)
    logits = target.logits(hidden)
    choices = draw(logits, noise, sampling)
    count = accept(block[:, 1:], choices)[:, None]
    place = mx.broadcast_to(count[..., None], (*count.shape, hidden.shape[-1]))
    after = DecodeState(
        tokens=mx.take_along_axis(choices, count, axis=1)[:, 0],
        hidden=mx.take_along_axis(hidden, place, axis=1)[:, 0],
        lengths=rows.lengths + count[:, 0] + 1,
    )
    report = mx.concatenate([choices, count], axis=1)
    return Round(block, report, logits, rows, reader.blocks, after)
