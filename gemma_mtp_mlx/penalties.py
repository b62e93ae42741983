"""Logit bias, and penalties on tokens that have occurred, on the device.

Every position of a block gets what plain decoding would have applied there: the last tokens that
position looks at are the committed ones and the drafts before it. The arithmetic touches single
logits, one row and position at a time, so it depends on nobody else. Nothing here waits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from gemma_mtp_mlx.sampling import SamplingParams

# Added to a logit, -0.0 changes no bit of it; +0.0 would turn -0.0 into 0.0.
NOTHING = -0.0
MOST_WINDOW = 2**31 - 1


class Penalty(NamedTuple):
    """One kind of penalty of a batch's rows. strength: [B] float32; window: [B] int32 last tokens.

    A row without this penalty has window 0 and the strength that changes no bit: 1 or 0.
    """

    strength: mx.array
    window: mx.array


class Penalties(NamedTuple):
    """What a batch's rows change about their logits; None for what no row asks for.

    bias: [B, V] float32.
    """

    bias: mx.array | None
    repetition: Penalty | None
    presence: Penalty | None
    frequency: Penalty | None


def context_size(params: Sequence[SamplingParams]) -> int:
    """Return how many last tokens the rows' penalties look at, at most; 0 without penalties."""
    kinds = (_repetition(params), _presence(params), _frequency(params))
    return max((window for kind in kinds for _, window in kind), default=0)


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise ValueError for a logit bias on a token that does not exist or of no usable size."""
    for token, bias in params.logit_bias.items():
        if not 0 <= token < vocab_size:
            raise ValueError(f"logit_bias names token {token}; ids are 0 to {vocab_size - 1}")
        if math.isnan(bias) or bias == math.inf:
            raise ValueError(
                f"logit_bias of token {token} is {bias}; it must be a number or -inf (never)"
            )


def batch_penalties(params: Sequence[SamplingParams], vocab_size: int) -> Penalties | None:
    """Collect the rows' settings, or None if no row asks for anything.

    Raises: ValueError of `check_bias`.
    """
    found = Penalties(
        _batch_bias(params, vocab_size),
        _batch(_repetition(params)),
        _batch(_presence(params)),
        _batch(_frequency(params)),
    )
    return None if all(kind is None for kind in found) else found


def penalize(
    logits: mx.array, recent: mx.array, drafts: mx.array, penalties: Penalties
) -> mx.array:
    """Apply the bias, then the penalties, to every position of a block.

    logits: [B, L, V] float32; recent: [B, C] int32, the last tokens before position 0, the bonus
    last, left-padded with -1; drafts: [B, L - 1] int32. C: `context_size`, more, or as many as
    there are, at least 1 if there are penalties. Returns: [B, L, V] float32.
    Source: mlx_lm's make_logits_processors, for order and formulas: within a window a token counts
    once for repetition and presence, and every time it occurs for frequency.
    """
    bias, repetition, presence, frequency = penalties
    if bias is not None:
        logits = logits + bias[:, None]
    history = mx.concatenate([recent, drafts], axis=1)
    length = logits.shape[1]
    if repetition is not None:
        tokens, _ = _window(history, length, repetition.window)
        at = mx.take_along_axis(logits, tokens, axis=-1)
        strength = repetition.strength[:, None, None]
        penalized = mx.where(at < 0, at * strength, at / strength)
        logits = mx.put_along_axis(logits, tokens, penalized, axis=-1)
    if presence is not None:
        tokens, _ = _window(history, length, presence.window)
        at = mx.take_along_axis(logits, tokens, axis=-1)
        penalized = at - presence.strength[:, None, None]
        logits = mx.put_along_axis(logits, tokens, penalized, axis=-1)
    if frequency is not None:
        tokens, inside = _window(history, length, frequency.window)
        # One subtraction per occurrence, as mlx_lm does; equal terms add up alike in any order.
        change = mx.where(inside, -frequency.strength[:, None, None], NOTHING)
        rows = mx.arange(logits.shape[0])[:, None, None]
        logits = logits.at[rows, mx.arange(length)[:, None], tokens].add(change)
    return logits


def bias_candidates(logits: mx.array, ids: mx.array | None, penalties: Penalties) -> mx.array:
    """Add the bias to a drafter's candidates.

    logits: [B, N] float32; ids: [B, N] the tokens they belong to, None if N = V in order.
    """
    bias = penalties.bias
    if bias is None:
        return logits
    return logits + (bias if ids is None else mx.take_along_axis(bias, ids, axis=-1))


def _window(history: mx.array, length: int, window: mx.array) -> tuple[mx.array, mx.array]:
    """Find the last tokens of each of `length` positions, whose last one follows all of history.

    history: [B, N] int32; window: [B]. Returns: tokens [B, L, N] and whether each is in the window.
    A token that is not is replaced by the position's newest, so that whatever is written for it is
    what is written for the newest.
    """
    count = history.shape[1]
    newest = count - length + mx.arange(length)[:, None]
    age = newest - mx.arange(count)  # [L, N]
    tokens = mx.broadcast_to(history[:, None], (history.shape[0], length, count))
    inside = (age >= 0) & (age < window[:, None, None]) & (tokens >= 0)
    return mx.where(inside, tokens, history[:, count - length :, None]), inside


def _repetition(params: Sequence[SamplingParams]) -> list[tuple[float, int]]:
    """Return each row's strength and window; strength 1 divides and multiplies by nothing."""
    return [
        (p.repetition_penalty, p.repetition_context_size if p.repetition_penalty != 1 else 0)
        for p in params
    ]


def _presence(params: Sequence[SamplingParams]) -> list[tuple[float, int]]:
    return [
        (p.presence_penalty, p.presence_context_size if p.presence_penalty else 0) for p in params
    ]


def _frequency(params: Sequence[SamplingParams]) -> list[tuple[float, int]]:
    return [
        (p.frequency_penalty, p.frequency_context_size if p.frequency_penalty else 0)
        for p in params
    ]


def _batch(kind: list[tuple[float, int]]) -> Penalty | None:
    if not any(window for _, window in kind):
        return None
    strengths = [strength for strength, _ in kind]
    windows = [min(window, MOST_WINDOW) for _, window in kind]
    return Penalty(mx.array(strengths, mx.float32), mx.array(windows, mx.int32))


def _batch_bias(params: Sequence[SamplingParams], vocab_size: int) -> mx.array | None:
    """Write the rows' biases into [B, V]."""
    for row in params:
        check_bias(row, vocab_size)
    entries = [
        (row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias.items()
    ]
    if not entries:
        return None
    rows, tokens, biases = zip(*entries, strict=True)
    whole = mx.full((len(params), vocab_size), NOTHING, mx.float32)
    return whole.at[mx.array(rows), mx.array(tokens)].add(mx.array(biases, mx.float32))
