"""This project beside mlx_lm, mlx_vlm and transformers: same weights, same token ids, in turn.

    python -m bench.compare [--model DIR] [--batch 1 4 8] [--prompts code prose chat json repeat]
        [--max-tokens 128] [--repeats 5] [--runs ours-k0 ours-auto ours-k3 mlx_lm mlx_vlm
        transformers] [--out bench/results/compare]

Every contender is a process of its own that loads once; within a repeat they run one after the
other, in every other repeat backwards, so whatever else the machine does hits all alike. Decoding
is greedy and ignores EOS: all emit the same number of tokens. A speed is tokens per second from the
moment on when every row has its first one, as the contender hands them out; "end to end" counts all
tokens and the prefill. Ratios are taken run by run within a repeat. Where a program has
two ways to run one row, both run and the faster counts. `-kN` behind a name sets the drafts per
round (mlx_vlm and transformers: 3), -k0 is plain. One that is not installed (pip install
'.[bench,oracle]') is skipped. All contenders stay loaded: with large models, name few in --runs.

Afterwards, unless told otherwise, acceptance by prompt category (--acceptance-drafts 0 leaves it
out) and a round's time by phase from bench.round (--round-drafts without values leaves it out).
Writes OUT.json, OUT.md, OUT-*.png; one JSON line comes last.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from contextlib import ExitStack, closing
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from bench.peers import figures, machine
from bench.peers.contenders import DEFAULT_RUNS, Contender
from bench.peers.prompts import encode_prompts
from bench.peers.turns import ROOT, Worker, take_turns
from gemma_mtp_mlx import hub
from gemma_mtp_mlx.prompt_kinds import COUNT, KINDS


def main() -> None:
    """Measure, print, write."""
    args = parse_arguments()
    model = (Path(args.model) if args.model else hub.builtin()).resolve()
    prompts = {category: encode_prompts(model, category) for category in args.prompts}
    print(f"python -m bench.compare {shlex.join(sys.argv[1:])}")
    report: dict[str, Any] = {
        "command": f"python -m bench.compare {shlex.join(sys.argv[1:])}",
        "model": args.model or "built-in",
        "machine": machine.facts(),
        "ceiling": machine.ceiling(model, args.bandwidth_gbps),
        "max_tokens": args.max_tokens,
        "repeats": args.repeats,
        "load_before": os.getloadavg(),
    }
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print(report["ceiling"])
    with ExitStack() as stack:
        workers, skipped, report["versions"] = start(args.runs, model, stack)
        report["cells"] = [
            measure_cell(workers, skipped, (category, ids[:batch]), args)
            for category, ids in prompts.items()
            for batch in args.batch
        ]
    if args.acceptance_drafts:
        report["acceptance"] = measure_acceptance(prompts, model, args)
    report["rounds"] = measure_rounds(model, args)
    report["load_after"] = os.getloadavg()
    write(report, Path(args.out))
    print(json.dumps(headline(report)))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="a converted pair; default: the built-in one")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], choices=range(1, 9))
    parser.add_argument("--prompts", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", nargs="+", default=DEFAULT_RUNS, metavar="CONTENDER")
    parser.add_argument("--out", default="bench/results/compare")
    parser.add_argument("--bandwidth-gbps", type=float, default=None)
    parser.add_argument("--acceptance-drafts", type=int, default=7)
    parser.add_argument("--round-drafts", type=int, nargs="*", default=[0, 1, 3, 7])
    args = parser.parse_args()
    if args.max_tokens < 2 or args.repeats < 1:
        parser.error("--max-tokens must be at least 2 and --repeats at least 1")
    try:
        args.runs = [Contender.parse(name) for name in dict.fromkeys(args.runs)]
    except ValueError as error:
        parser.error(str(error))
    return args


def start(
    contenders: list[Contender], model: Path, stack: ExitStack
) -> tuple[list[Worker], dict[str, str], dict[str, str]]:
    """Load the contenders one after the other: workers, reasons of those skipped, versions."""
    workers, skipped, versions = [], {}, {}
    for contender in contenders:
        worker = stack.enter_context(closing(Worker(contender, model)))
        if worker.skipped is None:
            workers.append(worker)
            versions.update(worker.versions)
        else:
            skipped[contender.name] = worker.skipped
            print(f"{contender.name} is skipped: {worker.skipped}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    return workers, skipped, versions


def measure_cell(
    workers: list[Worker],
    skipped: dict[str, str],
    given: tuple[str, list[list[int]]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Run one category at one batch size and print its table."""
    category, ids = given
    runs, failed = take_turns(workers, ids, args.max_tokens, args.repeats)
    summary = figures.summarise(runs)
    lengths = [len(prompt) for prompt in ids]
    title = (
        f"{category}, batch {len(ids)}: prompts of {', '.join(map(str, lengths))} tokens, "
        f"{args.max_tokens} generated per row, {args.repeats} repeats"
    )
    print(f"\n{title}\n{figures.plain(figures.table(summary, {**skipped, **failed}))}", flush=True)
    for line in remarks(summary):
        print(line)
    speeds = {
        f"{name} ({way})": [{k: v for k, v in run.items() if k != "tokens"} for run in done]
        for (name, way), done in runs.items()
    }
    return {
        "category": category,
        "batch": len(ids),
        "prompt_tokens": lengths,
        "title": title,
        "summary": summary,
        "skipped": {**skipped, **failed},
        "runs": speeds,
    }


def remarks(summary: dict[str, Any]) -> list[str]:
    """Say which way was the faster for one row, and where texts differ."""
    lines = []
    ways = [f"{n} by {of['way']}" for n, of in summary.items() if not n.startswith("ours")]
    if ways:
        lines.append("run: " + ", ".join(ways))
    for name, of in summary.items():
        if of["first_difference"] is not None:
            lines.append(f"{name}: first other token at {of['first_difference']}")
    return lines


def measure_acceptance(
    prompts: dict[str, list[list[int]]], model: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Count by category, over all its prompts, how often each draft was kept; print a table."""
    contender = Contender.parse(f"ours-k{args.acceptance_drafts}")
    with closing(Worker(contender, model)) as worker:
        if worker.skipped is not None:
            print(f"acceptance is skipped: {worker.skipped}")
            return {}
        (way,) = worker.ways(COUNT)
        by_category = {
            category: worker.run(ids, args.max_tokens, way)["drafting"]
            for category, ids in prompts.items()
        }
    print(f"\nshare of rounds that kept each draft, {args.acceptance_drafts} drafted, greedy")
    print(figures.plain(figures.acceptance_table(by_category)), flush=True)
    return by_category


def measure_rounds(model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run bench.round at each batch and depth; its last line says what a round's phases took."""
    measured: dict[tuple[int, int], dict[str, Any]] = {}
    for batch in args.batch:
        for k in sorted(args.round_drafts, reverse=True):
            if (batch, k) in measured:
                continue
            command = [sys.executable, "-m", "bench.round", "--model", str(model)]
            options = ["--num-draft-tokens", str(k), "--batch", str(batch), "--rounds", "30"]
            done = subprocess.run(
                [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(
                    f"bench.round fails: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
                )
                return []
            for row in json.loads(done.stdout.splitlines()[-1])["rounds"]:
                ms = {name: row[name] for name in row if name not in ("k", "operations")}
                measured[batch, int(row["k"])] = {"batch": batch, "k": int(row["k"]), "ms": ms}
    wanted = [(b, k) for b in args.batch for k in sorted(args.round_drafts)]
    rows = [measured[key] for key in wanted]
    if rows:
        print("\nmilliseconds of a round by phase")
        print(figures.plain(figures.rounds_table(rows)), flush=True)
    return rows


def write(report: dict[str, Any], out: Path) -> None:
    """Write OUT.json, OUT.md and the plots."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, default=plain_value)
    out.with_name(out.name + ".json").write_text(text + "\n")
    facts = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    parts = [f"# {out.name}", f"    {report['command']}", f"{facts}; {versions}."]
    parts.append(report["ceiling"][0].upper() + report["ceiling"][1:] + ".")
    loads = [f"{report[when][0]:.1f}" for when in ("load_before", "load_after")]
    parts.append(f"Load average (1 minute): {loads[0]} before, {loads[1]} after.")
    for cell in report["cells"]:
        table = figures.table(cell["summary"], cell["skipped"])
        parts += [
            f"## {cell['title']}",
            figures.markdown(table),
            "\n".join(remarks(cell["summary"])),
        ]
    if report.get("acceptance"):
        parts += ["## Share of rounds that kept each draft"]
        parts += [figures.markdown(figures.acceptance_table(report["acceptance"]))]
    if report["rounds"]:
        parts += ["## Milliseconds of a round by phase"]
        parts += [figures.markdown(figures.rounds_table(report["rounds"]))]
    out.with_name(out.name + ".md").write_text("\n\n".join(filter(None, parts)) + "\n")
    where = "{processor}, {cores} cores, {system}".format(**report["machine"])
    draw(report, out, f"{report['model']}; {where}")


def draw(report: dict[str, Any], out: Path, note: str) -> None:
    """Draw the plots, if matplotlib is there."""
    try:
        from bench.peers import plots
    except ModuleNotFoundError as error:
        print(f"plots are skipped: {error.name} is not installed (pip install '.[bench]')")
        return
    plots.plot_throughput(report["cells"], out.with_name(out.name + "-throughput.png"), note)
    if report.get("acceptance"):
        file = out.with_name(out.name + "-acceptance.png")
        plots.plot_acceptance(report["acceptance"], file, note)
    if report["rounds"]:
        plots.plot_rounds(report["rounds"], out.with_name(out.name + "-rounds.png"), note)


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report without single runs: medians by category, batch and contender."""
    cells = [
        {
            "category": cell["category"],
            "batch": cell["batch"],
            **{
                name: {
                    "decode_tps": round(of["decode_tps"].median, 1),
                    "total_tps": round(of["total_tps"].median, 1),
                    **{f"x_{base}": round(x.median, 2) for base, x in of["vs"].items()},
                }
                for name, of in cell["summary"].items()
            },
        }
        for cell in report["cells"]
    ]
    kept = ("command", "model", "machine", "versions", "load_before", "load_after")
    return {**{name: report[name] for name in kept}, "cells": cells}


def plain_value(value: Any) -> Any:
    """Return a dataclass as a dict, for json."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} has no place in a report")


if __name__ == "__main__":
    main()
