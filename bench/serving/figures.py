"""What the time stamps of streams say: of one phase, of several runs, as tables.

A phase that failed has the server's words instead of figures.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.peers.figures import NONE, Rows, cells
from bench.serving.load import Stream
from gemma_mtp_mlx.measure import Spread

Figures = dict[str, float]
Run = dict[str, Figures | str]  # one contender's turn, by phase; a text is why it failed
ONE, ALL = "1 stream", "all streams"


def figures(streams: list[Stream]) -> Figures:
    """Return what a phase's time stamps say, in seconds and tokens per second.

    A wait is from asking to the first text. Gaps are between pieces of text; tokens beyond the
    number of pieces came together with others and count as gaps of nothing.
    """
    waits = [stream.pieces[0] - stream.asked for stream in streams]
    gaps: list[float] = []
    tokens = 0
    for stream in streams:
        made = stream.answer.completion_tokens
        assert made is not None
        tokens += made
        gaps += [after - before for before, after in itertools.pairwise(stream.pieces)]
        gaps += [0.0] * (made - len(stream.pieces))
    seconds = max(s.pieces[-1] for s in streams) - min(s.asked for s in streams)
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "ttft_p50_s": float(np.percentile(waits, 50)),
        "ttft_p95_s": float(np.percentile(waits, 95)),
        "gap_p50_s": float(np.percentile(gaps, 50)),
        "gap_p95_s": float(np.percentile(gaps, 95)),
    }


def over_runs(runs: list[Run], of: Callable[[Run], float | None]) -> Spread | None:
    """Return the spread of a figure over the runs that have it, None if none has."""
    found = [value for run in runs if (value := of(run)) is not None]
    return Spread.of(found) if found else None


def one_figure(phase: str, name: str) -> Callable[[Run], float | None]:
    """Return what reads a figure of a phase from a run."""

    def read(run: Run) -> float | None:
        phase_figures = run.get(phase)
        return phase_figures[name] if isinstance(phase_figures, dict) else None

    return read


def gain(run: Run) -> float | None:
    """Return a run's tokens per second with all streams over those with one."""
    one, every = one_figure(ONE, "tokens_per_s")(run), one_figure(ALL, "tokens_per_s")(run)
    return every / one if one and every else None


def failures(runs: dict[str, list[Run]]) -> list[str]:
    """Say which contender failed where, how often, and its words."""
    lines = []
    for name, done in runs.items():
        told = [(found, phase) for run in done for phase, found in run.items()]
        for words in dict.fromkeys(found for found, _ in told if isinstance(found, str)):
            where = [phase for found, phase in told if found == words]
            counted = [f"{p} ({where.count(p)} of {len(done)})" for p in dict.fromkeys(where)]
            lines.append(f"{name}: {words} [{', '.join(counted)}]")
    return lines


def against(done: list[Run], base: list[Run]) -> Spread | None:
    """Return tokens per second with all streams over another's in the same repeat."""
    read = one_figure(ALL, "tokens_per_s")
    pairs = [(read(run), read(other)) for run, other in zip(done, base, strict=True)]
    found = [ours / theirs for ours, theirs in pairs if ours and theirs]
    return Spread.of(found) if found else None


def closed_table(runs: dict[str, list[Run]], streams: int) -> Rows:
    """Return tokens per second with one stream and with all, and what all are worth."""
    bases = [name for name in ("mlx_lm", "mlx_vlm") if name in runs]
    measured = ["1 stream", f"{streams} streams", f"{streams} : 1"]
    measured += [*(f"{streams} x {name}" for name in bases), "first text p95, ms"]
    rows = [["contender", *(cell for name in measured for cell in (name, "low to high"))]]
    for name, done in runs.items():
        row = [name]
        row += _cells(over_runs(done, one_figure(ONE, "tokens_per_s")), 1)
        row += _cells(over_runs(done, one_figure(ALL, "tokens_per_s")), 1)
        row += _cells(over_runs(done, gain), 2)
        for base in bases:
            row += _cells(against(done, runs[base]), 2)
        row += _cells(over_runs(done, one_figure(ALL, "ttft_p95_s")), 0, 1e3)
        rows.append(row)
    return rows


def open_table(runs: dict[str, list[Run]], phase: str) -> Rows:
    """Return waits and gaps in milliseconds, and tokens per second, under arrivals."""
    measured = ("first text p50, ms", "first text p95, ms", "gap p50, ms", "gap p95, ms")
    rows = [["contender", *(c for n in (*measured, "tokens/s") for c in (n, "low to high"))]]
    for name, done in runs.items():
        row = [name]
        for figure, digits in (("ttft_p50_s", 0), ("ttft_p95_s", 0), ("gap_p50_s", 1)):
            row += _cells(over_runs(done, one_figure(phase, figure)), digits, 1e3)
        row += _cells(over_runs(done, one_figure(phase, "gap_p95_s")), 1, 1e3)
        row += _cells(over_runs(done, one_figure(phase, "tokens_per_s")), 1)
        rows.append(row)
    return rows


def _cells(spread: Spread | None, digits: int, scale: float = 1.0) -> list[str]:
    if spread is None:
        return ["failed", NONE]
    scaled = Spread(spread.median * scale, spread.least * scale, spread.most * scale)
    return cells(scaled, digits)


def headline(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Return medians by contender, phase and figure."""
    medians: dict[str, Any] = {}
    for name, done in runs.items():
        phases = dict.fromkeys(phase for run in done for phase in run)
        medians[name] = {"gain": _median(over_runs(done, gain))}
        for phase in phases:
            names = next((list(run[phase]) for run in done if isinstance(run.get(phase), dict)), [])
            medians[name][phase] = {
                figure: _median(over_runs(done, one_figure(phase, figure))) for figure in names
            }
    return medians


def _median(spread: Spread | None) -> float | None:
    return None if spread is None else round(spread.median, 4)
