"""How many kernels a GPU launches for a pass, per layer and in all: ours beside mlx_lm's.

    python -m bench.launches [--models E2B E4B 12B 26B-A4B 31B] [--rows 1] [--lengths 1 4]
                             [--context 4000] [--chip "M3 Max"] [--kinds] [--out FILE]

No GPU is needed: graphs are traced at the models' real sizes (passes.py, tracing.py) and counted
by what MLX encodes for each primitive (tally.py). "pass" is everything for L new positions per row,
from tokens to the choice of tokens, and what is written to the cache; "layer" is the mean of its
layers, each counted as what a small model's pass grows by with one more of its kind. Ours are
verify passes (L = 1 is plain decoding), commit included; the assistant's draft step stands beside
them. One JSON line comes last.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.metal.passes import MlxLm, Ours, Pass, Side
from bench.metal.tally import launches
from bench.metal.tracing import Graph
from gemma_mtp_mlx.chips import CHIPS, find
from gemma_mtp_mlx.config import FULL, SLIDING
from gemma_mtp_mlx.dispatch import Gpu
from gemma_mtp_mlx.families import TEXTS, drafter_config


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--chip", default="M3 Max", choices=list(CHIPS))
    parser.add_argument(
        "--kinds", action="store_true", help="show what each kind of layer launches"
    )
    parser.add_argument("--out", type=Path, default=None, help="write the figures to FILE, as JSON")
    args = parser.parse_args()
    print(f"{args.rows} rows at {args.context}, {args.chip}, 4-bit weights\n")
    print("| model | L | layer: mlx_lm | ours | ratio | pass: mlx_lm | ours | draft step |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    found = []
    for model in args.models:
        for length in args.lengths:
            step = Pass(args.rows, length, args.context)
            found.append(compare(model, step, find(args.chip).gpu))
            print(row(found[-1]), flush=True)
    if args.kinds:
        for each in found:
            print(f"\n{each['model']}, L = {each['length']}")
            for side in ("mlx_lm", "ours"):
                for kind, parts in each[side]["kinds"].items():
                    print(f"  {side} {kind}, {sum(parts.values())}: {show(parts)}")
    record = {
        "chip": args.chip,
        "rows": args.rows,
        "context": args.context,
        "passes": found,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def compare(model: str, step: Pass, chip: Gpu) -> dict[str, Any]:
    """Count a pass of both sides."""
    drafter = drafter_config(model)
    ours = Ours(TEXTS[model], drafter)
    one, two = (ours.drafting(replace(step, length=k + 1)) for k in (1, 2))
    drafted = grown(two, one, chip)
    return {
        "model": model,
        "length": step.length,
        "mlx_lm": counted(MlxLm, TEXTS[model], step, chip),
        "ours": counted(lambda text: Ours(text, drafter), TEXTS[model], step, chip),
        "draft_step": drafted.total(),
    }


def counted(
    side: Callable[[dict[str, Any]], Side], text: dict[str, Any], step: Pass, chip: Gpu
) -> dict[str, Any]:
    """Count one side: launches of a pass, the mean of its layers, and each kind by kernel."""
    kinds, total = {}, 0
    for kind, number, less, more in kinds_of(text):
        one = grown(side(more).graphs(step), side(less).graphs(step), chip)
        kinds[kind] = dict(one.most_common())
        total += number * one.total()
    whole = sum_of(side(text).graphs(step), chip)
    mean = round(total / text["num_hidden_layers"], 2)
    return {"pass": whole.total(), "layer": mean, "kinds": kinds}


Kind = tuple[str, int, dict[str, Any], dict[str, Any]]


def kinds_of(text: dict[str, Any]) -> list[Kind]:
    """Return the kinds of layers of a model: a name, how many there are, a model of few layers, and
    that model with one more of the kind."""
    types = text["layer_types"]
    owners = len(types) - text["num_kv_shared_layers"]
    few = [SLIDING, FULL]
    shared = few if types[owners:] else []
    found: list[Kind] = []
    for layer in few:
        name = "sliding" if layer == SLIDING else "full"
        less, longer = shortened(text, few, shared), sorted([*few, layer], reverse=True)
        more = shortened(text, longer, shared)
        found.append((name, types[:owners].count(layer), less, more))
        if shared:
            more = shortened(text, few, longer)
            found.append((f"{name}, shared keys", types[owners:].count(layer), less, more))
    return found


def shortened(text: dict[str, Any], own: list[str], shared: list[str]) -> dict[str, Any]:
    """Return the text config of a model with these layers; the last one has to be a full one."""
    layers = [*own, *shared]
    return {
        **text,
        "layer_types": layers,
        "num_hidden_layers": len(layers),
        "num_kv_shared_layers": len(shared),
    }


def grown(more: Sequence[Graph], less: Sequence[Graph], chip: Gpu) -> "Counter[str]":
    """Return what the first launches beyond the second."""
    difference = sum_of(more, chip)
    difference.subtract(sum_of(less, chip))
    assert min(difference.values()) >= 0
    return +difference


def sum_of(graphs: Sequence[Graph], chip: Gpu) -> "Counter[str]":
    """Count several graphs."""
    return sum((launches(graph, chip) for graph in graphs), Counter())


def row(found: dict[str, Any]) -> str:
    """Return a pass's row of the table."""
    lm, ours = found["mlx_lm"], found["ours"]
    return (
        f"| {found['model']} | {found['length']} | {lm['layer']:.1f} | {ours['layer']:.1f} "
        f"| {ours['layer'] / lm['layer']:.2f} | {lm['pass']} | {ours['pass']} "
        f"| {found['draft_step']} |"
    )


def show(parts: dict[str, int]) -> str:
    """Return counts by kernel in one line."""
    return ", ".join(f"{kernel} {number}" for kernel, number in parts.items())


if __name__ == "__main__":
    main()
