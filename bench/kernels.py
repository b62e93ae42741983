"""Each kernel on this Mac's GPU, beside MLX's own operations and the time its bytes take.

    python -m bench.kernels [--models E4B 26B-A4B 31B] [--rows 1] [--lengths 1 4 8 16]
                            [--context 4096] [--kernels verify_matmul ...] [--gbps 546]
                            [--calls 20] [--repeats 7] [--out FILE]

Sizes are the models'. The ceiling, bytes that have to be moved over the memory's bandwidth, is
printed before anything is measured: by the chip's name, or as --gbps says (M3 Max and M4 Max are
sold with two bandwidths; the larger one is assumed). A time is that of one call in a chain in which
every call needs the one before it, over copies of the weights that do not fit the caches, less what
the link between two calls takes; medians of the repeats after two that do not count, ours and MLX's
in turn, with the spread. One JSON line comes last. Without a Metal GPU it says so and exits with 2.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import mlx.core as mx

from bench.metal.cases import cases
from bench.metal.place import Case, Op, Place, Work
from gemma_mtp_mlx.device import fused
from gemma_mtp_mlx.families import TEXTS

# GB/s by the end of the device's name. Source: Apple's specifications, and Hugging Face's
# hardware.ts (hf.js PR 1044) for the M5.
GBPS = {
    **{"M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800},
    **{"M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800},
    **{"M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819},
    **{"M4": 120, "M4 Pro": 273, "M4 Max": 546},
    **{"M5": 153, "M5 Max": 614},
}
BEYOND_CACHES = 256e6  # bytes that the copies of a case have at least, if there are not too many
MOST_COPIES = 16
WARM_UP = 2  # repeats


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["E4B", "26B-A4B", "31B"], choices=TEXTS)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--kernels", nargs="+", default=None, help="only these")
    parser.add_argument("--gbps", type=float, default=None, help="the memory's bandwidth, GB/s")
    parser.add_argument("--calls", type=int, default=20, help="of a chain")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="write the figures to FILE, as JSON")
    args = parser.parse_args()
    if not mx.metal.is_available():
        refuse("bench.kernels measures on a Metal GPU, and MLX finds none here")
    device = str(mx.device_info()["device_name"])
    gbps = args.gbps or bandwidth(device)
    if gbps is None:
        refuse(f"no bandwidth is known for {device}: give it, as --gbps")
    print(f"{device}, {gbps:.0f} GB/s, MLX {mx.__version__}, medians of {args.repeats}")
    places = [
        Place(model, args.rows, length, args.context)
        for model in args.models
        for length in args.lengths
    ]
    found = []
    for case in (case for place in places for case in cases(place)):
        if args.kernels is None or case.kernel in args.kernels:
            print(ceiling(case, gbps), flush=True)
            found.append({**facts(case, gbps), **measure(case, args.calls, args.repeats)})
            print(result(found[-1]), flush=True)
    record = {
        "device": device,
        "gbps": gbps,
        "mlx": mx.__version__,
        "command": " ".join(["python -m bench.kernels", *sys.argv[1:]]),
        "cases": found,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def refuse(why: str) -> NoReturn:
    """Say why nothing is measured, and leave."""
    print(why, file=sys.stderr)
    sys.exit(2)


def bandwidth(device: str) -> float | None:
    """Return the GB/s of a device by its name, as in "Apple M4 Pro"."""
    return GBPS.get(device.removeprefix("Apple "))


def facts(case: Case, gbps: float) -> dict[str, Any]:
    """Return what is known of a case before it is measured."""
    return {
        "kernel": case.kernel,
        "where": case.what,
        "tokens": case.tokens,
        "least_bytes": case.least,
        "ceiling_ms": case.least / gbps / 1e6,
    }


def ceiling(case: Case, gbps: float) -> str:
    """Return what a case takes at least, in words."""
    known = facts(case, gbps)
    return (
        f"{case.kernel}: {case.what}, M = {case.tokens}: {case.least / 1e6:.2f} MB, "
        f"at least {known['ceiling_ms']:.4f} ms"
    )


def measure(case: Case, calls: int, repeats: int) -> dict[str, Any]:
    """Time ours and MLX's in turn. Returns milliseconds of a call, and what the link took."""
    copies = [case.build() for _ in range(copy_count(case))]
    sides = {
        "link": [lambda x: [x] for _ in copies],
        "ours": [work.ours for work in copies],
        "mlx": [work.mlx for work in copies],
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(WARM_UP + repeats):
        for side, ops in sides.items():
            began = time.perf_counter()
            mx.eval(chain(ops, copies, calls))
            spent = 1e3 * (time.perf_counter() - began) / calls
            if repeat >= WARM_UP:
                times[side].append(spent)
    link = median(times["link"])
    return {
        "link_ms": link,
        "ours_ms": spread([ms - link for ms in times["ours"]]),
        "mlx_ms": spread([ms - link for ms in times["mlx"]]),
    }


def copy_count(case: Case) -> int:
    """Return how many copies of a case are gone through."""
    return max(2, min(MOST_COPIES, -(-int(BEYOND_CACHES) // case.least)))


def chain(ops: Sequence[Op], copies: Sequence[Work], calls: int) -> mx.array:
    """Build calls that go through the copies, each on what the one before it has computed."""
    x = copies[0].x
    for call in range(calls):
        x = link(x, ops[call % len(ops)](x))
    return x


def link(x: mx.array, results: Sequence[mx.array]) -> mx.array:
    """Return x, once all of the results are there: an element of the first is added, as nothing."""
    first = _with_nothing(x, results[0].reshape(-1)[:1])
    (after,) = mx.depends([first], list(results))
    return after


@fused
def _with_nothing(x: mx.array, y: mx.array) -> mx.array:
    return x + (0 * y).astype(x.dtype)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and the least and the most."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def result(found: dict[str, Any]) -> str:
    """Return a case's times, in words."""
    ours, mlx = found["ours_ms"], found["mlx_ms"]
    parts = [
        f"{name} {ms['median']:.4f} ms ({ms['least']:.4f} to {ms['most']:.4f})"
        for name, ms in (("ours", ours), ("MLX", mlx))
    ]
    share, ratio = found["ceiling_ms"] / ours["median"], mlx["median"] / ours["median"]
    return f"    {', '.join(parts)}: {share:.0%} of the ceiling, {ratio:.2f} times MLX's speed"


if __name__ == "__main__":
    main()
