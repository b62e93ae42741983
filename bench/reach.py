"""Where "up to 2.2x" is within reach for 26B-A4B on Apple chips, and where it is not: predicted.

    python -m bench.reach       writes bench/results/reach.md and reach.png

Google says that 26B-A4B decodes up to about 2.2 times faster with its drafter at batches of 4 to 8
on Apple silicon, without chip, format, K, prompts or acceptance. The cost model of `predict` is
asked for the least acceptance at which drafting is 2.2 times as fast as plain decoding of the same
rows, by chip, rows, format, and whose kernels run.
"""

import argparse
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

from gemma_mtp_mlx import outline
from gemma_mtp_mlx.acceptances import KINDS
from gemma_mtp_mlx.chips import find
from gemma_mtp_mlx.predict_report import NAMES, RUNTIMES
from gemma_mtp_mlx.prediction import HELD_OUT_ERROR, Rounds
from gemma_mtp_mlx.workload import MLX, OURS

RESULTS = Path(__file__).parent / "results"
MODEL, RATIO, CONTEXT = "26B-A4B", 2.2, 1024
CHIPS = ("M1 Max", "M2 Ultra", "M3 Max", "M3 Ultra", "M4 Pro", "M4 Max", "M5", "M5 Max", "M5 Ultra")
DRAWN = ("M1 Max", "M3 Max", "M4 Max", "M5 Max")
ROWS = (1, 4, 8)
FORMATS = {"4-bit": ("4", "4"), "bfloat16": ("16", "16")}  # of target and drafter
STEPS, FIRST, LAST = 61, 0.4, 1.0
COLOURS = dict(zip(ROWS, ("#1b6ca8", "#d1495b", "#66a182"), strict=True))


@cache
def rounds(chip: str, rows: int, kernels: str, form: str) -> Rounds:
    """Return the rounds of one curve."""
    pair = outline.of_family(MODEL, *FORMATS[form])
    return Rounds(pair, find(chip), RUNTIMES[kernels], rows, CONTEXT)


def least(chip: str, rows: int, kernels: str, form: str) -> str:
    """Return the least acceptance for the ratio, in words."""
    found = rounds(chip, rows, kernels, form).least_acceptance(RATIO)
    return "not reachable" if found is None else f"{found:.2f}"


HEAD = f"""\
# Is 2.2x within reach for {MODEL}?

Written by `python -m bench.reach`. **Predicted, not measured**, by the cost model of `mlx-gemma-mtp
predict` (median error of held-out speed-ups {HELD_OUT_ERROR:.0%}; for this model more, and most
often it promises too much, see [calibration.md](calibration.md)).
Nobody has published 2.2x for this model with several rows on an Apple chip; the best published
figure that can be used is 1.55 (bfloat16, 8 rows, one short prompt).

The ratio is drafting, at the best K of 1 to 15, to plain decoding **of the same rows by the same
kernels**, at {CONTEXT} tokens a row, each row keeping what it accepted; acceptance is the chance of
each draft. Our kernels' plain decoding is predicted to be faster than MLX's, so a lower ratio may
be more tokens per second. Drafters are packed as their targets. Published acceptance is about .86
for code, .6 to .7 for chat, .7 for prose
([acceptances.json](../../gemma_mtp_mlx/data/acceptances.json)).

![speed-up against acceptance](reach.png)
"""


def report() -> Iterator[str]:
    """Yield reach.md."""
    yield HEAD
    yield f"## Predicted: least acceptance for {RATIO}x\n"
    head = [f"{form}, {NAMES[kernels]}" for form, kernels in product(FORMATS, NAMES)]
    yield f"| chip | B | {' | '.join(head)} |"
    yield "|---|---:|" + "---:|" * len(head)
    for chip, rows in product(CHIPS, ROWS):
        cells = [least(chip, rows, kernels, form) for form, kernels in product(FORMATS, NAMES)]
        yield f"| {chip} | {rows} | {' | '.join(cells)} |"
    yield "\n## Predicted: what code and chat prompts bring\n"
    yield (
        "Best K over plain decoding of the same rows, and in brackets tokens per second of all "
        "rows;\nlast, ours over plain decoding of one row by MLX's kernels: what batch, drafts and "
        "kernels are\nworth together.\n"
    )
    yield "| chip | B | prompts | MLX's kernels, 4-bit | our kernels, 4-bit | over one row, MLX |"
    yield "|---|---:|---|---:|---:|---:|"
    for chip, rows, kind in product(DRAWN, ROWS, ("code", "chat")):
        chances = KINDS[kind].chances
        one = rounds(chip, 1, MLX, "4-bit").depths(chances)[0].tps
        cells = []
        for kernels in (MLX, OURS):
            of = rounds(chip, rows, kernels, "4-bit")
            cells.append(f"{of.speedup(chances):.2f} ({of.best(chances).tps:.0f})")
        ours = rounds(chip, rows, OURS, "4-bit").best(chances).tps / one
        yield f"| {chip} | {rows} | {kind} | {' | '.join(cells)} | {ours:.2f} |"
    yield WORDS


WORDS = """
## In words

- **bfloat16, 8 rows, M5: yes, for code.** On M5 chips MLX's kernels verify many positions on tensor
  units, and a plain step of 8 rows already reads two fifths of all experts, so a round costs
  little more: 2.2x from an acceptance of .86 to .88, which is what code has. 4 rows take .90 to
  .92.
- **bfloat16, M3 and M4, 4 to 8 rows: only for text that repeats itself.** It takes .91 to .95,
  between code (.86) and counting (.99).
- **4 bits: not with 4 to 8 rows of ordinary text, on any chip.** It takes .91 to 1.00, or cannot be
  reached. A quarter of the bytes leaves less waiting for drafts to fill. Code brings 1.4x to 1.7x
  over plain decoding of the same rows on M3 and later, chat 1.0x to 1.2x.
- **M1 and M2: no**, but for text that is drafted almost without an error: they compute a drafted
  position at nearly the price of a plain one.
- **Against one row the figure says little:** 8 rows without any drafts are more than 2.2 times one
  row on every chip from M3 on.
- Where every row waits for the worst one's acceptance, as in mlx-vlm 0.7.10, code keeps 2.2 of 3
  drafts with one row and .4 with eight: 2.2x is out of reach there whatever the chip.
"""


def draw(file: Path) -> None:
    """Draw the curves: a row of panels a format, a column a chip."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(FORMATS), len(DRAWN), figsize=(14, 7.6), sharex=True, sharey=True
    )
    at = [FIRST + (LAST - FIRST) * i / (STEPS - 1) for i in range(STEPS)]
    for (i, form), (j, chip) in product(enumerate(FORMATS), enumerate(DRAWN)):
        panel = panels[i][j]
        for rows, kernels in product(ROWS, NAMES):
            of = rounds(chip, rows, kernels, form)
            panel.plot(
                at,
                [of.speedup((chance,)) for chance in at],
                color=COLOURS[rows],
                linestyle="-" if kernels == OURS else "--",
                label=f"{rows} row{'s' * (rows > 1)}, {NAMES[kernels]}",
            )
        panel.axhline(RATIO, color="black", linewidth=1, linestyle=":")
        panel.axvspan(0.84, 0.88, color="0.85", zorder=0)
        panel.set_title(f"{chip}, {form}", fontsize=11)
        panel.set_ylim(0.9, 4)
        panel.set_xlim(FIRST, LAST)
        panel.grid(alpha=0.25)
        if j == 0:
            panel.set_ylabel("speed-up over plain decoding\nof the same rows, predicted")
        if i == len(FORMATS) - 1:
            panel.set_xlabel("acceptance: chance of each draft")
    panels[0][0].text(0.42, RATIO + 0.06, "2.2x", fontsize=10)
    panels[0][0].text(0.845, 3.6, "code", fontsize=9, rotation=90)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(ROWS), frameon=False)
    figure.suptitle(f"Predicted, not measured: {MODEL}, target and drafter in one format")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    """Predict and write."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join(report())
    (RESULTS / "reach.md").write_text(text.rstrip() + "\n")
    draw(RESULTS / "reach.png")
    print(text)


if __name__ == "__main__":
    main()
