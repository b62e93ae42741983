"""How often a drafter's drafts are the target's own tokens, and how sure it is of them.

Real rounds at a fixed depth, greedy, one row of each kind of prompts. How often it agrees says
whether drafting is worth anything; beside what it believes itself it says why not. A trained
drafter is as sure as it is right; one trained for another target is sure and wrong; one that was
never trained is sure of nothing, or says the same whatever it reads.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.depth import FixedDepth
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.engine import Engine
from gemma_mtp_mlx.memory import Limits, plan
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import Models
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.witness import Witness

K = 4  # the drafts that most published figures are about
TOKENS = 32  # of each kind: 7 rounds if every draft is kept, 31 if none is


@dataclass(frozen=True, slots=True)
class Kept:
    """Of one kind of prompts: rounds, and how many of them kept their first, second, ... draft."""

    kind: str
    rounds: int
    by_position: tuple[int, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """By position, of all rounds."""
        return tuple(count / max(self.rounds, 1) for count in self.by_position)

    @property
    def share(self) -> float:
        """Drafts kept of drafts made."""
        return sum(self.by_position) / max(self.rounds * len(self.by_position), 1)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What drafts were worth, and what the drafter thought of its first ones.

    chance: how often they would agree if they knew nothing of the text but which tokens are
    frequent in it; sure: mean probability of the token drafted; entropy: mean, as a share of that
    of a uniform choice; same: share of the most frequent first draft.
    """

    kinds: tuple[Kept, ...]
    chance: float
    sure: float
    entropy: float
    same: float

    @property
    def whole(self) -> Kept:
        """All kinds together."""
        counts = np.sum([kept.by_position for kept in self.kinds], axis=0)
        return Kept("all", sum(kept.rounds for kept in self.kinds), tuple(counts.tolist()))

    @property
    def by_chance(self) -> bool:
        """Whether first drafts agree no more than by chance, two standard deviations allowed."""
        rounds, p = self.whole.rounds, max(self.chance, 1e-3)
        return self.whole.shares[0] <= p + 2 * math.sqrt(p * (1 - p) / rounds)


def measure(models: Models, prompts: Mapping[str, Sequence[int]]) -> Agreement:
    """Draft along what the target says to a prompt of each kind, token ids; EOS ends nothing."""
    drafter = models.drafter
    assert drafter is not None
    witness = Witness(drafter)
    params = SamplingParams(max_tokens=TOKENS)
    requests = [Request(prompt, params, frozenset()) for prompt in prompts.values()]
    watched = models._replace(drafter=cast(Drafter, witness))  # has what a round asks of one
    engine = Engine(watched, FixedDepth(K), _limits(models.target, requests))
    for request in requests:
        engine.submit(request)
    engine.run()
    for request in requests:
        if request.error is not None:
            raise request.error
    kinds = [
        Kept(kind, request.stats.draft_rounds, _padded(request.stats.accepted_per_position))
        for kind, request in zip(prompts, requests, strict=True)
    ]
    firsts = [token for seen in witness.seen for token in np.array(seen.drafts)[:, 0].tolist()]
    texts = [token for request in requests for token in request.tokens]
    opinions = [_opinion(drafter, seen.states[0]) for seen in witness.seen]
    sure, entropy = np.mean(np.concatenate(opinions), axis=0).tolist()
    same = max(Counter(firsts).values()) / len(firsts)
    return Agreement(tuple(kinds), _chance(firsts, texts), sure, entropy, same)


def _limits(target: Target, requests: Sequence[Request]) -> Limits:
    """As many rows at a time as there is memory for. Raises: ValueError if not even for one."""
    sizes = sorted((seat_size(request.positions) for request in requests), reverse=True)
    for rows in range(len(requests), 1, -1):
        limits = Limits(rows, positions=sum(sizes[:rows]), prefix_share=0)
        try:
            if plan(target.config, target.dtype, limits).positions == limits.positions:
                return limits
        except ValueError:  # even the rings of so many rows are too much
            continue
    return Limits(1, positions=sizes[0], prefix_share=0)


def _padded(counts: Sequence[int]) -> tuple[int, ...]:
    return (*counts, *[0] * (K - len(counts)))


def _chance(drafts: Sequence[int], texts: Sequence[int]) -> float:
    drafted, said = Counter(drafts), Counter(texts)
    return sum(drafted[token] * said[token] for token in drafted) / (len(drafts) * len(texts))


def _opinion(drafter: Drafter, h: mx.array) -> np.ndarray:
    """The best token's probability and the relative entropy, of what h [B, width] gives: [B, 2]."""
    logits, _ = drafter.candidates(h)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    entropy = -(mx.exp(logprobs) * logprobs).sum(axis=-1) / math.log(logits.shape[-1])
    return np.array(mx.stack([mx.exp(logprobs.max(axis=-1)), entropy], axis=-1))
