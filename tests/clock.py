"""A clock that is not real: what rounds cost by published figures, and drafts that agree by chance.

Nothing here was measured by this project. A cost says how many milliseconds a round of B rows and K
drafts takes: by a roofline over bytes and arithmetic, or by a published curve over the number of
tokens in a pass. Shared by tests/test_depth.py, bench/regret.py and bench/virtual.py. The roofline
is cruder than the cost model of `predict`: controllers are tried on many shapes of costs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma_mtp_mlx.chips import find
from gemma_mtp_mlx.depth import AutoDepth, FixedDepth

Cost = Callable[[int, int], float]  # rows, K -> milliseconds
MOST = 15


@dataclass(frozen=True, slots=True)
class Chip:
    """Bandwidth and arithmetic, and the share of each that is reached.

    Figures are those of the package's chips; .85 of the bandwidth and .77 (.70 on tensor units) of
    the arithmetic are assumed.
    """

    gbps: float
    tflops: float
    reached: float

    @classmethod
    def named(cls, name: str) -> "Chip":
        """Return a chip of the package's."""
        chip = find(name)
        return cls(chip.bandwidth_gbps, chip.matrix_tflops, 0.70 if chip.tensor_tflops else 0.77)


CHIPS = {name: Chip.named(name) for name in ("M1 Max", "M2 Ultra", "M3 Max", "M4 Max", "M5 Max")}


@dataclass(frozen=True, slots=True)
class Model:
    """A target in 4 bits (0.5625 bytes a weight) and its drafter. Source: the configurations.

    weights_gb: read by a pass of any size; params: billions at work per token; expert_gb: of one
    expert index over all layers, of 128 with 8 chosen; kv_mb: read per row at 1k context, and
    drafter_kv_mb the part of it that one draft step reads (3 sliding layers and 1 full one).
    """

    weights_gb: float
    params: float
    kv_mb: float
    drafter_kv_mb: float
    drafter_gb: float
    drafter_bf16_gb: float
    expert_gb: float = 0.0

    def gb(self, tokens: int, *, grouped: bool = True) -> float:
        """Weights read by a pass; grouped: each distinct expert once, else once per token."""
        if not self.expert_gb:
            return self.weights_gb
        distinct = 128 * (1 - (1 - 8 / 128) ** tokens) if grouped else 8 * tokens
        return self.weights_gb + self.expert_gb * distinct


MODELS = {
    "E4B": Model(2.61, 4.64, 66, 6.3, 0.02, 0.08),
    "26B-A4B": Model(1.34, 3.81, 231, 29.4, 0.24, 0.84, expert_gb=0.1004),
    "31B": Model(17.27, 30.7, 923, 58.7, 0.24, 0.94),
}


def verify_ms(chip: Chip, model: Model, rows: int, k: int, *, grouped: bool = True) -> float:
    """Roofline of one target pass at 1k context: the larger of reading and computing."""
    tokens = rows * (k + 1)
    read = (model.gb(tokens, grouped=grouped) + rows * model.kv_mb / 1e3) / (chip.gbps * 0.85)
    compute = 2 * model.params * tokens / (chip.tflops * 1e3 * chip.reached)
    return 1e3 * max(read, compute)


def draft_ms(chip: Chip, model: Model, rows: int, *, bf16: bool = False) -> float:
    """One draft step, bound by what it reads."""
    gb = model.drafter_bf16_gb if bf16 else model.drafter_gb
    return 1e3 * (gb + rows * model.drafter_kv_mb / 1e3) / (chip.gbps * 0.85)


def roofline(chip: str, model: str, *, grouped: bool = True, bf16: bool = False) -> Cost:
    """Return the cost of rounds by the roofline."""

    def cost(rows: int, k: int) -> float:
        verify = verify_ms(CHIPS[chip], MODELS[model], rows, k, grouped=grouped)
        return verify + k * draft_ms(CHIPS[chip], MODELS[model], rows, bf16=bf16)

    return cost


def linear(a: float, b: float) -> Cost:
    """Return a cost published for one row as a + b K plain rounds (of 30 ms); plain costs 1."""
    return lambda rows, k: 30.0 * rows**0.3 * (a + b * k if k else 1.0)


def by_tokens(points: dict[int, float], draft: float) -> Cost:
    """Return a cost that follows a curve over the tokens of a pass, times 30 ms, and draft steps.

    Between points it is straight; past the last it repeats, as tiles of that many tokens do.
    """
    sizes, costs = list(points), list(points.values())

    def cost(rows: int, k: int) -> float:
        whole, rest = divmod(rows * (k + 1), sizes[-1])
        last = float(np.interp(rest, sizes, costs)) if rest else 0.0
        return 30.0 * (whole * costs[-1] + last + k * draft) / costs[0]

    return cost


# Matrix times M tokens in MLX's own kernels, where it is the whole of the pass.
STOCK_M4_PRO = {1: 0.198, 3: 0.224, 4: 0.283, 5: 0.347, 8: 0.562, 10: 0.891, 32: 0.891}
STOCK_M3_MAX = {1: 0.129, 4: 0.165, 6: 0.263, 8: 0.323, 9: 0.405, 10: 0.51, 32: 0.51}
STOCK_M5_MAX = {1: 76.0, 3: 85.0, 5: 108.0, 8: 168.0, 12: 241.0, 32: 241.0}
OLD_M4_PRO = {1: 68.0, 2: 69.0, 3: 94.0, 4: 122.0, 5: 150.0, 6: 179.0, 32: 179.0}

COSTS: dict[str, Cost] = {
    # mlxcel's fits of whole rounds (its issues 1217, 1188 and benchmarks.md), drafter included.
    "31B M1 Ultra, mlxcel": linear(1.35, 0.346),
    "31B M3 Ultra, mlxcel": linear(0.83, 0.170),
    "12B M3 Ultra, mlxcel": linear(1.14, 0.090),
    # Per extra position on an M5 (oMLX's performance notes).
    "dense M5, oMLX": linear(1.0, 0.087),
    "26B M5, oMLX": linear(1.0, 0.425),
    # ml-explore/mlx 3852, 3863, 3791 and 3553, with the drafter's share of a 31B pass.
    "stock M4 Pro": by_tokens(STOCK_M4_PRO, 0.014),
    "stock M3 Max": by_tokens(STOCK_M3_MAX, 0.014 * 0.129 / 0.198),
    "stock M5 Max": by_tokens(STOCK_M5_MAX, 0.014 * 76),
    "MLX 0.30 M4 Pro": by_tokens(OLD_M4_PRO, 0.014 * 68),
    **{
        f"{model} {chip}, roofline": roofline(chip, model)
        for model in ("31B", "26B-A4B")
        for chip in CHIPS
    },
    "E4B M1 Max, roofline": roofline("M1 Max", "E4B"),
    "26B-A4B M4 Max, experts not grouped": roofline("M4 Max", "26B-A4B", grouped=False),
    "26B-A4B M4 Max, drafter bf16": roofline("M4 Max", "26B-A4B", bf16=True),
}

# Chance of each draft given that all before it agreed.
ACCEPTANCE: dict[str, list[float]] = {
    "JSON .08": [0.08] * MOST,  # gemmaclaw 133
    "prose .31": [0.31] * MOST,  # gemmaclaw 133
    "prose .49": [0.49] * MOST,  # mlxcel benchmarks.md
    "chat, falling": [0.71 * 0.93**i for i in range(MOST)],  # shaped after oMLX PR 1909
    ".75": [0.75] * MOST,
    "code .92, falling": [0.92, 0.85, 0.86, 0.85] + [0.84] * (MOST - 4),  # club-3090 274
    ".88": [0.88] * MOST,
    ".95": [0.95] * MOST,
}


def tokens_per_row(acceptance: Sequence[float], k: int) -> float:
    """Return what a row gains per round on average."""
    return 1 + float(np.cumprod(acceptance[:k]).sum())


def rate(cost: Cost, acceptance: Sequence[float], rows: int, k: int) -> float:
    """Return the true tokens per millisecond."""
    return rows * tokens_per_row(acceptance, k) / cost(rows, k)


def best_depth(cost: Cost, acceptance: Sequence[float], rows: int) -> int:
    """Return the depth an oracle would choose."""
    return max(range(MOST + 1), key=lambda k: rate(cost, acceptance, rows, k))


@dataclass(frozen=True, slots=True)
class Segment:
    """Rounds that are alike: so many, with that acceptance and that many rows in turn."""

    rounds: int
    acceptance: Sequence[float]
    rows: Sequence[int] = (1,)


@dataclass(slots=True)
class Drive:
    """What happened: per round its rows, depth, true milliseconds, mean tokens."""

    rows: list[int] = field(default_factory=list)
    k: list[int] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    plain_ms: list[float] = field(default_factory=list)  # for as many tokens without drafts
    best_ms: list[float] = field(default_factory=list)  # for as many tokens at the oracle's depth

    def regret(self, start: int, stop: int | None = None) -> float:
        """Return the share of time an oracle would have saved over those rounds."""
        return 1 - sum(self.best_ms[start:stop]) / sum(self.ms[start:stop])

    def slower_than_plain(self, start: int, stop: int | None = None) -> float:
        """Return how much longer it took than plain decoding, as a share; below 0 if faster."""
        return sum(self.ms[start:stop]) / sum(self.plain_ms[start:stop]) - 1

    def switches(self, start: int) -> int:
        """Return how often the depth of a batch size differed from its last one."""
        last: dict[int, int] = {}
        count = 0
        for i, (rows, k) in enumerate(zip(self.rows, self.k, strict=True)):
            count += i >= start and last.get(rows, k) != k
            last[rows] = k
        return count


@dataclass(frozen=True, slots=True)
class Noise:
    """What a measured round differs by: lognormal, and now and then several times longer."""

    sigma: float = 0.05
    outliers: float = 0.02
    factor: float = 5.0


def drive(
    depth: AutoDepth | FixedDepth,
    cost: Cost,
    segments: Sequence[Segment],
    noise: Noise | None = None,
    seed: int = 0,
) -> Drive:
    """Run a controller on the clock. Chance falls alike for equal seeds, noise for equal rounds."""
    noise = noise or Noise()
    rng = np.random.RandomState(seed)
    out = Drive()
    for segment in segments:
        oracle = {r: best_depth(cost, segment.acceptance, r) for r in set(segment.rows)}
        chances = np.array(segment.acceptance)
        for i in range(segment.rounds):
            rows = segment.rows[i % len(segment.rows)]
            k = depth.choose(rows)
            agree = rng.random_sample((rows, MOST)) < chances
            accepted = np.cumprod(agree, axis=1)[:, :k].sum(axis=1)
            seconds = cost(rows, k) / 1e3 * np.exp(noise.sigma * rng.standard_normal())
            seconds *= noise.factor if rng.random_sample() < noise.outliers else 1.0
            depth.observe(rows, k, float(seconds), accepted.tolist())
            tokens = rows * tokens_per_row(segment.acceptance, k)
            out.rows.append(rows)
            out.k.append(k)
            out.ms.append(cost(rows, k))
            out.tokens.append(tokens)
            out.plain_ms.append(tokens / rate(cost, segment.acceptance, rows, 0))
            out.best_ms.append(tokens / rate(cost, segment.acceptance, rows, oracle[rows]))
    return out
