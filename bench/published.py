"""Published measurements, made ready to be predicted: bench/published.json as cases and curves.

Whole sources (links) are split in halves before anything is fitted: in the order of the SHA-256 of
their link, each to the half with fewer records so far, the fit first. Rows of one source share a
machine, a runtime and often the same plain run; alternate rows would be predicted from their own
neighbours. Curves of matmuls are split with them.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gemma_mtp_mlx import acceptances, outline, workload
from gemma_mtp_mlx.chips import Chip, find
from gemma_mtp_mlx.dispatch import Weights
from gemma_mtp_mlx.footprint import kv_read_bytes
from gemma_mtp_mlx.outline import Outline
from gemma_mtp_mlx.prediction import MOST, Constants, seconds
from gemma_mtp_mlx.workload import MLX, Pass, Runtime, Work

PUBLISHED = Path(__file__).parent / "published.json"
SHORT = 500  # tokens of a context that is not given: prompts were short
STARTS_WITH = 3  # drafts, of a runtime that draws more only if these agree in so many rounds:
EXPANDS_FROM = 0.65
Record = dict[str, Any]


def published() -> dict[str, Any]:
    """Return the data file."""
    data: dict[str, Any] = json.loads(PUBLISHED.read_text())
    return data


def fit_sources(records: Sequence[Record]) -> set[str]:
    """Return the sources of the half that constants are fitted to."""
    number = Counter(record["source"] for record in records)
    fit: set[str] = set()
    sizes = [0, 0]
    for source in sorted(number, key=lambda link: hashlib.sha256(link.encode()).hexdigest()):
        side = int(sizes[0] > sizes[1])
        sizes[side] += number[source]
        if side == 0:
            fit.add(source)
    return fit


def plausible_tps(record: Record) -> tuple[float, float]:
    """Return the least and the most that plain decoding may have run at for a record to be usable.

    The most is what the chip's bandwidth allows if all rows choose the same experts, the least a
    third of what it allows if they choose independently. No constant that is fitted is in it.
    """
    of = pair(record["model"], record["bits"], "16")
    rows, context = record["rows"], record["context"] or SHORT
    reads = of.target.reads
    kv = rows * kv_read_bytes(of.config, of.dtype, context)
    bandwidth = find(record["chip"]).bandwidth_gbps * 1e9
    least = bandwidth * rows / (reads.pass_bytes(rows) + kv) / 3
    return least, bandwidth * rows / (reads.pass_bytes(1) + kv)


@dataclass(frozen=True, slots=True)
class Case:
    """A record made ready: the plain and the drafting work, and what a row gains by a round.

    rounds: several kinds of rounds, with the share of each. tabled: whether acceptance is that of
    the table of prompts, because the source has none.
    """

    record: Record
    chip: Chip
    plain: Work
    rounds: tuple[tuple[float, Work], ...]
    tokens: float
    tabled: bool

    def speedup(self, constants: Constants) -> float:
        """Return the predicted ratio to plain decoding of the same rows."""
        took = sum(share * seconds(work, self.chip, constants) for share, work in self.rounds)
        return self.tokens * seconds(self.plain, self.chip, constants) / took

    def plain_tps(self, constants: Constants) -> float:
        """Return the predicted tokens per second of plain decoding, of all rows."""
        return float(self.record["rows"]) / seconds(self.plain, self.chip, constants)

    def error(self, constants: Constants) -> float:
        """Return the logarithm of predicted over published."""
        return math.log(self.speedup(constants) / self.record["speedup"])


@dataclass(frozen=True, slots=True)
class Curve:
    """A published curve: what passes of so many rows take, over the first."""

    record: Record
    chip: Chip
    works: dict[int, Work]

    def ratios(self, constants: Constants) -> dict[int, tuple[float, float]]:
        """Return, by rows, the predicted and the published ratio to one row."""
        took = {rows: seconds(work, self.chip, constants) for rows, work in self.works.items()}
        points = {int(rows): value for rows, value in self.record["points"].items()}
        return {r: (took[r] / took[1], points[r] / points[1]) for r in points if r > 1}

    def errors(self, constants: Constants) -> list[float]:
        """Return the logarithms of predicted over published."""
        return [math.log(a / b) for a, b in self.ratios(constants).values()]


@cache
def pair(model: str, bits: str, drafter_bits: str) -> Outline:
    """Return a pair as other people's converters pack it."""
    return outline.of_family(model, bits, drafter_bits, uniform=True)


def runtime_of(record: Record, traits: dict[str, Any]) -> Runtime:
    """Return what is documented of a record's runtime; see "runtimes" in the data file."""
    known = traits.get(record["runtime"], {})
    version = record["version"]
    return Runtime(
        MLX,
        wide="MLX 0.31" not in version and "without qmv_wide" not in version,
        syncs=known.get("syncs", 2.0),
        heads_apart=known.get("heads_apart", False),
        window_copies=known.get("window_copies", False),
    )


def case(record: Record, traits: dict[str, Any]) -> Case:
    """Make a usable record ready."""
    chip, runtime = find(record["chip"]), runtime_of(record, traits)
    of = pair(record["model"], record["bits"], record["drafter_bits"])
    rows, context = record["rows"], record["context"] or SHORT
    chances = acceptances.KINDS[record["prompts"]].chances

    def work(k: int, kept: float) -> Work:
        return workload.drafting_round(of, chip, runtime, rows, k, context, kept)

    plain = work(0, 1.0)
    if record["k"] == "auto":
        gains = {k: acceptances.tokens_per_round(chances, k) for k in range(1, MOST + 1)}
        best = max(gains, key=lambda k: gains[k] / seconds(work(k, gains[k]), chip))
        return Case(record, chip, plain, ((1.0, work(best, gains[best])),), gains[best], True)
    k, drafted = record["k"], record["drafted"]
    tokens, tabled = record["tokens_per_round"], False
    if tokens is None and record["acceptance"] is not None:
        tokens = 1 + k * record["acceptance"]
    if tokens is None:
        tokens, tabled = acceptances.tokens_per_round(chances, k), True
    expands = traits.get(record["runtime"], {}).get("expands", False)
    if expands and drafted is None and k > STARTS_WITH:
        agreed = acceptances.tokens_per_round(chances, 3) - acceptances.tokens_per_round(chances, 2)
        k = k if agreed >= EXPANDS_FROM else STARTS_WITH
    if expands and drafted is not None and k > STARTS_WITH:
        share = min(1.0, max(0.0, (drafted - STARTS_WITH) / (k - STARTS_WITH)))
        rounds = ((1 - share, work(STARTS_WITH, tokens)), (share, work(k, tokens)))
    else:
        rounds = ((1.0, work(k, tokens)),)
    return Case(record, chip, plain, rounds, tokens, tabled)


def curve(record: Record) -> Curve:
    """Make a usable curve ready."""
    chip, runtime = find(record["chip"]), Runtime(MLX, wide=record["qmv_wide"])
    works = {}
    for rows in map(int, record["points"]):
        if record["model"] is not None:
            of = pair(record["model"], "4", "4")
            works[rows] = workload.verify(of, chip, runtime, Pass(rows, 1, SHORT))
        else:
            weights = Weights(*record["weights"])
            works[rows] = Work((workload.matmul(weights, 1, rows, chip, runtime),), 1)
    return Curve(record, chip, works)


@dataclass(frozen=True, slots=True)
class Half:
    """The records of one half."""

    cases: list[Case]
    curves: list[Curve]

    def errors(self, constants: Constants) -> list[float]:
        """Return all logarithms of predicted over published."""
        found = [case.error(constants) for case in self.cases]
        return found + [e for curve in self.curves for e in curve.errors(constants)]

    def plain_errors(self, constants: Constants) -> list[float]:
        """Return those of plain tokens per second, where they are published."""
        return [
            math.log(case.plain_tps(constants) / case.record["plain_tps"])
            for case in self.cases
            if case.record["plain_tps"] is not None
        ]


def halves(data: dict[str, Any]) -> tuple[Half, Half]:
    """Return the half to fit to and the half held out."""
    rounds = [r for r in data["rounds"] if r["usable"]]
    curves = [r for r in data["curves"] if r["usable"]]
    fit = fit_sources([*rounds, *curves])
    made = [case(r, data["runtimes"]) for r in rounds], [curve(r) for r in curves]

    def half(*, fitted: bool) -> Half:
        return Half(
            [c for c in made[0] if (c.record["source"] in fit) == fitted],
            [c for c in made[1] if (c.record["source"] in fit) == fitted],
        )

    return half(fitted=True), half(fitted=False)
