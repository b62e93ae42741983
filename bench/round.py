"""Where a round's time goes: host (building the graph), draft, verify, accept, commit.

    python -m bench.round [--model DIR] [--num-draft-tokens 4] [--batch 1] [--rounds 60]

Each stage is evaluated by itself, so the parts add up to a little more than a round takes in
`generate`, where the device never waits between them. Medians over the rounds, in milliseconds,
and the graph's operations per round without those that move no data. One JSON line comes last.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx import hub, load
from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.depth import FixedDepth
from gemma_mtp_mlx.engine import Engine
from gemma_mtp_mlx.memory import Limits
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import DecodeState, Models, Round, build_round, settings_of
from gemma_mtp_mlx.sampling import SamplingParams

PROMPT = Path(__file__).parent / "prompts" / "code.txt"
VIEWS = {"Broadcast", "Reshape", "Transpose", "ExpandDims", "Squeeze", "Flatten", "Unflatten"}
STAGES = ("host", "draft", "verify", "accept", "commit")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(hub.builtin()))
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    pair = load(args.model)
    ids = pair.encode(PROMPT.read_text(), template=False)
    print(f"{args.batch} rows of {len(ids)} prompt tokens, {args.rounds} rounds")
    rows = []
    for k in (0, args.num_draft_tokens):
        params = SamplingParams(max_tokens=16 * args.rounds)
        requests = [Request(ids, params, frozenset()) for _ in range(args.batch)]
        limits = Limits(args.batch, positions=args.batch * seat_size(requests[0].positions))
        engine = Engine(Models(pair.target, pair.drafter), FixedDepth(k), limits)
        for request in requests:
            engine.submit(request)
        rows.append({"k": k, **measure(engine, k, args.rounds)})
        print_row(rows[-1])
    print(json.dumps({"model": args.model, "batch": args.batch, "rounds": rows}))


def measure(engine: Engine, k: int, rounds: int) -> dict[str, float]:
    """Run rounds stage by stage. Returns the median milliseconds of each, and the counts."""
    while engine.queue or engine.prefilling:
        engine.step()
    state = engine._state
    assert state is not None
    known = np.array(state.lengths).tolist()
    engine._current = None  # from here on the rounds are ours
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    operations = 0
    for number in range(rounds + 5):
        began = time.perf_counter()
        done = build(engine, state, known, k)
        spent = {"host": time.perf_counter() - began}
        if number == 0:
            operations = count_operations(done)
        inputs = [kv for block in done.blocks.values() for kv in block]
        spent["draft"] = timed(lambda d=done: mx.eval(d.block))
        spent["verify"] = timed(lambda d=done, i=inputs: mx.eval(d.logits, i))
        spent["accept"] = timed(lambda d=done: mx.eval(d.report, *d.state))
        report = done.report.tolist()
        known = [length + row[k + 1] + 1 for length, row in zip(known, report, strict=True)]
        state = done.state
        engine.cache.commit(done.blocks, done.rows)
        del done, inputs
        spent["commit"] = timed(lambda: mx.eval(list(engine.cache.storage.values())))
        if number >= 5:
            for stage, seconds in spent.items():
                times[stage].append(seconds * 1e3)
    medians = {stage: round(statistics.median(values), 2) for stage, values in times.items()}
    return {**medians, "operations": operations}


def build(engine: Engine, state: DecodeState, known: list[int], k: int) -> Round:
    """Build the next round's graph."""
    requests = [row.request for row in engine.running]
    rows = engine.cache.rows([row.seat for row in engine.running], state.lengths, known)
    vocab_size = engine.models.target.config.vocab_size
    settings = settings_of([r.params for r in requests], [r.seed for r in requests], vocab_size)
    return build_round(engine.models, engine.cache, rows, state, settings, k)


def timed(action: Callable[[], None]) -> float:
    """Seconds an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def count_operations(done: Round) -> int:
    """Operations of a round's graph that move or compute data."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "round.dot"
        mx.export_to_dot(str(file), done.report, *done.state)
        kinds = Counter(
            line.split('label ="')[1].split('"')[0]
            for line in file.read_text().splitlines()
            if 'label ="' in line
        )
    return sum(count for kind, count in kinds.items() if kind not in VIEWS)


def print_row(row: dict[str, float]) -> None:
    """Print one depth's figures."""
    parts = "  ".join(f"{stage} {row[stage]:6.2f}" for stage in STAGES)
    print(f"K = {row['k']:.0f}: {parts}  ms; {row['operations']:.0f} operations")


if __name__ == "__main__":
    main()
