"""What the kernels read and write, as their text is executed: the table of kernels/README.md.

    python -m bench.traffic [--models E4B 26B-A4B 31B] [--rows 1 4] [--length 4] [--context 1024]
                            [--shrink 64] [--out FILE]

Linux only: tests/metal executes what MLX would compile and counts every access. Prints Markdown.
"least" is what has to be read and written once: weights, or keys and values, and what comes in and
goes out. "touched" is how much of that and of intermediate results the launches do touch, each byte
once per launch. "loads" are accesses to weights, or keys and values, over their bytes: what a GPU's
caches see; beside it what MLX 0.32.4's kernels load, by its rules (dispatch.py), not measured, at
the full width, and what they write and read back on the way. Widths that sums do not run over are
divided by --shrink, as the sizes say; ratios do not depend on them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from bench.metal.cases import cases
from bench.metal.place import Case, Place
from gemma_mtp_mlx.chips import find
from gemma_mtp_mlx.dispatch import Call
from gemma_mtp_mlx.families import TEXTS
from tests.metal.executor import Record, executing
from tests.metal.toolchain import NO_COMPILER, find_compiler

SHOWN = ("M1 Max", "M3 Max", "M5 Max")
STREAMS = ("codes", "scales", "biases", "ordering")  # of weights
KEYS = ("keys", "values", "block_keys", "block_values", "storage", "block")


class Traffic(NamedTuple):
    """What a case does, in bytes; loads: accesses to its stream."""

    launches: int
    touched: int
    loads: int


def main() -> None:
    """Execute and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["E4B", "26B-A4B", "31B"], choices=TEXTS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--shrink", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None, help="write the figures to FILE, as JSON")
    args = parser.parse_args()
    if sys.platform != "linux" or find_compiler() is None:
        print(NO_COMPILER, file=sys.stderr)
        sys.exit(2)
    print(HEAD)
    found = []
    for model in args.models:
        for rows in args.rows:
            full = Place(model, rows, args.length, args.context)
            small = Place(model, rows, args.length, args.context, args.shrink)
            for case, real in zip(cases(small), cases(full), strict=True):
                found.append(record(case, real, measure(case)))
                print(row(found[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(case: Case) -> Traffic:
    """Execute a case once."""
    work = case.build()
    with executing() as executor:
        mx.eval(work.ours(work.x))
    launches = executor.launches
    touched = sum(launch.read + launch.written for launch in launches)
    return Traffic(len(launches), touched, sum(loads(launch, case) for launch in launches))


def loads(launch: Record, case: Case) -> int:
    """Bytes that a launch loads of the case's stream, each access counted."""
    streams = KEYS if case.kernel == "verify_attention" else STREAMS
    return sum(
        traffic.read_total
        for name, traffic in launch.traffic.items()
        if name.rstrip("012") in streams
    )


def record(case: Case, real: Case, found: Traffic) -> dict[str, Any]:
    """Return a case's figures. real: the same one without shrinking, for what MLX does."""
    theirs = {name: summed(real.theirs(find(name).gpu)) for name in SHOWN}
    return {
        "kernel": case.kernel,
        "where": case.what,
        "tokens": case.tokens,
        "launches": found.launches,
        "least": case.least,
        "touched": found.touched,
        "loads": found.loads / case.stream if case.stream else None,
        "mlx": {
            name: {
                "kernels": call.kernel,
                "loads": call.bytes / real.stream if call.bytes else None,
                "extra": call.extra_bytes / real.least,
            }
            for name, call in theirs.items()
        },
    }


def summed(calls: list[Call]) -> Call:
    """Return several calls as one."""
    kernels = ", ".join(dict.fromkeys(call.kernel for call in calls))
    return Call(
        kernels,
        sum(call.launches for call in calls),
        sum(call.passes for call in calls),
        sum(call.bytes for call in calls),
        sum(call.extra_bytes for call in calls),
    )


HEAD = """\
| kernel | where, as executed | M | launches | least | touched | loads | """
HEAD += " | ".join(f"MLX: {name}" for name in SHOWN) + " | written and read back |\n"
HEAD += "|---|---|---:|---:|---:|---:|---:|" + "---|" * len(SHOWN) + "---:|"


def row(found: dict[str, Any]) -> str:
    """Return a case's row. Bytes of what MLX writes and reads back: on an M3 Max, over least."""
    mlx = found["mlx"]
    parts = [
        found["kernel"],
        found["where"],
        found["tokens"],
        found["launches"],
        f"{found['least'] / 1e3:,.0f} kB",
        f"{found['touched'] / found['least']:.2f}",
        times(found["loads"]),
        *(f"{mlx[name]['kernels']} {times(mlx[name]['loads'])}".strip() for name in SHOWN),
        times(mlx["M3 Max"]["extra"] or None),
    ]
    return "| " + " | ".join(str(part) for part in parts) + " |"


def times(ratio: float | None) -> str:
    """Return a ratio, or nothing."""
    return "" if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    main()
