"""What the depth controller loses on a simulated clock: against the best fixed depth and to plain.

    python -m bench.regret [--seeds 0 1 2] [--only settled|short|shifts ...]

settled: every curve of tests/clock.py, acceptance and 1, 4, 8 rows, 300 rounds of which the first
100 do not count. short: the built-in pair on the CPU of results/compare.md, 192 tokens a row,
counted from the first round. shifts: the text changes after 150 rounds; counted from the change on.
Nothing here was measured on the chips that the curves are of. One JSON line comes last.
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np

from gemma_mtp_mlx.costs import Prior
from gemma_mtp_mlx.depth import AutoDepth
from tests.clock import ACCEPTANCE, COSTS, MOST, Segment, drive

DENSE, MOE = Prior(17.27, 0.24), Prior(1.34, 0.24, 0.1004, 128, 8)
CPU = Prior(11.3, 2.7)  # megabytes of the built-in pair
ROWS = (1, 4, 8)
ROUNDS, SETTLED = 300, 100
REGRET, SLOWER = 0.03, 0.01  # the bounds

# Milliseconds of a round with 0, 1, 3 and 7 drafts: compare.md, "by phase", the sum.
CPU_MS = {
    1: (21.52, 28.97, 38.09, 60.51),
    4: (28.78, 44.18, 73.52, 138.99),
    8: (38.29, 65.46, 125.52, 245.25),
}
# Chance of each draft, given those before it: compare.md, shares of rounds that kept each draft.
CPU_TEXTS = {
    "code": [0.81, 0.75, 0.82, 0.88, 0.89, 0.74, 0.90] + [0.85] * (MOST - 7),
    "chat": [0.79, 0.78, 0.84, 0.67, 0.83, 0.90, 0.85] + [0.85] * (MOST - 7),
}
SHORT_TOKENS = 192
SHORT_RUNS = 10  # a seed: a short run is mostly chance

SHIFT, SEEN = 150, 100  # rounds before the text changes, and then until it is settled again
SHIFTS = [
    ("JSON .08", "code .92, falling"),
    ("code .92, falling", "JSON .08"),
    (".88", "prose .49"),
    ("prose .49", ".88"),
    (".75", "prose .31"),
]
SHIFT_COSTS = [
    "31B M4 Max, roofline",
    "31B M5 Max, roofline",
    "26B-A4B M4 Max, roofline",
    "E4B M1 Max, roofline",
    "stock M3 Max",
    "31B M1 Ultra, mlxcel",
    "26B M5, oMLX",
]

Figures = dict[str, float]
Run = tuple[str, float, float]  # name, regret, slower than plain


def prior(cost: str) -> Prior:
    """Return the prior of the model that a curve is of."""
    return MOE if "26B" in cost else DENSE


def on_cpu(rows: int, k: int) -> float:
    """Return milliseconds of a round of the built-in pair; beyond 7 drafts as from 3 to 7."""
    ms = CPU_MS[rows]
    return float(np.interp(k, (0, 1, 3, 7, MOST), (*ms, ms[3] + (MOST - 7) * (ms[3] - ms[2]) / 4)))


def settled(seed: int) -> list[Run]:
    """Run every curve, acceptance and number of rows."""
    runs = []
    for cost in COSTS:
        for text, acceptance in ACCEPTANCE.items():
            for rows in ROWS:
                segments = [Segment(ROUNDS, acceptance, (rows,))]
                run = drive(AutoDepth(prior(cost)), COSTS[cost], segments, seed=seed)
                name = f"{cost}; {text}; {rows} rows; seed {seed}"
                runs.append((name, run.regret(SETTLED), run.slower_than_plain(SETTLED)))
    return runs


def short(seed: int) -> list[Run]:
    """Run the built-in pair on the CPU from the first round on."""
    runs = []
    for text, acceptance in CPU_TEXTS.items():
        for rows in ROWS:
            for number in range(seed * SHORT_RUNS, (seed + 1) * SHORT_RUNS):
                run = drive(
                    AutoDepth(CPU),
                    on_cpu,
                    [Segment(SHORT_TOKENS, acceptance, (rows,))],
                    seed=number,
                )
                stop = int(np.searchsorted(np.cumsum(run.tokens) / rows, SHORT_TOKENS)) + 1
                slower = run.slower_than_plain(0, stop)
                runs.append((f"{text}; {rows} rows", run.regret(0, stop), slower))
    return runs


def shifts(seed: int) -> list[tuple[str, float, float, float]]:
    """Change the text: regret in the first 40 rounds, the next 40, and once settled again."""
    runs = []
    for cost in SHIFT_COSTS:
        for rows in ROWS:
            for texts in SHIFTS:
                before, after = (ACCEPTANCE[text] for text in texts)
                segments = [Segment(SHIFT, before, (rows,)), Segment(2 * SEEN, after, (rows,))]
                run = drive(AutoDepth(prior(cost)), COSTS[cost], segments, seed=seed)
                windows = ((0, 40), (40, 80), (SEEN, 2 * SEEN))
                lost = [run.regret(SHIFT + start, SHIFT + stop) for start, stop in windows]
                runs.append((" > ".join(texts), *lost))
    return runs


def summary(regret: Sequence[float], slower: Sequence[float]) -> Figures:
    """Return the figures of a table's row."""
    return {
        "runs": len(regret),
        "mean": round(float(np.mean(regret)), 4),
        "p90": round(float(np.quantile(regret, 0.9)), 4),
        "max": round(max(regret), 4),
        "above_3": sum(value > REGRET for value in regret),
        "slower_than_plain_by_1": sum(value > SLOWER for value in slower),
        "slowest": round(max(slower), 4),
    }


def show_settled(seeds: Sequence[int], worst: int) -> dict[str, Figures]:
    """Print how the settled runs did."""
    print("\n## Settled: regret, and slower than plain\n")
    print("| seed | runs | mean | p90 | max | above 3 % | slower by 1 % | slowest |")
    print("|---|" + "---:|" * 7)
    runs: list[Run] = []
    figures = {}
    for seed in (*seeds, None):
        new = settled(seed) if seed is not None else []
        runs += new
        label, of = ("all", runs) if seed is None else (str(seed), new)
        row = summary([run[1] for run in of], [run[2] for run in of])
        figures[label] = row
        cells = [f"{row[key]:.2%}" for key in ("mean", "p90", "max")]
        cells += [f"{row['above_3']:.0f}", f"{row['slower_than_plain_by_1']:.0f}"]
        print(f"| {label} | {len(of)} | {' | '.join(cells)} | {row['slowest']:.2%} |", flush=True)
    for title, column, bound in (("regret", 1, REGRET), ("slower than plain", 2, SLOWER)):
        print(f"\nWorst by {title}:")
        ranked = sorted(runs, key=lambda run: -float(run[column]))
        for run in [run for run in ranked if float(run[column]) > bound][:worst]:
            print(f"- {float(run[column]):.2%}  {run[0]}")
    return figures


def show_short(seeds: Sequence[int]) -> dict[str, Figures]:
    """Print how the short runs did."""
    print(f"\n## Short: {SHORT_TOKENS} tokens a row on a CPU, from the first round\n")
    print("| text | runs | lost | p90 | max |\n|---|" + "---:|" * 4)
    by_name: dict[str, list[Run]] = {}
    for run in (run for seed in seeds for run in short(seed)):
        by_name.setdefault(run[0], []).append(run)
    figures = {}
    for name, runs in by_name.items():
        row = summary([run[1] for run in runs], [run[2] for run in runs])
        figures[name] = row
        cells = " | ".join(f"{row[key]:.2%}" for key in ("mean", "p90", "max"))
        print(f"| {name} | {len(runs)} | {cells} |")
    return figures


def show_shifts(seeds: Sequence[int]) -> dict[str, list[float]]:
    """Print how a change of text was followed."""
    print(f"\n## Shifts: regret after the change, and from round {SEEN} on\n")
    print("| text | runs | 0 to 40 | 40 to 80 | settled | above 3 % |\n|---|" + "---:|" * 5)
    by_name: dict[str, list[tuple[float, ...]]] = {}
    for name, *lost in (run for seed in seeds for run in shifts(seed)):
        by_name.setdefault(name, []).append(tuple(lost))
    figures = {}
    for name, runs in by_name.items():
        means = [float(np.mean([run[window] for run in runs])) for window in range(3)]
        above = sum(run[2] > REGRET for run in runs)
        figures[name] = [*(round(mean, 4) for mean in means), above]
        cells = " | ".join(f"{mean:.2%}" for mean in means)
        print(f"| {name} | {len(runs)} | {cells} | {above} |")
    return figures


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worst", type=int, default=15, help="cases to name")
    parts = ["settled", "short", "shifts"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    found: dict[str, object] = {"what": "simulated, not measured", "seeds": args.seeds}
    if "settled" in args.only:
        found["settled"] = show_settled(args.seeds, args.worst)
    if "short" in args.only:
        found["short"] = show_short(args.seeds)
    if "shifts" in args.only:
        found["shifts"] = show_shifts(args.seeds)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
