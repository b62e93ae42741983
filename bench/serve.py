"""Our server beside mlx_lm's and mlx-vlm's: same pair, same prompts, in turn, on loopback.

    python -m bench.serve [--model DIR] [--streams 8] [--rate 0.5] [--requests 32] [--repeats 3]
        [--max-tokens 128] [--runs ours-auto ours-k0 mlx_lm mlx_vlm mlx_vlm-k0]
        [--out bench/results/serve]

Every turn starts a contender's real server process, warms it up, asks and ends it; within a repeat
they take turns, in every other repeat backwards. All are asked at /v1/chat/completions, streaming,
greedy: the one endpoint that all three have, with the chat template that lies in the folder, so a
prompt has the same ids (checked by its length). The folder's end of sequence is never generated, so
an answer has as many tokens as were asked for; what was made is read from usage, never counted in
pieces.

Closed loop: short questions (the built-in chat prompts), the same by one stream and by --streams.
Open loop: --requests of all kinds arrive as a Poisson process of --rate per second, the same
for all, and want a quarter of --max-tokens to all of it; p50 and p95 of the wait for the first text
and between tokens (tokens that come together count as one gap and the rest as none). Every prompt
of a turn begins with another line, so no prompt cache helps anybody. A contender that fails is
reported with its last line. `-kN` behind a name sets the drafts per round (mlx_vlm: 3), -k0 is
plain. The client takes part of the same machine's time.

Writes OUT.json, OUT.md, OUT.png; one JSON line comes last.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.peers import machine
from bench.peers.contenders import Contender
from bench.peers.figures import markdown, plain
from bench.serving import contenders, load
from bench.serving.figures import (
    ALL,
    ONE,
    Run,
    closed_table,
    failures,
    figures,
    headline,
    open_table,
)
from bench.serving.load import Stream
from bench.serving.processes import heed_sigterm
from gemma_mtp_mlx import hub

ARRIVALS = "arrivals"


def main() -> None:
    """Measure, print, write."""
    args = parse_arguments()
    heed_sigterm()
    command = f"python -m bench.serve {shlex.join(sys.argv[1:])}".strip()
    report: dict[str, Any] = {
        "command": command,
        "model": args.model or "built-in",
        "machine": machine.facts(),
        "versions": versions(args.runs),
        "load_before": os.getloadavg(),
    }
    runs: dict[str, list[Run]] = {of.name: [] for of in args.runs}
    texts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders.write_endless(Path(args.model or hub.builtin()).resolve(), Path(folder))
        for repeat in range(args.repeats):
            for of in args.runs if repeat % 2 else reversed(args.runs):
                run, said = asyncio.run(turn(of, Path(folder), args))
                runs[of.name].append(run)
                texts.setdefault(of.name, said)
                print(f"{repeat + 1} {of.name}: {brief(run)}", file=sys.stderr, flush=True)
    report |= {"load_after": os.getloadavg(), "runs": runs, "equal_texts": equal_texts(texts)}
    print(f"{command}\n{body(report, args, plain)}")
    if args.out is not None:
        write(report, args)
    kept = ("command", "model", "machine", "versions", "load_before", "load_after", "equal_texts")
    print(json.dumps({**{name: report[name] for name in kept}, "medians": headline(runs)}))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="a converted pair; default: the built-in one")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.5, help="arrivals per second")
    parser.add_argument("--requests", type=int, default=32, help="that arrive")
    parser.add_argument("--closed-requests", type=int, default=16, help="of each closed loop")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", nargs="+", default=contenders.DEFAULT_RUNS, metavar="CONTENDER")
    parser.add_argument("--out", type=Path, default=None, help="writes OUT.json, OUT.md, OUT.png")
    args = parser.parse_args()
    counts = (args.streams, args.requests, args.closed_requests, args.repeats)
    if min(counts) < 1 or args.max_tokens < 2 or args.rate <= 0:
        parser.error("counts must be at least 1, --max-tokens at least 2, --rate above 0")
    try:
        args.runs = [contenders.contender(name) for name in dict.fromkeys(args.runs)]
    except ValueError as error:
        parser.error(str(error))
    return args


def versions(runs: list[Contender]) -> dict[str, str]:
    """Return the versions of what is measured; one that is missing fails in its turn."""
    found = {}
    for package in ("mlx", *(contenders.PACKAGES[of.program] for of in runs)):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


async def turn(
    contender: Contender, folder: Path, args: argparse.Namespace
) -> tuple[Run, list[str]]:
    """Measure one contender once. Returns its figures, and the texts of the arrivals."""
    count, tokens = args.closed_requests, args.max_tokens
    phases = {
        ONE: (load.questions(count, "one", tokens), 1),
        ALL: (load.questions(count, "all", tokens), args.streams),
        ARRIVALS: (load.arrivals(args.requests, "due", args.rate, tokens), None),
    }
    run: Run = {}
    texts: list[str] = []
    with contenders.start(contender, folder, args.streams) as server:
        try:
            await server.started()
            name = await contenders.model_name(contender, server, folder)
            client = load.Client(server.port, name)
            await client.closed(load.questions(args.streams, "warm", min(8, tokens)), args.streams)
        except (OSError, ValueError) as error:
            return dict.fromkeys(phases, str(error)), []
        for phase, (questions, streams) in phases.items():
            try:
                if streams is None:
                    done = await client.open(questions)
                    texts = [stream.answer.texts[0] for stream in done]
                else:
                    done = await client.closed(questions, streams)
                run[phase] = figures(done) | prompt_tokens(done)
            except ValueError as error:
                run[phase] = f"{error}" if server.alive else f"{error}; {server.last_words()}"
    return run, texts


def prompt_tokens(streams: list[Stream]) -> dict[str, float]:
    """Return how many prompt tokens a phase had; the same for all, or templates differ."""
    return {"prompt_tokens": sum(stream.answer.prompt_tokens or 0 for stream in streams)}


def equal_texts(texts: dict[str, list[str]]) -> dict[str, str]:
    """Say how many texts of the arrivals are those of the first of ours, to the letter."""
    reference = next((said for name, said in texts.items() if name.startswith("ours")), [])
    return {
        name: f"{sum(map(str.__eq__, said, reference))} of {len(reference)}"
        for name, said in texts.items()
        if said and reference
    }


def brief(run: Run) -> str:
    """Return a turn's figures in one line."""
    parts = []
    for phase, found in run.items():
        if isinstance(found, str):
            parts.append(f"{phase}: {found}")
        else:
            wait, speed = found["ttft_p95_s"], found["tokens_per_s"]
            parts.append(f"{phase}: {speed:.1f} tokens/s, first text p95 {wait:.2f} s")
    return "; ".join(parts)


def body(report: dict[str, Any], args: argparse.Namespace, lay_out: Any) -> str:
    """Return the tables with what a reader must know."""
    runs = report["runs"]
    parts = [
        f"## Closed loop: {args.closed_requests} requests of {args.max_tokens} tokens, tokens per "
        f"second over all streams, {args.repeats} repeats",
        lay_out(closed_table(runs, args.streams)),
        f"## Open loop: {args.requests} requests, {args.rate:g} per second, at most "
        f"{args.streams} rows",
        lay_out(open_table(runs, ARRIVALS)),
    ]
    if report["equal_texts"]:
        equal = ", ".join(f"{name} {said}" for name, said in report["equal_texts"].items())
        parts.append(f"Texts equal to the first of ours: {equal}.")
    failed = failures(runs)
    if failed:
        parts += ["## Failed", "\n".join(f"- {line}" for line in failed)]
    prompts = prompt_lengths(runs)
    if len(prompts) > 1:
        parts.append(f"**Prompts differ in length, so templates do**: {prompts}")
    return "\n\n".join(parts)


def prompt_lengths(runs: dict[str, list[Run]]) -> dict[int, list[str]]:
    """Return the contenders by how many prompt tokens they counted in the arrivals."""
    found: dict[int, list[str]] = {}
    for name, done in runs.items():
        for count in {int(f["prompt_tokens"]) for r in done if isinstance(f := r[ARRIVALS], dict)}:
            found.setdefault(count, []).append(name)
    return found


def write(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Write OUT.json, OUT.md and, if matplotlib is there, OUT.png."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    facts = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    packages = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    loads = [f"{report[when][0]:.1f}" for when in ("load_before", "load_after")]
    parts = [
        f"# {args.out.name}",
        f"    {report['command']}",
        f"{facts}; {packages}; model {report['model']}.",
        f"Load average (1 minute): {loads[0]} before, {loads[1]} after.",
        body(report, args, markdown),
    ]
    args.out.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    try:
        from bench.serving.plots import plot
    except ModuleNotFoundError as error:
        print(f"the plot is skipped: {error.name} is not installed (pip install '.[bench]')")
        return
    where = "{processor}, {cores} cores, {system}".format(**report["machine"])
    if sys.platform != "darwin":
        where += "; measured on a CPU, not on Apple hardware"
    file = args.out.with_suffix(".png")
    plot(report["runs"], args.streams, args.rate, file, f"{report['model']} pair; {where}")


if __name__ == "__main__":
    main()
