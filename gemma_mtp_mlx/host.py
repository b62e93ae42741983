"""What the host decides about a block's tokens: logits processors and constraints, row by row.

Each position sees what plain decoding would have shown it: the row's tokens and the drafts before
it. What goes wrong in one request ends that request; its row runs on unconstrained until it leaves.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import Edit

T = TypeVar("T")


class HostRules(NamedTuple):
    """edit: changes logits [B, L, V]; masks: [B, L, words] uint32 allowed tokens; None: unused."""

    edit: Edit | None
    masks: mx.array | None


def host_rules(requests: Sequence[Request], drafts: np.ndarray, vocab_size: int) -> HostRules:
    """Return what the host says about the positions after the rows' tokens and drafts [B, K]."""
    by_row: list[list[int]] = drafts.tolist()
    return HostRules(_edit(requests, by_row), _masks(requests, by_row, vocab_size))


def _edit(requests: Sequence[Request], drafts: Sequence[list[int]]) -> Edit | None:
    if not any(request.params.logits_processors for request in requests):
        return None

    def edit(logits: mx.array) -> mx.array:
        parts = []
        for row, request in enumerate(requests):
            own = logits[row : row + 1]
            if request.params.logits_processors:
                own = _guarded(request, partial(_run, request, drafts[row], own), own)
            parts.append(own)
        return mx.concatenate(parts)

    return edit


def _run(request: Request, drafts: list[int], logits: mx.array) -> mx.array:
    """Run a request's processors on its logits [1, L, V], position by position."""
    before = request.prompt + request.tokens
    done = []
    for place in range(logits.shape[1]):
        tokens, own = mx.array(before + drafts[:place]), logits[:, place]
        for processor in request.params.logits_processors:
            own = processor(tokens, own)
        if own.shape != (1, logits.shape[-1]):
            raise ValueError(
                f"a logits processor returned shape {own.shape}; it must be {(1, logits.shape[-1])}"
            )
        done.append(own.astype(mx.float32))
    return mx.stack(done, axis=1)


def _masks(
    requests: Sequence[Request], drafts: Sequence[list[int]], vocab_size: int
) -> mx.array | None:
    found = {}
    for row, request in enumerate(requests):
        if request.constraint is not None:
            masks = _guarded(request, partial(request.constraint.masks, drafts[row]), None)
            if masks is not None:
                found[row] = masks
    if not found:
        return None
    length = len(drafts[0]) + 1
    words = np.full((len(requests), length, -(-vocab_size // 32)), 2**32 - 1, np.uint32)
    for row, masks in found.items():
        words[row] = masks
    return mx.array(words)


def _guarded(request: Request, action: Callable[[], T], otherwise: T) -> T:
    """Run a request's own code; what it raises ends the request."""
    try:
        return action()
    except Exception as error:
        request.end("error", error)
        return otherwise
