"""How well the cost model meets published measurements, and the constants that are fitted to them.

    python -m bench.calibrate             fits, writes bench/results/calibration.md, .json and .png

bench/published.py says how records are split in halves, which was chosen before anything was
fitted. Fitted are the five constants of FITTED, to the mean absolute logarithm of predicted over
published, of speed-ups, of plain tokens per second and of points of curves alike; by a search from
coarse to fine from several starts, on the fit half alone. Held-out records only give the report.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from bench.published import Case, Half, halves, published
from gemma_mtp_mlx.prediction import CONSTANTS, Constants

RESULTS = Path(__file__).parent / "results"
# What is fitted, and from where the search starts: plain guesses, two for what is least known.
FITTED: dict[str, tuple[float, ...]] = {
    "vector": (0.2, 0.5),
    "vector_old": (0.2,),
    "decode": (0.5, 1.0),
    "decode_fp": (1.0,),
    "launch_s": (5e-6,),
}


def loss(half: Half, constants: Constants) -> float:
    """Return the mean absolute logarithm, of ratios and of plain tokens per second alike."""
    errors = half.errors(constants) + half.plain_errors(constants)
    return sum(map(abs, errors)) / len(errors)


def fit(half: Half) -> Constants:
    """Return the constants of the least loss of all starts, to three digits."""
    starts = product(*FITTED.values())
    found = [_descend(half, dict(zip(FITTED, start, strict=True))) for start in starts]
    best = min(found, key=lambda constants: loss(half, constants))
    return replace(best, **{name: float(f"{getattr(best, name):.3g}") for name in FITTED})


def _descend(half: Half, start: dict[str, float]) -> Constants:
    best = replace(CONSTANTS, **start)
    least = loss(half, best)
    for step in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
        moved = True
        while moved:
            moved = False
            for tried in _neighbours(best, step):
                if (lower := loss(half, tried)) < least - 1e-9:
                    best, least, moved = tried, lower, True
                    break
    return best


def _neighbours(constants: Constants, step: float) -> Iterator[Constants]:
    """Yield constants that differ in one by a factor, or in all that say what arithmetic costs.

    Quicker multiplications and dearer decoding change little together, so they have to move so.
    """
    for factor in (1 + step, 1 / (1 + step)):
        for name in FITTED:
            yield replace(constants, **{name: factor * getattr(constants, name)})
        together = {name: factor * getattr(constants, name) for name in ("vector", "vector_old")}
        for name in ("decode", "decode_fp"):
            together[name] = max(0.0, factor * (1 + getattr(constants, name)) - 1)
        yield replace(constants, **together)


def shares(logarithms: Sequence[float]) -> list[float]:
    """Return how far off they are, as shares: .1 for 10 % too much, -.1 for 10 % too little."""
    return [math.exp(error) - 1 for error in logarithms]


def summary(errors: Sequence[float]) -> dict[str, float]:
    """Return number, median, 90th percentile and greatest of the absolute errors."""
    sizes = sorted(abs(error) for error in errors)
    if not sizes:
        return {"count": 0}
    p90 = sizes[math.ceil(0.9 * len(sizes)) - 1]
    return {
        "count": len(sizes),
        "median": round(statistics.median(sizes), 4),
        "p90": round(p90, 4),
        "worst": round(sizes[-1], 4),
    }


def summaries(half: Half, constants: Constants) -> dict[str, dict[str, float]]:
    """Return the errors of a half: of speed-ups, with and without tabled acceptance, and others."""
    of = [(case, case.error(constants)) for case in half.cases]
    curves = [e for curve in half.curves for e in curve.errors(constants)]
    by_source: dict[str, list[float]] = {}
    for case, error in of:
        by_source.setdefault(case.record["source"], []).append(abs(math.exp(error) - 1))
    return {
        "speed-up": summary(shares([e for _, e in of])),
        "speed-up, acceptance published": summary(shares([e for c, e in of if not c.tabled])),
        "speed-up, acceptance from the table": summary(shares([e for c, e in of if c.tabled])),
        "speed-up, median of each source": summary(
            [statistics.median(errors) for errors in by_source.values()]
        ),
        "plain tokens per second": summary(shares(half.plain_errors(constants))),
        "points of curves": summary(shares(curves)),
    }


CAVEATS = """\
Whole sources are held out, by the hash of their link, so no held-out row shares a plain run with
one that constants were fitted to. The model was developed on the fit half and predictions for the
held-out half were looked at once, at the end; its published figures were known, since they had to
be entered. One rule, that MLX multiplies by bfloat16 weights in tiles of 64 rows, was looked
up because a held-out row (31B, 4 rows) was so slow; all others came from MLX's source, or from rows
of the fit half.
"""
# Why the worst are: by a part of the source's link, and of the model's name.
WHY = (
    (
        "mlx-vlm/pull/1155",
        "",
        "for prompts of mixed lengths mlx-vlm's drafter runs row by row, up to 36 steps a round at "
        "12 rows (documented of 0.7.10); the model has one drafter for all rows. Acceptance with 8 "
        "and 12 rows is not published",
    ),
    (
        "Blaizzy/mlx-vlm",
        "26B-A4B",
        "acceptance is not published; prompts of 17 tokens, the same for all rows, choose the same "
        "experts, which makes passes of a batch cheaper than is counted",
    ),
    ("Blaizzy/mlx-vlm", "", "acceptance is not published"),
    (
        "rMLX",
        "26B-A4B",
        "its rounds cost 4.5 to 5 plain steps, which reading each expert once and decoding it once "
        "for every token does not explain; MLX's gather kernels may reach less of the bandwidth "
        "with more pairs, which is not in the model",
    ),
    (
        "rMLX",
        "",
        "five positions attend over very long contexts; the parts of that are not measured",
    ),
    (
        "mlxcel/blob/main/docs/benchmarks",
        "",
        "on M1 Ultra: one share of the arithmetic stands for M1 and M2, fitted to a 31B model "
        "there and 26B-A4B on other M1; at 12 rows MLX goes over to GEMM tiles, which may be "
        "slower on M1 than is assumed",
    ),
    (
        "mlxcel/pull/744",
        "",
        "acceptance (.35, a prompt of 14 tokens) and speed-up may be of different prompts: "
        "together they would make a round of three drafts 1.19 plain steps, less than elsewhere",
    ),
)


def explanation(case: Case) -> str:
    """Return why a case may be off, in words."""
    source, model = case.record["source"], case.record["model"]
    return next((why for link, name, why in WHY if link in source and name in model), "")


def as_json(data: dict[str, Any], both: tuple[Half, Half], constants: Constants) -> dict[str, Any]:
    """Return everything for calibration.json."""
    return {
        "command": "python -m bench.calibrate",
        "what": "predicted speed-ups beside published ones; nothing was measured by this project",
        "constants": asdict(constants),
        "errors": {
            name: summaries(half, constants)
            for name, half in zip(("fit", "held out"), both, strict=True)
        },
        "unusable": sum(not r["usable"] for r in data["rounds"]),
        "rows": [
            {
                "half": name,
                **{k: case.record[k] for k in ("source", "runtime", "chip", "model", "bits")},
                **{k: case.record[k] for k in ("rows", "k", "prompts", "context")},
                "tokens_per_round": round(case.tokens, 2),
                "acceptance_from_table": case.tabled,
                "plain_tps": case.record["plain_tps"],
                "predicted_plain_tps": round(case.plain_tps(constants), 1),
                "speedup": case.record["speedup"],
                "predicted_speedup": round(case.speedup(constants), 2),
            }
            for name, half in zip(("fit", "held out"), both, strict=True)
            for case in half.cases
        ],
        "curves": [
            {
                "half": name,
                **{k: curve.record[k] for k in ("source", "chip", "qmv_wide", "model", "note")},
                "ratios": {
                    rows: {"predicted": round(a, 2), "published": round(b, 2)}
                    for rows, (a, b) in curve.ratios(constants).items()
                },
            }
            for name, half in zip(("fit", "held out"), both, strict=True)
            for curve in half.curves
        ],
    }


def report(data: dict[str, Any], both: tuple[Half, Half], constants: Constants) -> Iterator[str]:
    """Yield calibration.md."""
    found = as_json(data, both, constants)
    yield "# Predicted against published\n"
    yield (
        "Written by `python -m bench.calibrate`. Every speed-up of drafting over plain decoding "
        "that was published for\nGemma 4 on MLX and can be used, beside what the cost model of "
        "`mlx-gemma-mtp predict` says for that runtime, chip,\nformat, number of rows and K. "
        "**Nothing here was measured by this project.** Records, links and the rule for what\nis "
        f"usable are in [published.json](../published.json); {found['unusable']} of "
        f"{len(data['rounds'])} records are not usable, each with its reason.\n"
    )
    yield f"> {data['rule']}\n"
    yield CAVEATS
    yield "![predicted against published](calibration.png)\n"
    yield "| absolute error | half | records | median | 90 % within | worst |"
    yield "|---|---|---:|---:|---:|---:|"
    for name, errors in found["errors"].items():
        for what, of in errors.items():
            if of["count"]:
                yield (
                    f"| {what} | {name} | {of['count']} | {of['median']:.1%} | {of['p90']:.1%} "
                    f"| {of['worst']:.1%} |"
                )
    yield "\n## Constants\n"
    yield "| constant | value | |\n|---|---:|---|"
    for name, value in asdict(constants).items():
        how = "fitted" if name in FITTED else "assumed"
        yield f"| {name} | {value:.3g} | {how} |"
    yield "\nWhat each is: `Constants` in [prediction.py](../../gemma_mtp_mlx/prediction.py)."
    yield "\n## The worst\n"
    for case in sorted(_all(both), key=lambda c: -abs(c.error(constants)))[:8]:
        r = case.record
        yield (
            f"- [{r['runtime']}]({r['source']}), {r['chip']}, {r['model']} {r['bits']}, B = "
            f"{r['rows']}, K = {r['k']}: predicted {case.speedup(constants):.2f}, published "
            f"{r['speedup']:.2f}. Why: {explanation(case) or 'not known'}."
        )
    yield "\n## All rows\n"
    yield (
        "tau: tokens per row and round, `*` from the table of prompts because the source gives no "
        "acceptance. tok/s is plain decoding, of all rows.\n"
    )
    yield (
        "| half | runtime | chip | model | bits | B | K | context | tau | tok/s published "
        "| predicted | speed-up published | predicted | error |"
    )
    yield "|---|---|---|---|---|" + "---:|" * 9
    yield from _rows(found)
    yield "\n## Curves\n"
    yield "What a pass of so many rows takes over one row: predicted / published.\n"
    yield "| half | source | chip | rows: predicted / published |\n|---|---|---|---|"
    for curve in found["curves"]:
        points = ", ".join(
            f"{rows}: {at['predicted']:.2f} / {at['published']:.2f}"
            for rows, at in curve["ratios"].items()
        )
        name = "/".join(curve["source"].split("/")[-4:])
        yield f"| {curve['half']} | [{name}]({curve['source']}) | {curve['chip']} | {points} |"


def _rows(found: dict[str, Any]) -> Iterator[str]:
    for row in found["rows"]:
        error = row["predicted_speedup"] / row["speedup"] - 1
        star = "*" if row["acceptance_from_table"] else ""
        plain = "" if row["plain_tps"] is None else f"{row['plain_tps']:.1f}"
        yield (
            f"| {row['half']} | [{row['runtime']}]({row['source']}) | {row['chip']} "
            f"| {row['model']} | {row['bits']} | {row['rows']} | {row['k']} "
            f"| {row['context'] or 'short'} | {row['tokens_per_round']:.2f}{star} | {plain} "
            f"| {row['predicted_plain_tps']:.1f} | {row['speedup']:.2f} "
            f"| **{row['predicted_speedup']:.2f}** | {error:+.0%} |"
        )


def _all(both: tuple[Half, Half]) -> list[Case]:
    return [case for half in both for case in half.cases]


MARKERS = {"mlxcel": "o", "mlx-vlm": "s", "rMLX": "^", "oMLX": "D", "Ollama": "*"}
COLOURS = dict(zip(MARKERS, ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#8d6a9f"), strict=True))


def draw(both: tuple[Half, Half], constants: Constants, file: Path) -> None:
    """Draw predicted against published: speed-ups, and plain tokens per second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    figure, panels = plt.subplots(1, 2, figsize=(12.5, 6.4))
    what = ("speed-up of drafting over plain decoding", "plain decoding, tokens per second")
    ticks = ((0.4, 0.6, 0.8, 1, 1.5, 2, 3, 4), (5, 10, 20, 50, 100, 200))
    for i, panel in enumerate(panels):
        for half, held in zip(both, (False, True), strict=True):
            for case in half.cases:
                r = case.record
                x = r["plain_tps"] if i else r["speedup"]
                y = case.plain_tps(constants) if i else case.speedup(constants)
                if x is None:
                    continue
                colour = COLOURS[r["runtime"]]
                panel.plot(
                    x,
                    y,
                    MARKERS[r["runtime"]],
                    color=colour,
                    markerfacecolor=colour if held else "none",
                    markersize=11 if r["runtime"] == "Ollama" else 7,
                    alpha=0.85,
                )
        panel.set_xscale("log")
        panel.set_yscale("log")
        ends = (0.35, 4.0) if i == 0 else (5, 220)
        for factor, style in ((1, "-"), (1.15, ":"), (1 / 1.15, ":")):
            panel.plot(ends, [factor * end for end in ends], style, color="0.4", linewidth=1)
        panel.set_xlim(*ends)
        panel.set_ylim(*ends)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(FixedLocator(ticks[i]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(f"{what[i]}, published (measured by others)")
        panel.set_ylabel(f"{what[i]}, predicted")
        panel.grid(alpha=0.25)
    handles = [
        Line2D([], [], linestyle="", marker=m, color=COLOURS[name], label=name)
        for name, m in MARKERS.items()
    ]
    handles += [
        Line2D([], [], linestyle="", marker="o", color="0.3", label="held out"),
        Line2D(
            [], [], linestyle="", marker="o", color="0.3", markerfacecolor="none", label="fitted to"
        ),
        Line2D([], [], linestyle="-", color="0.4", label="equal"),
        Line2D([], [], linestyle=":", color="0.4", label="15 % more or less"),
    ]
    panels[0].legend(handles=handles, loc="upper left", fontsize=9)
    figure.suptitle("Gemma 4 with MTP on Apple GPUs: predicted against published")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    """Fit, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.parse_args()
    data = published()
    both = halves(data)
    constants = fit(both[0])
    if constants != CONSTANTS:
        print(f"the package has other constants: {constants}")
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join(report(data, both, constants)) + "\n"
    (RESULTS / "calibration.md").write_text(text)
    record = json.dumps(as_json(data, both, constants), indent=1)
    (RESULTS / "calibration.json").write_text(record + "\n")
    draw(both, constants, RESULTS / "calibration.png")
    print(text[: text.index("## All rows")])


if __name__ == "__main__":
    main()
