"""What a round of so many rows and drafts costs: a prior from bytes, corrected by what rounds took.

Host arithmetic only, without a clock: seconds are given to it.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_mtp_mlx.config import DrafterConfig, ModelConfig

MOST = 15  # the largest block is 16 tokens
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed before the first round: bytes per pass, hence the shape of the costs.

    fixed_bytes: read by every target pass; expert_bytes: one expert's weights in all layers;
    drafter_bytes: read by one draft step; token_cost: arithmetic of one more token, in units of
    reading what one token needs; acceptance: of the first draft.
    """

    fixed_bytes: float
    drafter_bytes: float
    expert_bytes: float = 0.0
    num_experts: int = 0
    top_k_experts: int = 0
    token_cost: float = 0.07  # published: .09 to .35 a draft, drafter included (M5 Max to M1 Ultra)
    acceptance: float = 0.7

    def cost(self, rows: int, k: int) -> float:
        """Return what a round costs, in plain rounds of one row."""
        tokens = rows * (k + 1)
        read = (self._read(tokens) + k * self.drafter_bytes) / self._read(1)
        return read + self.token_cost * (tokens - 1)

    def _read(self, tokens: int) -> float:
        """Bytes of a target pass: each distinct expert once, under uniform independent routing."""
        if not self.num_experts:
            return self.fixed_bytes
        missed = (1 - self.top_k_experts / self.num_experts) ** tokens
        return self.fixed_bytes + self.expert_bytes * self.num_experts * (1 - missed)


def prior_for(
    config: ModelConfig, drafter: DrafterConfig, target_bits: float = 4.5, drafter_bits: float = 4.5
) -> Prior:
    """Return the prior of a pair. Bits per weight, scales and biases included (16 for bfloat16)."""
    hidden, text = drafter.backbone_hidden_size, drafter.text
    head = text.vocab_size * text.hidden_size
    if drafter.use_ordered_embeddings:  # the centroids, and the clusters that are looked into
        share = drafter.centroid_intermediate_top_k / drafter.num_centroids
        head = int(head * share) + drafter.num_centroids * text.hidden_size
    projections = 3 * hidden * text.hidden_size
    expert = 3 * config.hidden_size * config.moe_intermediate_size * len(config.layers)
    target = _layer_weights(config) + config.vocab_size * config.hidden_size
    return Prior(
        fixed_bytes=target * target_bits / 8,
        drafter_bytes=(_layer_weights(text) + projections + head) * drafter_bits / 8,
        expert_bytes=expert * target_bits / 8,
        num_experts=config.num_experts,
        top_k_experts=config.top_k_experts,
    )


def _layer_weights(config: ModelConfig) -> int:
    """Weights of the layers that every token needs: no experts, no norms."""
    total = 0
    for layer in config.layers:
        streams = (1 if layer.k_eq_v else 2) if layer.owns_kv else 0
        heads = 2 * config.num_attention_heads + streams * layer.num_key_value_heads
        per_hidden = heads * layer.head_dim + 3 * layer.intermediate_size
        per_hidden += 2 * config.hidden_size_per_layer_input + config.num_experts
        total += config.hidden_size * per_hidden
    return total


class Costs:
    """Seconds of a round by batch size and depth: the prior's shape times a smooth correction.

    The log of the correction is a Gaussian process, so a size that never ran is believed from those
    around it, and what is believed comes with how well it is known. Along the depth it is a random
    walk: a curve may jump or turn flat anywhere, and beyond what ran goes on as the prior does.
    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, eq. 2.23, 2.24.
    """

    WINDOW = 63  # rounds that a cell's time is taken from
    NOISE = 0.08  # of one round's log seconds; more than is usual, so that no single one decides
    # A round longer than this many deviations is set aside (a prompt was processed, memory was
    # collected), unless the one before it at that size and depth was so too.
    ODD = 3.0
    ONCE = 0.05  # how wrong a size's first round may be; if it was a surprise, half of that
    DRIFT = 0.0015  # log seconds a cell may drift per round not seen (contexts grow)
    CELLS = 48  # the nearest cells are enough, and bound the work
    # Standard deviations of the correction: of the whole (the chip is not known); by batch size;
    # per doubling of the block. Published curves differ from the prior so.
    WHOLE, BATCH, BLOCK = 3.0, 0.3, 0.3

    def __init__(self, prior: Prior, most: int = MOST) -> None:
        self.prior = prior
        self.most = most
        self.rounds = 0
        self.cells: dict[tuple[int, int], _Cell] = {}
        self.odd: set[tuple[int, int]] = set()
        self._priors: dict[int, tuple[NDArray[np.int64], Floats, Floats]] = {}
        self._near: dict[int, tuple[list[_Cell], Floats, Floats]] = {}  # for the cells there are
        self._believed: dict[int, tuple[Floats, Floats]] = {}  # since the last round

    @property
    def deepest(self) -> int:
        """The most drafts of a round so far."""
        return max((k for _, k in self.cells), default=0)

    def observe(self, rows: int, k: int, seconds: float) -> None:
        """Take note of a round's time."""
        self.rounds += 1
        log_seconds = math.log(max(seconds, 1e-9))
        surprise = 0.0
        if self.cells:
            believed, spread = self.believed(rows)
            surprise = log_seconds - float(believed[k])
            bound = self.ODD * math.sqrt(spread[k, k] + self.NOISE**2)
            if surprise > bound and (rows, k) not in self.odd:
                return self.odd.add((rows, k))
            if surprise < -bound:  # what ran once only may have been the odd one
                self.cells = {at: c for at, c in self.cells.items() if len(c.times) > 1}
                self._near.clear()
        self.odd.discard((rows, k))
        self._believed.clear()
        if (rows, k) not in self.cells:
            once = max(self.ONCE, surprise / 2)
            self.cells[rows, k] = _Cell(deque(maxlen=self.WINDOW), once)
            self._near.clear()
        self.cells[rows, k].add(log_seconds - math.log(self.prior.cost(rows, k)), self.rounds)

    def believed(self, rows: int) -> tuple[Floats, Floats]:
        """Return the log seconds for K = 0, 1, ... and their covariance."""
        if rows in self._believed:
            return self._believed[rows]
        if rows not in self._priors:
            asked = np.array([(rows, k) for k in range(self.most + 1)])
            shape = np.log([self.prior.cost(rows, k) for k in range(self.most + 1)])
            self._priors[rows] = asked, shape, self._kernel(asked, asked)
        asked, shape, own = self._priors[rows]
        if not self.cells:
            return shape, own
        if rows not in self._near:

            def far(at: tuple[int, int]) -> tuple[float, int]:
                return abs(math.log(at[0] / rows)), -self.cells[at].when

            at = sorted(self.cells, key=far)[: self.CELLS]
            kernel = self._kernel(np.array(at), np.array(at))
            self._near[rows] = (
                [self.cells[c] for c in at],
                kernel,
                self._kernel(np.array(at), asked),
            )
        cells, kernel, cross = self._near[rows]
        middle, n, once, when = np.array(
            [(c.middle, len(c.times), c.once, c.when) for c in cells]
        ).T
        noise = 1.2 * self.NOISE**2 / n + (once / n) ** 2  # 1.2: of a middle half, not of a mean
        kernel = kernel + np.diag(noise + self.DRIFT**2 * (self.rounds - when))
        weights = np.linalg.solve(kernel, cross)
        self._believed[rows] = shape + middle @ weights, own - weights.T @ cross
        return self._believed[rows]

    def ms(self) -> dict[int, dict[int, float]]:
        """Return the believed milliseconds of every size and depth that ran."""
        table: dict[int, dict[int, float]] = {}
        for rows, k in sorted(self.cells):
            table.setdefault(rows, {})[k] = 1e3 * math.exp(self.believed(rows)[0][k])
        return table

    def _kernel(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> Floats:
        """Covariance of the corrections at two lists of (rows, k)."""
        batch = np.abs(np.log2(a[:, None, 0] / b[None, :, 0]))
        block = np.log2(1 + np.minimum(a[:, None, 1], b[None, :, 1]))
        near = np.exp(-batch / 2)
        return np.asarray(self.WHOLE**2 + near * (self.BATCH**2 + self.BLOCK**2 * block))


@dataclass(slots=True)
class _Cell:
    """The rounds of one size and depth: logs of seconds over the prior's cost."""

    times: deque[float]
    once: float
    middle: float = 0.0  # the mean of their middle half
    when: int = 0

    def add(self, ratio: float, when: int) -> None:
        self.times.append(ratio)
        self.when = when
        n = len(self.times)
        cut = (n + 1) // 4
        inner = sorted(self.times)[cut : 1 if n == 2 else n - cut]
        self.middle = sum(inner) / len(inner)
