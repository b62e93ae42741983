"""Medians, spreads, ratios run by run, and the tables made of them."""

from statistics import median
from typing import Any

from gemma_mtp_mlx.measure import Spread

Run = dict[str, Any]
Rows = list[list[str]]
HEADINGS = (
    "contender",
    "tokens/s",
    "low to high",
    "end to end",
    "x mlx_lm",
    "low to high",
    "x mlx_vlm",
    "low to high",
    "tokens/round",
    "accepted",
    "equal rows",
)
NONE = "-"


def cells(spread: Spread, digits: int) -> list[str]:
    """Return the median and the range as text."""
    return [f"{spread.median:.{digits}f}", f"{spread.least:.{digits}f} to {spread.most:.{digits}f}"]


def faster_ways(runs: dict[tuple[str, str], list[Run]]) -> dict[str, tuple[str, list[Run]]]:
    """Return of each contender the way whose median is higher, and its runs."""
    chosen: dict[str, tuple[str, list[Run]]] = {}
    for (name, way), done in runs.items():
        if name not in chosen or _median_tps(done) > _median_tps(chosen[name][1]):
            chosen[name] = (way, done)
    return chosen


def _median_tps(runs: list[Run]) -> float:
    return median(run["decode_tps"] for run in runs)


def ratios(runs: list[Run], baseline: list[Run], key: str = "decode_tps") -> Spread:
    """Divide each run by the baseline's run of the same repeat."""
    return Spread.of([ours[key] / its[key] for ours, its in zip(runs, baseline, strict=True)])


def equal_rows(run: Run, reference: Run) -> tuple[int, int]:
    """Return how many rows have the reference's tokens, and of how many."""
    pairs = list(zip(run["tokens"], reference["tokens"], strict=True))
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)


def first_difference(run: Run, reference: Run) -> int | None:
    """Return the first position at which a row has another token, None if none has."""
    found = [
        position
        for ours, theirs in zip(run["tokens"], reference["tokens"], strict=True)
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if a != b
    ]
    return min(found, default=None)


def tokens_per_round(run: Run) -> float | None:
    """Return the tokens a row gets in a round, the bonus included; None without drafts."""
    if run["drafting"] is None or not run["drafting"]["drafted"]:
        return None
    after_first = sum(len(row) - 1 for row in run["tokens"])
    return after_first / run["drafting"]["rounds"]


def summarise(runs: dict[tuple[str, str], list[Run]]) -> dict[str, Any]:
    """Summarise a cell's runs by contender, in the order they came."""
    chosen = faster_ways(runs)
    reference = next((done for name, (_, done) in chosen.items() if name.startswith("ours")), None)
    summary: dict[str, Any] = {}
    for name, (way, done) in chosen.items():
        last = done[-1]
        drafting = last["drafting"]
        per_round = tokens_per_round(last)
        summary[name] = {
            "way": way,
            "decode_tps": Spread.of([run["decode_tps"] for run in done]),
            "total_tps": Spread.of([run["total_tps"] for run in done]),
            "first_token_s": Spread.of([run["first_token_s"] for run in done]),
            "vs": {
                base: ratios(done, chosen[base][1])
                for base in ("mlx_lm", "mlx_vlm")
                if base in chosen and base != name
            },
            "tokens_per_round": per_round,
            "accepted": None if per_round is None else drafting["accepted"] / drafting["drafted"],
            "drafting": drafting,
            "equal": None if reference is None else equal_rows(last, reference[-1]),
            "first_difference": None
            if reference is None
            else first_difference(last, reference[-1]),
        }
    return summary


def table(summary: dict[str, Any], skipped: dict[str, str]) -> Rows:
    """Return a cell's table as text, headings first; skipped contenders get a row each."""
    rows = [list(HEADINGS)]
    for name, of in summary.items():
        row = [name, *cells(of["decode_tps"], 1), f"{of['total_tps'].median:.1f}"]
        for base in ("mlx_lm", "mlx_vlm"):
            row += cells(of["vs"][base], 2) if base in of["vs"] else [NONE, NONE]
        row.append(NONE if of["tokens_per_round"] is None else f"{of['tokens_per_round']:.2f}")
        row.append(NONE if of["accepted"] is None else f"{of['accepted']:.2f}")
        row.append(NONE if of["equal"] is None else "{} of {}".format(*of["equal"]))
        rows.append(row)
    for name, reason in skipped.items():
        rows.append([name, f"skipped: {reason}"])
    return rows


def acceptance_table(by_category: dict[str, dict[str, Any]]) -> Rows:
    """Return how often each draft was emitted, by category and position."""
    longest = max(len(drafting["by_position"]) for drafting in by_category.values())
    rows = [["prompts", *(f"draft {i + 1}" for i in range(longest)), "tokens/round", "rounds"]]
    for category, drafting in by_category.items():
        shares = [f"{count / drafting['rounds']:.2f}" for count in drafting["by_position"]]
        shares += [NONE] * (longest - len(shares))
        per_round = 1 + drafting["accepted"] / drafting["rounds"]
        rows.append([category, *shares, f"{per_round:.2f}", str(drafting["rounds"])])
    return rows


def rounds_table(rounds: list[dict[str, Any]]) -> Rows:
    """Return a round's milliseconds by phase, one row per batch and depth."""
    phases = list(rounds[0]["ms"])
    rows = [["batch", "drafts", *phases, "sum"]]
    for of in rounds:
        spent = [of["ms"][phase] for phase in phases]
        numbers = [f"{ms:.2f}" for ms in [*spent, sum(spent)]]
        rows.append([str(of["batch"]), str(of["k"]), *numbers])
    return rows


def plain(rows: Rows) -> str:
    """Lay a table out for a terminal. A row with fewer cells than headings is not aligned."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(cell) for cell in column) for column in zip(*full, strict=True)]
    lines = []
    for row in rows:
        if len(row) < len(widths):
            lines.append(row[0].ljust(widths[0]) + "  " + " ".join(row[1:]))
            continue
        columns = [row[0].ljust(widths[0])]
        columns += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(columns))
    return "\n".join(lines)


def markdown(rows: Rows) -> str:
    """Lay a table out as Markdown."""
    width = len(rows[0])
    lines = [rows[0], ["---", *["---:"] * (width - 1)], *rows[1:]]
    padded = [[*line, *[""] * (width - len(line))] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)
