"""The comparison of servers as one PNG: throughput, waits and gaps, one colour per contender."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.serving.figures import ALL, ONE, Run, one_figure, over_runs

_COLOURS = plt.get_cmap("tab10").colors


def plot(runs: dict[str, list[Run]], streams: int, rate: float, file: Path, note: str) -> None:
    """Draw medians as bars, lowest to highest as whiskers; a bar that is missing failed."""
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.8), layout="constrained")
    panels = [
        ("Throughput, closed loop", "tokens per second, all streams", 1.0),
        (f"First text, arrivals at {rate:g} per second", "milliseconds", 1e3),
        (f"Between tokens, arrivals at {rate:g} per second", "milliseconds", 1e3),
    ]
    groups = [
        [("1 stream", ONE, "tokens_per_s"), (f"{streams} streams", ALL, "tokens_per_s")],
        [("p50", "arrivals", "ttft_p50_s"), ("p95", "arrivals", "ttft_p95_s")],
        [("p50", "arrivals", "gap_p50_s"), ("p95", "arrivals", "gap_p95_s")],
    ]
    for axis, (title, unit, scale), group in zip(axes, panels, groups, strict=True):
        _bars(axis, runs, group, scale)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit)
        axis.set_xticks(range(len(group)), [label for label, _, _ in group])
        axis.grid(axis="y", alpha=0.3)
        axis.set_ylim(bottom=0)
    axes[0].set_xlabel("streams at a time")
    axes[1].set_xlabel("percentile of requests")
    axes[2].set_xlabel("percentile of tokens")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"Servers on loopback; median, lowest to highest\n{note}", fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _bars(
    axis: Any, runs: dict[str, list[Run]], group: list[tuple[str, str, str]], scale: float
) -> None:
    width = 0.8 / len(runs)
    for number, (name, done) in enumerate(runs.items()):
        colour, shift = _COLOURS[number % len(_COLOURS)], (number - (len(runs) - 1) / 2) * width
        axis.bar([0], [0], width, label=name, color=colour)
        for place, (_, phase, figure) in enumerate(group):
            spread = over_runs(done, one_figure(phase, figure))
            if spread is not None:
                reach = [[spread.median - spread.least], [spread.most - spread.median]]
                whisker = [[part * scale for part in side] for side in reach]
                middle = spread.median * scale
                axis.bar([place + shift], [middle], width, yerr=whisker, capsize=2, color=colour)
