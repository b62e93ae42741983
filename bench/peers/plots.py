"""The figures as PNG: throughput by batch, acceptance by draft, a round's time by phase."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLOURS = plt.get_cmap("tab10").colors
_MARKERS = "osD^vPX*"


def plot_throughput(cells: list[dict[str, Any]], file: Path, note: str) -> None:
    """Draw tokens per second over batch size, one panel per category, one line per contender."""
    categories = list(dict.fromkeys(cell["category"] for cell in cells))
    names = list(dict.fromkeys(name for cell in cells for name in cell["summary"]))
    across = min(3, len(categories))
    down = -(-len(categories) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(4.6 * across, 3.6 * down + 0.6), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(categories) :]:
        axis.set_visible(False)
    for axis, category in zip(axes.flat, categories, strict=False):
        chosen = [cell for cell in cells if cell["category"] == category]
        for number, name in enumerate(names):
            points = [(c["batch"], c["summary"][name]) for c in chosen if name in c["summary"]]
            if not points:
                continue
            speeds = [of["decode_tps"] for _, of in points]
            axis.errorbar(
                [batch for batch, _ in points],
                [speed.median for speed in speeds],
                yerr=[
                    [speed.median - speed.least for speed in speeds],
                    [speed.most - speed.median for speed in speeds],
                ],
                label=name,
                color=_COLOURS[number % len(_COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)],
                capsize=3,
            )
        batches = sorted({cell["batch"] for cell in chosen})
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_title(category)
        axis.set_xlabel("batch (rows)")
        axis.set_ylabel("tokens per second, all rows")
        axis.grid(alpha=0.3)
    handles, labels = _legend(axes)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    figure.suptitle(
        f"Throughput once every row has its first token; median, low to high\n{note}", fontsize=9
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def plot_acceptance(by_category: dict[str, dict[str, Any]], file: Path, note: str) -> None:
    """Draw the share of rounds that emitted each draft, one line per category."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for number, (category, drafting) in enumerate(by_category.items()):
        shares = [count / drafting["rounds"] for count in drafting["by_position"]]
        positions = range(1, len(shares) + 1)
        axis.plot(
            positions, shares, label=category, marker=_MARKERS[number], color=_COLOURS[number]
        )
    axis.set_ylim(0, 1)
    axis.set_xlabel("draft (position in the round)")
    axis.set_ylabel("share of rounds that kept it")
    axis.set_title(f"Accepted drafts by position\n{note}", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(title="prompts")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def plot_rounds(rounds: list[dict[str, Any]], file: Path, note: str) -> None:
    """Draw a round's milliseconds by phase, stacked, one panel per batch, one bar per depth."""
    batches = list(dict.fromkeys(row["batch"] for row in rounds))
    figure, axes = plt.subplots(
        1,
        len(batches),
        figsize=(3.6 * len(batches) + 1, 4.2),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, batch in zip(axes.flat, batches, strict=True):
        rows = [row for row in rounds if row["batch"] == batch]
        depths = [f"K={row['k']}" for row in rows]
        below = [0.0] * len(rows)
        for number, phase in enumerate(rows[0]["ms"]):
            spent = [row["ms"][phase] for row in rows]
            axis.bar(depths, spent, bottom=below, label=phase, color=_COLOURS[number])
            below = [done + more for done, more in zip(below, spent, strict=True)]
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("drafts per round")
    axes[0, 0].set_ylabel("milliseconds per round")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center")
    figure.suptitle(f"A round by phase, each evaluated by itself\n{note}", fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)
