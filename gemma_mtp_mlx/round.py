"""One round: draft K tokens, verify them in one pass, keep what the target agrees with.

A round is built as a graph and never waits for the device; the host reads its `report` and
nothing else. Committing is separate, so that a round can be built before the last one is read and
its cache writes still happen in place.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from gemma_mtp_mlx.acceptance import accept
from gemma_mtp_mlx.attention import Rows
from gemma_mtp_mlx.cache import MAX_BLOCK, Cache
from gemma_mtp_mlx.constraint import apply_masks
from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.kernels.arithmetic import OWN, Arithmetic
from gemma_mtp_mlx.kernels.draw_tokens import draw_tokens
from gemma_mtp_mlx.outcome import make_report
from gemma_mtp_mlx.penalties import (
    Penalties,
    batch_penalties,
    bias_candidates,
    penalize,
)
from gemma_mtp_mlx.readers import SharedKV, VerifyReader
from gemma_mtp_mlx.sampling import (
    Sampling,
    SamplingParams,
    batch_sampling,
    draw,
    gumbel,
    keep_likely,
)
from gemma_mtp_mlx.target import Target

MAX_DRAFTS = MAX_BLOCK - 1

Edit = Callable[[mx.array], mx.array]  # logits [B, L, V] -> the same, edited on the host's behalf


class DecodeState(NamedTuple):
    """Where each row stands: everything a round needs besides the cache.

    tokens: [B] int32 bonus tokens, known but not in the cache; hidden: [B, E] the target's hidden
    state after its final norm at the position before them; lengths: [B] int32 committed positions;
    recent: [B, C] int32 the last C tokens, the bonus last, -1 where there are none: what penalties
    look at (C = 0 if there are none).
    """

    tokens: mx.array
    hidden: mx.array
    lengths: mx.array
    recent: mx.array

    def keep(self, rows: list[int]) -> "DecodeState":
        """Return the state of those rows only."""
        index = mx.array(rows)
        return DecodeState(*(field[index] for field in self))

    def join(self, other: "DecodeState") -> "DecodeState":
        """Return the state of these rows and others behind them."""
        width = max(self.recent.shape[1], other.recent.shape[1])
        first, second = self._widen(width), other._widen(width)
        return DecodeState(
            *(mx.concatenate(list(pair)) for pair in zip(first, second, strict=True))
        )

    def _widen(self, width: int) -> "DecodeState":
        missing = width - self.recent.shape[1]
        if not missing:
            return self
        return self._replace(recent=mx.pad(self.recent, [(0, 0), (missing, 0)], constant_values=-1))


class Models(NamedTuple):
    """The models of a round, and who computes in it; drafter is None for plain decoding."""

    target: Target
    drafter: Drafter | None
    arithmetic: Arithmetic = OWN


class Settings(NamedTuple):
    """How each row of a batch draws. limits: [B] int32 most drafts, or None if no row has its own;
    top_logprobs: alternatives to report per token, or None if no row wants logprobs."""

    sampling: Sampling
    penalties: Penalties | None
    limits: mx.array | None
    top_logprobs: int | None

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from logits as they are."""
        sampling = self.sampling
        return self.penalties is None and not (sampling.noisy and sampling.filtered)


class Round(NamedTuple):
    """A round's results.

    block: [B, L] int32, the bonus tokens and the drafts, as verified;
    report: [B, ...] int32 of `unpack`; logits: [B, L, V] float32, what the choices were drawn from,
    None where they were drawn without;
    rows, blocks: the new keys and values per owning layer and where they are to be committed;
    state: the rows afterwards.
    """

    block: mx.array
    report: mx.array
    logits: mx.array | None
    rows: Rows
    blocks: dict[int, mx.array]
    state: DecodeState


class Turn(NamedTuple):
    """A round about to be run: whose, from where, how.

    positions: [B, L] int32 of the tokens to be drawn; noise: [B, L, V] of the draws, or None if
    there is none or it is made where it is used; bare: whether the target's tokens can be drawn
    from hidden states, by a kernel that writes no logits.
    """

    rows: Rows
    state: DecodeState
    settings: Settings
    positions: mx.array
    noise: mx.array | None
    bare: bool


class Verified(NamedTuple):
    """What the target says to a block.

    hidden: [B, L, E]; logits: [B, L, V] float32, unprocessed, None in a bare turn.
    """

    block: mx.array
    hidden: mx.array
    logits: mx.array | None
    blocks: dict[int, mx.array]


def settings_of(
    params: Sequence[SamplingParams], seeds: Sequence[int], vocab_size: int
) -> Settings:
    """Collect the rows' settings. seeds: the seed in use for each row."""
    limits = [MAX_DRAFTS if p.num_draft_tokens is None else p.num_draft_tokens for p in params]
    wanted = [p.logprobs for p in params if p.logprobs is not None]
    return Settings(
        batch_sampling(params, seeds),
        batch_penalties(params, vocab_size),
        mx.array(limits) if min(limits) < MAX_DRAFTS else None,
        max(wanted) if wanted else None,
    )


def build_round(
    models: Models, cache: Cache, rows: Rows, state: DecodeState, settings: Settings, k: int
) -> Round:
    """Build the graph of one round with k drafts per row (0 without a drafter)."""
    turn = begin(models, rows, state, settings, k)
    block = draft_block(models, cache, turn, k)
    return decide(models.target, verify_block(models, cache, turn, block), turn)


def begin(
    models: Models,
    rows: Rows,
    state: DecodeState,
    settings: Settings,
    k: int,
    *,
    host_decides: bool = False,
) -> Turn:
    """Prepare a round of blocks of k + 1. host_decides: about any of its tokens."""
    positions = state.lengths[:, None] + mx.arange(1, k + 2)
    bare = on_gpu() and settings.plain and settings.top_logprobs is None and not host_decides
    noise = None
    if not (on_gpu() and settings.plain):
        noise = gumbel(settings.sampling, positions, models.target.config.vocab_size)
    return Turn(rows, state, settings, positions, noise, bare)


def draft_block(models: Models, cache: Cache, turn: Turn, k: int) -> mx.array:
    """Draft. Returns the bonus tokens and k drafts, [B, k + 1] int32."""
    target, drafter, arithmetic = models
    state, settings, noise = turn.state, turn.settings, turn.noise
    block = state.tokens[:, None]
    if drafter is None or not k:
        return block

    def draw_draft(h: mx.array, step: int) -> mx.array:
        if on_gpu() and settings.plain:
            return drafter.choose(h, settings.sampling, turn.positions[:, step : step + 1])
        logits, ids = drafter.candidates(h)
        if settings.penalties is not None:
            logits = bias_candidates(logits, ids, settings.penalties)
        at_step = None if noise is None else noise[:, step : step + 1]
        ids = None if ids is None else ids[:, None]
        return draw(logits[:, None], at_step, settings.sampling, ids)[:, 0]

    shared = SharedKV(cache, turn.rows, arithmetic)
    drafts = drafter.draft(state.tokens, state.hidden, shared, target.embed, draw_draft, k)
    return mx.concatenate([block, drafts], axis=1)


def verify_block(models: Models, cache: Cache, turn: Turn, block: mx.array) -> Verified:
    """Run the target over a block [B, L]."""
    reader = VerifyReader(cache, turn.rows, block.shape[1], models.arithmetic)
    hidden = models.target.verify(block, reader)
    logits = None if turn.bare else models.target.logits(hidden)
    return Verified(block, hidden, logits, reader.blocks)


def decide(
    target: Target,
    verified: Verified,
    turn: Turn,
    edit: Edit | None = None,
    masks: mx.array | None = None,
) -> Round:
    """Draw the target's own tokens and keep the drafts that agree.

    edit: the host's logits processors; masks: [B, L, words] uint32 allowed tokens, or None.
    """
    block, hidden, logits, blocks = verified
    rows, state, settings = turn.rows, turn.state, turn.settings
    drafts = block[:, 1:]
    if logits is None:
        choices = target.choose(hidden, settings.sampling, turn.positions)
    else:
        logits = _process(logits, state.recent, drafts, settings.penalties, edit, masks)
        choices = _draw(logits, turn.positions, turn.noise, settings.sampling)
    count = accept(drafts, choices, settings.limits)[:, None]
    place = mx.broadcast_to(count[..., None], (*count.shape, hidden.shape[-1]))
    after = DecodeState(
        tokens=mx.take_along_axis(choices, count, axis=1)[:, 0],
        hidden=mx.take_along_axis(hidden, place, axis=1)[:, 0],
        lengths=rows.lengths + count[:, 0] + 1,
        recent=_append(state.recent, choices, count),
    )
    report = make_report(logits, choices, count, settings.top_logprobs)
    return Round(block, report, logits, rows, blocks, after)


def first_tokens(
    target: Target,
    state: DecodeState,
    settings: Settings,
    edit: Edit | None = None,
    masks: mx.array | None = None,
) -> tuple[mx.array, DecodeState]:
    """Draw the tokens after prompts. state: as prefill leaves it; its tokens are not read.

    Returns: a report as a round's, for blocks of one, and the state with the tokens.
    """
    logits = target.logits(state.hidden[:, None])
    nothing = mx.zeros((logits.shape[0], 0), mx.int32)
    logits = _process(logits, state.recent, nothing, settings.penalties, edit, masks)
    positions = state.lengths[:, None]
    noise = None if on_gpu() else gumbel(settings.sampling, positions, logits.shape[-1])
    tokens = _draw(logits, positions, noise, settings.sampling)
    count = mx.zeros_like(tokens)
    after = state._replace(tokens=tokens[:, 0], recent=_append(state.recent, tokens, count))
    return make_report(logits, tokens, count, settings.top_logprobs), after


def _draw(
    logits: mx.array, positions: mx.array, noise: mx.array | None, sampling: Sampling
) -> mx.array:
    """Draw the target's tokens [B, L] from processed logits [B, L, V]."""
    if not on_gpu():
        return draw(logits, noise, sampling)
    if sampling.noisy and sampling.filtered:
        logits = keep_likely(logits, sampling)
    return draw_tokens(logits, sampling, positions)


def _process(
    logits: mx.array,
    recent: mx.array,
    drafts: mx.array,
    penalties: Penalties | None,
    edit: Edit | None,
    masks: mx.array | None,
) -> mx.array:
    """Change logits [B, L, V] as the rows' settings ask, as plain decoding does token by token."""
    if penalties is not None:
        logits = penalize(logits, recent, drafts, penalties)
    if edit is not None:
        logits = edit(logits)
    return logits if masks is None else apply_masks(logits, masks)


def _append(recent: mx.array, choices: mx.array, count: mx.array) -> mx.array:
    """The last C tokens once choices[:, : count + 1] have followed. count: [B, 1]."""
    if not recent.shape[1]:
        return recent
    places = count + 1 + mx.arange(recent.shape[1])
    return mx.take_along_axis(mx.concatenate([recent, choices], axis=1), places, axis=1)
