"""Draw what `predict` predicts: the speed-up against acceptance, a panel for each chip."""

from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

from gemma_mtp_mlx.predict_report import NAMES, Asked
from gemma_mtp_mlx.workload import OURS

ACROSS = 3  # panels
STEPS, LAST = 39, 0.95  # points of a curve, and where it ends: certain drafts dwarf the rest
COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f", "#edae49", "#2e4057")


def write(asked: Asked, file: Path) -> None:
    """Write a PNG. Raises: ValueError if there is nothing to draw it with, or to draw."""
    if asked.outline.drafter is None:
        raise ValueError("--plot draws what drafting brings, and there is no drafter")
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib; install it: pip install 'mlx-gemma-mtp[plot]'"
        ) from error
    across = min(ACROSS, len(asked.chips))
    down = ceil(len(asked.chips) / across)
    size = (max(7.5, 4.2 * across), 3.4 * down + 1.4)
    figure, panels = plt.subplots(
        down, across, figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for panel in panels.flat[len(asked.chips) :]:
        panel.set_visible(False)
    for panel, chip in zip(panels.flat, asked.chips, strict=False):
        _panel(panel, asked, chip)
    for panel in panels[:, 0]:
        panel.set_ylabel("best K over plain, predicted")
    for panel in panels[-1]:
        panel.set_xlabel("acceptance: chance of each draft")
    handles, labels = panels[0][0].get_legend_handles_labels()
    title = f"Predicted, not measured: {asked.outline.name}, {asked.outline.formats}"
    figure.suptitle(title, y=1 - 0.2 / size[1])
    figure.legend(handles, labels, loc="lower center", ncols=min(3, len(asked.rows)), frameon=False)
    figure.tight_layout(rect=(0, 0.75 / size[1], 1, 1 - 0.3 / size[1]))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _panel(panel: Any, asked: Asked, chip: Any) -> None:
    at = [LAST * i / (STEPS - 1) for i in range(STEPS)]
    colours = dict(zip(asked.rows, COLOURS * len(asked.rows), strict=False))
    for rows, kernels in product(asked.rows, NAMES):
        rounds = asked.rounds(chip, rows, kernels)
        panel.plot(
            at,
            [rounds.speedup((chance,)) for chance in at],
            color=colours[rows],
            linestyle="-" if kernels == OURS else "--",
            label=f"{rows} row{'s' * (rows > 1)}, {NAMES[kernels]}",
        )
    panel.axhline(1, color="0.6", linewidth=0.8)
    panel.set_title(f"{chip.name}, {chip.bandwidth_gbps:g} GB/s", fontsize=10)
    panel.set_xlim(0, LAST)
    panel.grid(alpha=0.25)
