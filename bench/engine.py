"""Requests that arrive whenever they like: how long they wait, how fast they come, what gets done.

    python -m bench.engine [--model DIR] [--rate 1.0] [--requests 40] [--batch 8] [--repeats 3]
                           [--runs ours-auto ours-k0 mlx_lm] [--out bench/results/engine]

Open loop: arrivals are a Poisson process (one seed, the same for all contenders) and do not wait
for anybody; prompts and answers have mixed lengths. Each contender runs in a process of its own, in
turn. Reported per contender, medians over the repeats with their spread: time to first token and
time between tokens (p50, p95; tokens that come together count as one gap and the rest as none),
and generated tokens per second from the first arrival to the last token. mlx_lm is its
BatchGenerator, without a drafter. One JSON line comes last.
"""

import argparse
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from bench.peers.prompts import encode_prompts
from gemma_mtp_mlx import SamplingParams, hub, load
from gemma_mtp_mlx.prompt_kinds import KINDS

FIGURES = ("ttft_p50_s", "ttft_p95_s", "gap_p50_s", "gap_p95_s", "tokens_per_s")


def main() -> None:
    """Run all contenders in turn, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="a folder; default: the built-in pair")
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals per second")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", nargs="+", default=["ours-auto", "ours-k0", "mlx_lm"])
    parser.add_argument("--out", type=Path, default=None, help="writes OUT.json")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = Path(args.model or hub.builtin())
    if args.worker is not None:
        print(json.dumps(worker(args.worker, model, args)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.runs}
    for repeat in range(args.repeats):
        for name in args.runs if repeat % 2 else reversed(args.runs):
            command = [sys.executable, "-m", "bench.engine", *sys.argv[1:], "--worker", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {show(runs[name][-1:])}", file=sys.stderr)
    print(f"{args.requests} requests at {args.rate} per second, at most {args.batch} rows")
    print(f"{platform.machine()} {platform.system()}, medians of {args.repeats} (least to most)")
    for name, found in runs.items():
        print(f"{name:<10} {show(found)}")
    record = {"arguments": vars(args) | {"out": str(args.out)}, "runs": runs}
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def show(runs: list[dict[str, float]]) -> str:
    """Return the figures of several runs in one line."""
    parts = []
    for figure in FIGURES:
        values = [run[figure] for run in runs]
        spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
        parts.append(f"{figure} {median(values):.3g}{spread}")
    return "  ".join(parts)


def worker(name: str, model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run one contender once."""
    arrivals = Load(model, args)
    if name.startswith("ours"):
        stamps = ours(name, model, arrivals, args.batch)
    else:
        stamps = mlx_lm(model, arrivals, args.batch)
    return figures(stamps, arrivals)


class Load:
    """The arrivals: when each comes, its prompt and how many tokens it wants."""

    def __init__(self, model: Path, args: argparse.Namespace) -> None:
        random = np.random.RandomState(7)
        prompts = [ids for kind in KINDS for ids in encode_prompts(model, kind)]
        chosen = random.permutation(len(prompts))
        self.at = np.cumsum(random.exponential(1 / args.rate, args.requests)).tolist()
        self.prompts = [prompts[chosen[n % len(prompts)]] for n in range(args.requests)]
        self.wanted = random.randint(16, 129, args.requests).tolist()
        self.clock = 0.0

    def start(self) -> None:
        """Start the clock: programs are loaded and warm."""
        self.clock = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.clock

    def due(self, sent: int) -> Iterator[int]:
        """Yield the requests after the first `sent` that have arrived by now."""
        while sent < len(self.at) and self.at[sent] <= self.now():
            yield sent
            sent += 1

    def rest(self, sent: int) -> None:
        """Sleep until the next arrival."""
        time.sleep(max(self.at[sent] - self.now(), 0))


Stamps = list[list[tuple[float, int]]]  # per request: when tokens came, and how many


def ours(name: str, model: Path, arrivals: Load, batch: int) -> Stamps:
    """This project's session."""
    pair = load(model).endless()
    depth = None if name == "ours-auto" else int(name.removeprefix("ours-k"))
    pair.generate_batch(arrivals.prompts[:2], SamplingParams(max_tokens=16), num_draft_tokens=depth)
    positions = sum(sorted(map(len, arrivals.prompts))[-batch:]) + batch * 160
    session = pair.session(max_batch=batch, num_draft_tokens=depth, positions=positions)
    stamps: Stamps = [[] for _ in arrivals.at]
    sent = done = 0
    arrivals.start()
    while done < len(stamps):
        for number in arrivals.due(sent):
            params = SamplingParams(max_tokens=arrivals.wanted[number])
            session.submit(arrivals.prompts[number], params, index=number)
            sent = number + 1
        if not session.engine.busy:
            arrivals.rest(sent)
        for chunk in session.step():
            if chunk.tokens:
                stamps[chunk.index].append((arrivals.now(), len(chunk.tokens)))
            done += chunk.result is not None
    return stamps


def mlx_lm(model: Path, arrivals: Load, batch: int) -> Stamps:
    """mlx_lm's BatchGenerator."""
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.utils import load_model

    target, _ = load_model(model)
    stamps: Stamps = [[] for _ in arrivals.at]
    for warm in (True, False):
        generator = BatchGenerator(
            target, stop_tokens=[], completion_batch_size=batch, prefill_batch_size=batch
        )
        if warm:
            generator.insert(arrivals.prompts[:2], max_tokens=[16, 16])
            while any(generator.next()):
                pass
            generator.close()
    rows: dict[int, int] = {}
    sent = done = 0
    arrivals.start()
    while done < len(stamps):
        for number in arrivals.due(sent):
            (uid,) = generator.insert([arrivals.prompts[number]], [arrivals.wanted[number]])
            rows[uid] = number
            sent = number + 1
        if done == sent:
            arrivals.rest(sent)
            continue
        for response in generator.next()[1]:
            stamps[rows[response.uid]].append((arrivals.now(), 1))
            done += response.finish_reason is not None
    generator.close()
    return stamps


def figures(stamps: Stamps, arrivals: Load) -> dict[str, float]:
    """Return what a run's time stamps say."""
    waits = [found[0][0] - at for found, at in zip(stamps, arrivals.at, strict=True)]
    gaps = []
    for found in stamps:
        for (before, _), (after, count) in itertools.pairwise(found):
            gaps += [after - before] + [0.0] * (count - 1)
    tokens = sum(count for found in stamps for _, count in found)
    end = max(found[-1][0] for found in stamps)
    return {
        "ttft_p50_s": float(np.percentile(waits, 50)),
        "ttft_p95_s": float(np.percentile(waits, 95)),
        "gap_p50_s": float(np.percentile(gaps, 50)),
        "gap_p95_s": float(np.percentile(gaps, 95)),
        "gap_mean_s": float(np.mean(gaps)),
        "tokens": float(tokens),
        "tokens_per_s": tokens / (end - arrivals.at[0]),
    }


if __name__ == "__main__":
    main()
