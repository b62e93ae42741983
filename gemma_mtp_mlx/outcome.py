"""What a round tells the host: one array on the device, one outcome per row once it is read.

A report is [B, ...] int32: the target's L choices, the count of accepted drafts and, if any row
wants log-probabilities, the ids of the alternatives and all log-probabilities bit by bit.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.sampling import MOST_TOP_LOGPROBS


class Logprob(NamedTuple):
    """A token's log-probability and the best alternatives, (token, log-probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Outcome(NamedTuple):
    """What a round gave one row: its new tokens, how many of them are drafts, and logprobs."""

    tokens: list[int]
    accepted: int
    logprobs: list[Logprob]


def make_report(
    logits: mx.array | None, choices: mx.array, count: mx.array, top: int | None
) -> mx.array:
    """One int32 array of all the host reads: choices, count, alternatives' ids, logprobs' bits."""
    parts = [choices, count]
    if top is not None:
        assert logits is not None
        b = choices.shape[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        values = mx.take_along_axis(logprobs, choices[..., None], axis=-1)
        if top:
            # Always as many, lowest id first: ties must not depend on what another row asks for.
            most = min(MOST_TOP_LOGPROBS, logits.shape[-1])
            best = mx.sort(mx.argpartition(-logits, most - 1, axis=-1)[..., :most], axis=-1)
            found = mx.take_along_axis(logprobs, best, axis=-1)
            order = mx.argsort(-found, axis=-1)[..., :top]
            parts.append(mx.take_along_axis(best, order, axis=-1).reshape(b, -1))
            found = mx.take_along_axis(found, order, axis=-1)
            values = mx.concatenate([values, found], axis=-1)
        parts.append(values.reshape(b, -1).view(mx.int32))
    return mx.concatenate([part.astype(mx.int32) for part in parts], axis=1)


def unpack(report: np.ndarray, length: int, top: int | None) -> list[Outcome]:
    """Read a report, [B, ...] int32 on the host, of blocks of `length` with `top` alternatives."""
    choices, count = report[:, :length].tolist(), report[:, length].tolist()
    outcomes = [
        Outcome(tokens[: accepted + 1], accepted, [])
        for tokens, accepted in zip(choices, count, strict=True)
    ]
    if top is None:
        return outcomes
    ids, bits = np.split(report[:, length + 1 :], [length * top], axis=1)
    values = bits.copy().view(np.float32).reshape(len(bits), length, top + 1).tolist()
    alternatives = ids.reshape(len(ids), length, top).tolist()
    for row, outcome in enumerate(outcomes):
        for offset in range(len(outcome.tokens)):
            own, *best = values[row][offset]
            found = tuple(zip(alternatives[row][offset], best, strict=True))
            outcome.logprobs.append(Logprob(own, found))
    return outcomes
