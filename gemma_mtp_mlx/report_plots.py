"""A report's plots: speed by rows, and how often each draft was kept. All of it is measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from gemma_mtp_mlx.measure import Measured, Spread, depth_name
from gemma_mtp_mlx.report_record import Predicted, deepest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_MARKERS = "sD^vPX*"
_DPI = 130
_GROUP = 0.8  # width of a group of bars; groups are 1 apart


def plot_throughput(
    measured: Sequence[Measured], predicted: Sequence[Predicted], file: Path, note: str
) -> None:
    """Draw tokens per second by rows, and below it the ratio to plain; a column per kind."""
    kinds = list(dict.fromkeys(each.kind for each in measured))
    size = (4.8 * len(kinds) + 1.2, 7.0)
    figure, axes = plt.subplots(2, len(kinds), figsize=size, squeeze=False, layout="constrained")
    for column, kind in enumerate(kinds):
        cells = sorted((each for each in measured if each.kind == kind), key=lambda m: m.rows)
        above, below = axes[0, column], axes[1, column]
        _bars(above, cells, [[speed.tokens_per_s for speed in cell.speeds] for cell in cells])
        _bars(below, cells, [[speed.ratio for speed in cell.speeds] for cell in cells])
        _diamonds(above, cells, [each for each in predicted if each.kind == kind])
        above.set_title(f"prompts: {kind}")
        above.set_ylabel("tokens per second, all rows")
        below.set_ylabel("times plain decoding, run by run")
        below.axhline(1, color="black", linewidth=0.8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title="per round")
    title = "Measured: speed once every row has its first token; median, whiskers least to most"
    if predicted:
        title = title.replace("Measured", "Bars are measured, diamonds predicted")
    figure.suptitle(f"{title}\n{note}", fontsize=9)
    _save(figure, file)


def _bars(axis: Any, cells: Sequence[Measured], spreads: Sequence[Sequence[Spread | None]]) -> None:
    """Draw a group of bars per number of rows, one for each depth. spreads: by rows and depth."""
    depths = [speed.depth for speed in cells[0].speeds]
    width = _GROUP / len(depths)
    for number, depth in enumerate(depths):
        there = [(place, of[number]) for place, of in enumerate(spreads) if of[number] is not None]
        places = [place + _offset(number, len(depths)) for place, _ in there]
        found = [spread for _, spread in there if spread is not None]
        whiskers = [[s.median - s.least for s in found], [s.most - s.median for s in found]]
        axis.bar(
            places,
            [spread.median for spread in found],
            width,
            yerr=whiskers,
            capsize=2,
            error_kw={"elinewidth": 0.9},
            label=depth_name(depth),
            color=_colour(depth, number, len(depths)),
            edgecolor="black",
            linewidth=0.4,
        )
    axis.set_xticks(range(len(cells)), [str(cell.rows) for cell in cells])
    axis.set_xlabel("rows (requests at a time)")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def _diamonds(axis: Any, cells: Sequence[Measured], predicted: Sequence[Predicted]) -> None:
    """Mark what is predicted on the bars of what was measured."""
    depths = [speed.depth for speed in cells[0].speeds]
    rows = [cell.rows for cell in cells]
    axis.plot(
        [rows.index(p.rows) + _offset(depths.index(p.depth), len(depths)) for p in predicted],
        [p.tokens_per_s for p in predicted],
        label="predicted" if predicted else None,
        linestyle="none",
        marker="D",
        markersize=5,
        color="white",
        markeredgecolor="crimson",
    )


def _offset(number: int, count: int) -> float:
    """Return how far from its group's middle a bar stands."""
    return (number - (count - 1) / 2) * _GROUP / count


def _colour(depth: int | None, number: int, count: int) -> Any:
    """Plain is grey, auto orange, the others blue, the darker the deeper."""
    if depth == 0:
        return "lightgrey"
    return "tab:orange" if depth is None else plt.get_cmap("Blues")(0.25 + 0.65 * number / count)


def plot_acceptance(measured: Sequence[Measured], file: Path, note: str) -> None:
    """Draw the share of rounds that kept each draft, a line per kind."""
    figure, axis = plt.subplots(figsize=(6.8, 5.0), layout="constrained")
    for number, (each, speed) in enumerate(deepest(measured)):
        shares = [count / speed.rounds for count in speed.accepted_per_position]
        label = f"{each.kind} ({speed.rounds} rounds, {each.rows} rows)"
        axis.plot(range(1, len(shares) + 1), shares, label=label, marker=_MARKERS[number])
        axis.set_xticks(range(1, len(shares) + 1))
    axis.set_ylim(0, 1)
    axis.set_xlabel("draft (position in the round)")
    axis.set_ylabel("share of rounds that kept it (0 to 1)")
    axis.set_title(f"Measured: drafts kept, by position; greedy\n{note}", fontsize=9)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, title="prompts")
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    # Without what matplotlib says of itself, the same figures give the same file.
    figure.savefig(file, dpi=_DPI, metadata={"Software": None})
    plt.close(figure)
