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
# Share of the time that tries may cost: below 1 %, as what is believed may be a little wrong too.
BUDGET = 0.006
# Plain rounds to begin with: all else is compared with them, so one outlier must not decide.
FIRST = 3
# Plain rounds that may be lost to trying at the start, and how many may be saved up later.
START, EARLY, SAVED = 3.0, 64, 1.0
SIGMAS = 1.5  # deviations by which what is not known well is hoped to be better
# Plain decoding is tried first where its log seconds against the settled depth's are this vague.
YARDSTICK = 0.1
# Acceptance a text may turn out to have: what a try out of plain decoding looks for.
HOPED = 0.9


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
        self._acceptance = _Acceptance(0.0)
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

    Most rounds run at the settled depth of their batch size. Others try a depth that may be better;
    what they lose against the settled one comes out of an account that grows by BUDGET of the time.
    A try that pays fills it again, so that a text that became easy is followed at once.
    """

    def __init__(self, prior: Prior, most: int = MOST) -> None:
        if not 0 <= most <= MOST:
            raise ValueError(f"cannot draft up to {most} tokens per round; give 0 to {MOST}")
        self.most = most
        self._acceptance = _Acceptance(prior.acceptance)
        self._costs = Costs(prior, most)
        self._depth: dict[int, int] = {}
        self._account = START  # plain rounds that tries may still lose
        self._reserved: dict[tuple[int, int], tuple[float, bool]] = {}  # for tries under way
        self._cheapest = 0.0  # the least a try out of plain decoding may lose
        self._switches = self._probes = 0
        self._lost = self._seconds = 0.0

    def choose(self, rows: int) -> int:
        """Return K for the next round with that many rows."""
        log_seconds, spread = self._costs.believed(rows)
        settled = self._settle(rows, log_seconds)
        early = self._costs.rounds < FIRST
        return 0 if early else self._try(rows, settled, log_seconds, spread)

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
        plain = math.exp(log_seconds[0])
        self._seconds += seconds
        most = max(SAVED, self._cheapest, START * (1 - self._costs.rounds / EARLY))
        self._account += BUDGET * math.exp(log_seconds[k]) / plain
        if (rows, k) in self._reserved:
            reserved, listen = self._reserved.pop((rows, k))
            settled = self._depth[rows]
            believed = self._acceptance.tokens()
            tokens = 1 + sum(accepted) / rows if listen else float(believed[k])
            per_token = math.exp(log_seconds[settled]) / believed[settled]
            lost = math.exp(log_seconds[k]) - tokens * per_token
            self._account += reserved - lost / plain
            self._lost, self._probes = self._lost + lost, self._probes + 1
        self._account = min(self._account, most)

    def state(self) -> DepthState:
        """Return what is believed now."""
        acceptance = tuple(self._acceptance.a[: self.most].tolist())
        counts = self._costs.rounds, self._switches, self._probes
        share = float(self._lost / self._seconds) if self._seconds else 0.0
        return DepthState(dict(self._depth), acceptance, self._costs.ms(), *counts, share)

    def _gain(self, settled: int, log_seconds: Floats) -> Floats:
        """Log of each depth's throughput over the settled one's, as believed."""
        rate = np.log(self._acceptance.tokens()[: self.most + 1]) - log_seconds
        return rate - rate[settled]

    def _try(self, rows: int, settled: int, log_seconds: Floats, spread: Floats) -> int:
        """Return a depth worth a try now, setting aside what it may lose; else the settled one."""
        gain = self._gain(settled, log_seconds)
        # How badly each depth's seconds are known relative to the settled one's.
        apart = np.diag(spread) + spread[settled, settled] - 2 * spread[settled]
        doubt = np.sqrt(np.maximum(apart, 0))
        vaguer = np.diag(spread) > spread[settled, settled]
        if doubt[0] > YARDSTICK and vaguer[0]:
            return 0
        # Plain rounds that a round of each depth is believed to lose.
        loss = -np.exp(log_seconds - log_seconds[0]) * np.expm1(gain)
        self._cheapest = float(loss[1:].min(initial=0.0)) if settled == 0 else 0.0
        tokens = self._acceptance.tokens()[: self.most + 1]
        deep = np.log(self._acceptance.tokens(above=settled)[: self.most + 1] / tokens)
        hope = gain + SIGMAS * doubt + (deep if settled else 0.0)
        hope[2 * self._costs.deepest + 2 :] = -np.inf  # at most a block twice as long as any so far
        hope[(loss > self._account) | ~vaguer] = -np.inf
        k = int(np.argmax(hope))
        listen = hope[k] <= 2 * MARGIN
        if listen:
            # Nothing is heard of acceptance in plain decoding, so the text may have become easy.
            easy = np.log(np.cumsum(HOPED ** np.arange(self.most + 1)))
            pays = np.max(easy - log_seconds + log_seconds[0] + SIGMAS * doubt) > 2 * MARGIN
            if settled or not pays or self._cheapest > self._account:
                return settled
            k = 1 + int(np.argmin(loss[1:]))
        self._account -= loss[k]
        self._reserved[rows, k] = float(loss[k]), listen
        return k

    def _settle(self, rows: int, log_seconds: Floats) -> int:
        """Return the settled depth of that batch size, replaced first if another is better."""
        settled = self._depth.get(rows, 0)
        gain = self._gain(settled, log_seconds)
        best = int(np.argmax(gain))
        # It is easier to return to plain decoding than to leave it.
        if gain[best] > (0 if best == 0 else MARGIN if settled else 2 * MARGIN):
            self._switches += rows in self._depth
            settled = best
        self._depth[rows] = settled
        return settled


class _Acceptance:
    """How often draft i agrees, given that all before it did: counts that forget.

    A long memory gives the estimate, a short one notices when the text has changed; then the long
    one is replaced by the short one. Both forget per row that drafted, not per round: rounds
    without drafts say nothing.
    """

    LONG, SHORT = 300, 8  # rows that a memory is about
    SHRINK = 6.0  # a position counts as the one before it until it was tried about this often
    SURPRISE = 3.9  # standard deviations; by chance once in some thousands of rows

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self.long = np.zeros((2, MOST))  # tried, agreed
        self.short = np.zeros((2, MOST))
        self.excess = self.variance = 0.0
        self._estimate()

    def observe(self, k: int, accepted: Sequence[int], limits: Limits) -> None:
        """Count a round."""
        for row, count in enumerate(accepted):
            limit = k if limits is None else min(k, limits[row])
            tried = min(count + 1, limit)
            if not tried:
                continue
            a = self.a[:tried]
            keep = 1 - 1 / self.SHORT
            self.excess = keep * self.excess + count - float(a.sum())
            self.variance = keep**2 * self.variance + float((a * (1 - a)).sum())
            for memory, length in ((self.long, self.LONG), (self.short, self.SHORT)):
                memory *= 1 - 1 / length
                memory[0, :tried] += 1
                memory[1, :count] += 1
            if abs(self.excess) > self.SURPRISE * math.sqrt(self.variance + 1e-9):
                self.long[:] = self.short
                self.excess = self.variance = 0.0
        self._estimate()

    def _estimate(self) -> None:
        self.a = np.empty(MOST)
        before = self.prior
        for i in range(MOST):
            tried, agreed = self.long[:, i]
            weight = self.SHRINK if i else self.SHRINK / 2
            before = (agreed + weight * before) / (tried + weight)
            self.a[i] = before

    def tokens(self, above: int = MOST) -> Floats:
        """Return tokens per row and round for K = 0, 1, ...; positions > above one deviation up."""
        a = self.a.copy()
        up = np.sqrt(a * (1 - a) / (self.long[0] + self.SHRINK))
        a[above:] = np.minimum(a + up, 1)[above:]
        return 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(a))])
