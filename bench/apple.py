"""README's table of what was measured on Apple GPUs, from the reports that Macs' owners gave.

    python -m bench.apple [--check]

Reads bench/results/*/report.json, as `mlx-gemma-mtp report` writes them, and puts those of Apple
GPUs between two markers in README.md. With --check nothing is written; it ends with 1 if README
differs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.peers.figures import markdown

ROOT = Path(__file__).parents[1]
RESULTS, README = Path("bench/results"), Path("README.md")
BEGIN, END = "<!-- apple results: python -m bench.apple -->", "<!-- end -->"
NONE = """\
There are none yet. `mlx-gemma-mtp report` measures a pair on your Mac and writes a folder with the
figures, plots and a page, which does not say whose Mac it is: please attach it to an issue."""
HEAD = ["chip", "model", "prompts", "rows", "plain", "best fixed", "auto", "auto / plain", "report"]
SAYS = (
    "Measured, in tokens per second of all rows once every row has its first token, medians of "
    "alternating runs; the ratio is taken run by run."
)


def main() -> None:
    """Write README's table, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if README differs")
    args = parser.parse_args()
    file = ROOT / README
    before = file.read_text("utf-8")
    after = filled(before, ROOT)
    if not args.check:
        file.write_text(after, "utf-8")
    elif after != before:
        sys.exit("README.md has other Apple results than bench/results: run python -m bench.apple")


def filled(readme: str, root: Path) -> str:
    """Return README with what the reports below a folder say between the markers."""
    before, found, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{results(root)}\n{END}{after}"


def results(root: Path) -> str:
    """Return the table of reports of Apple GPUs, or that there are none."""
    rows = []
    for file in sorted((root / RESULTS).glob("*/report.json")):
        report = json.loads(file.read_text("utf-8"))
        if report["apple_gpu"]:
            link = f"[{report['date']}]({file.parent.relative_to(root).as_posix()}/README.md)"
            rows += [[*_cells(report, each), link] for each in report["measured"]]
    return f"{SAYS}\n\n{markdown([HEAD, *rows])}" if rows else NONE


def _cells(report: dict[str, Any], each: dict[str, Any]) -> list[str]:
    machine, speeds = report["machine"], {speed["depth"]: speed for speed in each["speeds"]}
    cores = f", {machine['gpu_cores']} GPU cores" if machine["gpu_cores"] else ""
    plain, auto = speeds.get(0), speeds.get(None)
    fixed = [speed for depth, speed in speeds.items() if depth]
    best = max(fixed, key=lambda speed: speed["tokens_per_s"]["median"], default=None)
    return [
        f"{machine['gpu']}{cores}, {machine['memory_gb']:g} GB",
        f"{report['target']['name']}, {report['target']['bits_per_weight']:.1f} bits",
        each["kind"],
        str(each["rows"]),
        _rate(plain),
        "-" if best is None else f"{_rate(best)} ({best['depth']})",
        _rate(auto),
        "-" if auto is None or auto["ratio"] is None else f"{auto['ratio']['median']:.2f}",
    ]


def _rate(speed: dict[str, Any] | None) -> str:
    return "-" if speed is None else f"{speed['tokens_per_s']['median']:.1f}"


if __name__ == "__main__":
    main()
