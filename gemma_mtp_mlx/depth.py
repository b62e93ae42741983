"""How many tokens to draft per round: the depth that gives most tokens per second, 0 included.

A round of depth K gives each row 1 + a1 + a1 a2 + ... + (a1 ... aK) tokens, where a_i is the chance
that draft i agrees once all before it did, and takes some seconds. Both are believed from a prior
and corrected by what rounds report. Everything here is host arithmetic, without a clock or a random
number: the same reports give the same depths, and no depth changes what is generated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_mtp_mlx.costs import MOST, Costs, Floats, Prior

Limits = Sequence[int] | None

# What a depth must promise over the present one before it replaces it. Two depths closer than this
# are the same for the user, and seconds are rarely known better.
MARGIN = 0.015
KNOWN = 0.3  # a depth whose log seconds are vaguer than this has to be tried before
# Share of the time that tries may cost: below 1 %, as what is believed may be a little wrong too.
BUDGET = 0.006
# Plain rounds that may be lost to trying at the start, and how many may be saved up later.
START, EARLY, SAVED = 6.0, 100, 1.0
# A try is worth while if it promises this many times what it loses, over as many rounds as there
# were so far and some more: a short text has no use for what is only known at its end.
PROMISE, SOON, LATE = 3.0, 60, 400
LEAST = 0.01  # plain rounds that any try costs
LOOK = np.array([[1.0], [4.0], [16.0]])  # tries in a row whose worth is looked at
# Rounds that a text lasts, and the acceptance that another may have: nothing is heard of it in
# plain decoding.
TEXT, HOPED = 300, 0.9


@dataclass(frozen=True, slots=True)
class DepthState:
    """What a controller believes and did; dataclasses.asdict makes it a dict.

    depth: the settled K by batch size; acceptance: by position, given that all before agreed;
    ms: of a round, believed, by batch size and K, for those that ran; probe_share: time that
    rounds at other depths than the settled one lost, as a share of all (below 0 if they gained).
    """

    depth: dict[int, int]
    acceptance: tuple[float, ...]
    ms: dict[int, dict[int, float]]
    rounds: int
    switches: int
    probes: int
    probe_share: float


class FixedDepth:
    """The same depth for every round."""

    def __init__(self, k: int) -> None:
        if not 0 <= k <= MOST:
            raise ValueError(f"cannot draft {k} tokens per round; give 0 to {MOST}")
        self.k = k
        self._acceptance = _Acceptance(0.5)
        self._seconds: dict[tuple[int, int], tuple[int, float]] = {}  # rounds and their sum

    def choose(self, rows: int) -> int:
        """Return the depth."""
        return self.k

    def observe(
        self, rows: int, k: int, seconds: float, accepted: Sequence[int], limits: Limits = None
    ) -> None:
        """Take note of a round, for `state` only."""
        count, total = self._seconds.get((rows, k), (0, 0.0))
        self._seconds[rows, k] = count + 1, total + seconds
        self._acceptance.observe(k, accepted, limits)

    def state(self) -> DepthState:
        """Return what was seen."""
        ms: dict[int, dict[int, float]] = {}
        for (rows, k), (count, total) in sorted(self._seconds.items()):
            ms.setdefault(rows, {})[k] = 1e3 * total / count
        acceptance = tuple(self._acceptance.a[: self.k].tolist())
        rounds = sum(count for count, _ in self._seconds.values())
        return DepthState(dict.fromkeys(ms, self.k), acceptance, ms, rounds, 0, 0, 0.0)


class AutoDepth:
    """The depth that promises most tokens per second, learnt while generating.

    Most rounds run at the settled depth of their batch size. Others try a depth that it is worth
    knowing more of; what they lose against the settled one comes out of an account that grows by
    BUDGET of the time. A try that pays fills it again, so a text that became easy is followed.
    """

    def __init__(self, prior: Prior, most: int = MOST) -> None:
        if not 0 <= most <= MOST:
            raise ValueError(f"cannot draft up to {most} tokens per round; give 0 to {MOST}")
        self.most = most
        self._acceptance = _Acceptance(prior.acceptance)
        self._costs = Costs(prior, most)
        self._easy = np.log(np.cumsum(HOPED ** np.arange(most + 1)))  # tokens of an easy text
        self._depth: dict[int, int] = {}
        self._account = START  # plain rounds that tries may still lose
        self._reserved: dict[tuple[int, int], float] = {}  # for tries under way
        self._silent = 0  # rounds since drafts were heard of
        self._switches = self._probes = 0
        self._lost = self._seconds = 0.0

    def choose(self, rows: int) -> int:
        """Return K for the next round with that many rows."""
        log_seconds, spread = self._costs.believed(rows)
        settled = self._settle(rows, log_seconds, spread)
        return self._try(rows, settled, log_seconds, spread) if self._costs.rounds else 0

    def observe(
        self, rows: int, k: int, seconds: float, accepted: Sequence[int], limits: Limits = None
    ) -> None:
        """Learn from a finished round.

        accepted: drafts of each row that agreed, at most k and the row's own limit if limits are
        given; a row that reached its limit says "at least".
        """
        log_seconds, _ = self._costs.believed(rows)
        self._costs.observe(rows, k, seconds)
        self._acceptance.observe(k, accepted, limits)
        self._silent = 0 if k else self._silent + 1
        self._seconds += seconds
        plain = math.exp(log_seconds[0])
        took = math.exp(log_seconds[k])
        self._account += BUDGET * took / plain
        if (rows, k) in self._reserved:
            settled = self._depth[rows]
            believed = self._acceptance.tokens
            # Out of plain decoding only what came tells whether it paid.
            tokens = float(believed[k]) if settled else 1 + sum(accepted) / rows
            lost = took - tokens * math.exp(log_seconds[settled]) / float(believed[settled])
            self._account += self._reserved.pop((rows, k)) - lost / plain
            self._lost, self._probes = self._lost + lost, self._probes + 1
        self._account = min(self._account, max(SAVED, START * (1 - self._costs.rounds / EARLY)))

    def state(self) -> DepthState:
        """Return what is believed now."""
        acceptance = tuple(self._acceptance.a[: self.most].tolist())
        counts = self._costs.rounds, self._switches, self._probes
        share = float(self._lost / self._seconds) if self._seconds else 0.0
        return DepthState(dict(self._depth), acceptance, self._costs.ms(), *counts, share)

    def _gain(self, settled: int, log_seconds: Floats) -> Floats:
        """Log of each depth's throughput over the settled one's, as believed."""
        rate: Floats = np.log(self._acceptance.tokens[: self.most + 1]) - log_seconds
        return rate - rate[settled]

    def _try(self, rows: int, settled: int, log_seconds: Floats, spread: Floats) -> int:
        """Return a depth worth a try now, setting aside what it may lose; else the settled one."""
        gain = self._gain(settled, log_seconds)
        doubt = self._doubt(rows, settled, spread)
        # What knowing better is worth per round and try: the mean of what is above the best now.
        z = np.abs(gain) / doubt
        worth = (doubt * (0.3989 * np.exp(-z * z / 2) - z * _above(z)) / LOOK).max(axis=0)
        cost = np.exp(log_seconds - log_seconds[0])  # in plain rounds
        if not settled and self._silent:
            best = float((self._easy - log_seconds + log_seconds[0] + doubt[0]).max())
            changed = min(self._silent / TEXT, 1.0)
            worth = np.maximum(worth, changed * max(best, 0.0))
        loss = np.maximum(-cost * np.expm1(gain), LEAST)
        horizon = min(SOON + self._costs.rounds, LATE) * cost[settled]
        worth = worth * horizon - PROMISE * loss
        worth[2 * self._costs.deepest + 2 :] = 0  # at most a block twice as long as any so far
        worth[loss > self._account] = 0
        worth[settled] = 0
        k = int(worth.argmax())
        if worth[k] <= 0:
            return settled
        self._account -= float(loss[k])
        self._reserved[rows, k] = float(loss[k])
        return k

    def _doubt(self, rows: int, settled: int, spread: Floats) -> Floats:
        """Return how far tries could move each depth's log gain, by number of tries and depth."""
        variance = spread.diagonal()
        seconds = np.maximum(variance - spread[settled], 0) ** 2
        seconds = seconds / (variance + Costs.NOISE**2 / LOOK)
        # The settled depth tells of its own drafts; a deeper one tells of those after them.
        acceptance, after = self._acceptance, min(settled, MOST - 1)
        heard = LOOK * rows * float(acceptance.a[:after].prod())
        share = heard / (heard + acceptance.counted(after))
        deep = np.log(acceptance.hoped(settled) / acceptance.tokens)[: self.most + 1]
        return np.asarray(np.sqrt(seconds + deep**2 * share) + 1e-9)

    def _settle(self, rows: int, log_seconds: Floats, spread: Floats) -> int:
        """Return the settled depth of that batch size, replaced first if another is better."""
        settled = self._depth.get(rows, 0)
        gain = self._gain(settled, log_seconds)
        apart = spread.diagonal() + spread[settled, settled] - 2 * spread[settled]
        gain[apart > KNOWN**2] = -np.inf
        best = int(gain.argmax())
        # It is easier to return to plain decoding than to leave it.
        if gain[best] > (MARGIN if best else 0):
            self._switches += rows in self._depth
            settled = best
        self._depth[rows] = settled
        return settled


def _above(z: Floats) -> Floats:
    """Return the chance that a normal number is above z >= 0, to 1e-5.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964, eq. 26.2.16.
    """
    t = 1 / (1 + 0.33267 * z)
    polynomial = t * (0.4361836 + t * (-0.1201676 + t * 0.937298))
    return np.asarray(0.3989423 * np.exp(-z * z / 2) * polynomial)


class _Acceptance:
    """How often draft i agrees, given that all before it did: counts that forget.

    The longest memory gives the estimate, the shorter ones notice when the text has changed; then
    the longer ones are replaced. All forget per row that drafted, not per round: rounds without
    drafts say nothing.
    """

    LENGTHS = np.array([8, 32, 128, 1000])  # rows that a memory is about
    FIRST = 3.0  # tries that the prior counts for
    SHRINK = 6.0  # a position counts as the one before it until it was tried about this often
    SURPRISE = 3.9  # standard deviations; by chance once in some thousands of rows
    SURE = 0.999

    def __init__(self, prior: float) -> None:
        self.memories = np.zeros((len(self.LENGTHS), 2, MOST))  # tried, agreed
        self.memories[:, :, 0] = self.FIRST, self.FIRST * prior
        self.excess = np.zeros(len(self.LENGTHS))
        self.variance = np.zeros(len(self.LENGTHS))
        self._estimate()

    def observe(self, k: int, accepted: Sequence[int], limits: Limits) -> None:
        """Count a round."""
        rows = 0
        tried, agreed = [0] * MOST, [0] * MOST
        for row, count in enumerate(accepted):
            limit = k if limits is None else min(k, limits[row])
            rows += limit > 0
            for i in range(min(count + 1, limit)):
                tried[i] += 1
                agreed[i] += i < count
        if not rows:
            return
        expected = np.array(tried) * self.a
        keep = (1 - 1 / self.LENGTHS) ** rows
        self.memories = self.memories * keep[:, None, None] + np.array([tried, agreed])
        self.excess = keep * self.excess + sum(agreed) - expected.sum()
        self.variance = keep**2 * self.variance + (expected * (1 - self.a)).sum()
        surprise = np.abs(self.excess[:-1]) / np.sqrt(self.variance[:-1])
        most = int(surprise.argmax())
        if surprise[most] > self.SURPRISE:
            self.memories[most + 1 :] = self.memories[most]
            self.excess[:] = self.variance[:] = 0
        self._estimate()

    def _estimate(self) -> None:
        a: list[float] = []
        before, weight = 0.5, 1e-6
        for tried, agreed in zip(*self.memories[-1].tolist(), strict=True):
            before = (agreed + weight * before) / (tried + weight)
            before, weight = min(max(before, 1 - self.SURE), self.SURE), self.SHRINK
            a.append(before)
        self.a = np.array(a)
        self.tokens = self._tokens(self.a)  # per row and round, for K = 0, 1, ...

    def counted(self, position: int) -> float:
        """Return how many tries a position's estimate stands on."""
        return float(self.memories[-1, 0, position]) + self.SHRINK

    def hoped(self, above: int) -> Floats:
        """Return tokens per row and round if the positions > above are one deviation better."""
        a = self.a.copy()
        up = np.sqrt(a * (1 - a) / (self.memories[-1, 0] + self.SHRINK))
        a[above:] = np.minimum(a + up, 1)[above:]
        return self._tokens(a)

    @staticmethod
    def _tokens(a: Floats) -> Floats:
        return np.concatenate([[1.0], 1 + a.cumprod().cumsum()])
