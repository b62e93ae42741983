"""Throughput predicted on a virtual clock: what a depth chosen round by round would be worth.

    python -m bench.virtual            writes bench/results/virtual.md and virtual.json
    python -m bench.virtual --record   records bench/results/acceptance_trace.json first

Costs are those of the cost model that `predict` uses (gemma_mtp_mlx/prediction.py), for our kernels
at contexts of 1k. The controller is the real one, driven by that clock with noise; acceptance is
replayed from the built-in pair or falls by chance. Everything here is predicted; nothing was
measured on these chips.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from bench.acceptance import held_out_files
from gemma_mtp_mlx import Pair, hub, load, outline
from gemma_mtp_mlx.acceptance import accept
from gemma_mtp_mlx.cache import MAX_BLOCK, Cache, Seat, seat_size
from gemma_mtp_mlx.chips import find
from gemma_mtp_mlx.costs import Prior, prior_for
from gemma_mtp_mlx.depth import AutoDepth
from gemma_mtp_mlx.families import drafter_config, target_config
from gemma_mtp_mlx.prediction import HELD_OUT_ERROR, Rounds
from gemma_mtp_mlx.readers import SharedKV, VerifyReader
from gemma_mtp_mlx.sampling import SamplingParams, batch_sampling
from gemma_mtp_mlx.workload import OURS, Runtime
from tests.clock import MOST, Cost, Noise

RESULTS = Path(__file__).parent / "results"
TRACE = RESULTS / "acceptance_trace.json"
DRAFTS = 7  # recorded per position; deeper drafts never agree in a replay
ROUNDS, SETTLED = 600, 100  # rounds driven, and those not counted: the controller is still learning
CLAMP_K = 3  # mlx-vlm's default block is 4
SHOWN, CONTEXT = ("M1 Max", "M4 Max", "M5 Max"), 1024
BITS = {"4-bit": ("4", 4.5), "bf16": ("16", 16.0)}  # of the drafter; bits with their scales

Draws = Callable[[int], list[int]]  # K -> drafts of each row that agree


class Replay:
    """Rows that read recorded text, each from a file of its own, over and over."""

    def __init__(self, rows: int) -> None:
        files = list(json.loads(TRACE.read_text())["files"].values())
        self.texts = [[int(c) for c in files[row % len(files)]] for row in range(rows)]
        self.at = [0] * rows

    def draw(self, k: int) -> list[int]:
        """Return the drafts that agree in the next round, and move every row on."""
        accepted = [
            min(k, text[at % len(text)]) for text, at in zip(self.texts, self.at, strict=True)
        ]
        self.at = [at + 1 + count for at, count in zip(self.at, accepted, strict=True)]
        return accepted


class Chance:
    """Rows whose drafts agree one by one with the same chance."""

    def __init__(self, rows: int, per_token: float) -> None:
        self.rows, self.per_token = rows, per_token
        self.rng = np.random.RandomState(0)

    def draw(self, k: int) -> list[int]:
        """Return the drafts that agree in the next round."""
        agree = self.rng.random_sample((self.rows, MOST)) < self.per_token
        accepted: list[int] = np.cumprod(agree, axis=1)[:, :k].sum(axis=1).tolist()
        return accepted


def texts(rows: int) -> dict[str, Callable[[], Draws]]:
    """Return the kinds of text: each call of one starts it anew."""
    return {
        "built-in pair": lambda: Replay(rows).draw,
        ".75": lambda: Chance(rows, 0.75).draw,
        ".88": lambda: Chance(rows, 0.88).draw,
    }


def cost_of(model: str, drafter_bits: str, chip: str) -> Cost:
    """Return what rounds cost, predicted: rows, K -> milliseconds."""
    pair = outline.of_family(model, "4", drafter_bits)

    @cache
    def rounds(rows: int) -> Rounds:
        return Rounds(pair, find(chip), Runtime(OURS), rows, CONTEXT)

    return lambda rows, k: 1e3 * rounds(rows).seconds[k]


def driven(cost: Cost, prior: Prior, rows: int, draws: Draws) -> tuple[float, int]:
    """Drive the controller. Returns tokens per second once settled, and its commonest depth."""
    depth, noise, rng = AutoDepth(prior), Noise(), np.random.RandomState(1)
    ks: Counter[int] = Counter()
    tokens, ms = 0, 0.0
    for number in range(ROUNDS):
        k = depth.choose(rows)
        accepted = draws(k)
        factor = noise.factor if rng.random_sample() < noise.outliers else 1.0
        factor *= float(np.exp(noise.sigma * rng.standard_normal()))
        depth.observe(rows, k, cost(rows, k) / 1e3 * factor, accepted)
        if number >= SETTLED:
            ks[k] += 1
            tokens += sum(accepted) + rows
            ms += cost(rows, k)
    return 1e3 * tokens / ms, ks.most_common(1)[0][0]


def fixed(cost: Cost, rows: int, k: int, draws: Draws, *, clamp: bool = False) -> float:
    """Return tokens per second at one depth; clamp: every row keeps what the worst row keeps."""
    tokens = 0
    for _ in range(ROUNDS):
        accepted = draws(k)
        tokens += rows * (1 + min(accepted)) if clamp else rows + sum(accepted)
    return 1e3 * tokens / (ROUNDS * cost(rows, k))


def clamped_replay(cost: Cost, rows: int, k: int) -> float:
    """Return tokens per second of a clamped batch on recorded text: rows move on together."""
    replay, tokens = Replay(rows), 0
    for _ in range(ROUNDS):
        before = replay.at
        least = min(replay.draw(k))
        replay.at = [at + 1 + least for at in before]
        tokens += rows * (1 + least)
    return 1e3 * tokens / (ROUNDS * cost(rows, k))


def predict() -> list[dict[str, float | str]]:
    """Return every row of the tables."""
    out: list[dict[str, float | str]] = []
    for model in ("26B-A4B", "31B"):
        for bits in ("4-bit", "bf16"):
            prior = prior_for(target_config(model), drafter_config(model), 4.5, BITS[bits][1])
            for chip in SHOWN:
                cost = cost_of(model, BITS[bits][0], chip)
                for rows in (1, 4, 8):
                    for text, start in texts(rows).items():
                        plain = 1e3 * rows / cost(rows, 0)
                        auto, k = driven(cost, prior, rows, start())
                        if text == "built-in pair":
                            clamped = clamped_replay(cost, rows, CLAMP_K)
                        else:
                            clamped = fixed(cost, rows, CLAMP_K, start(), clamp=True)
                        best = max(fixed(cost, rows, k, start()) for k in range(MOST + 1))
                        out.append(
                            {
                                "model": model,
                                "drafter": bits,
                                "chip": chip,
                                "rows": rows,
                                "text": text,
                                "plain": round(plain, 1),
                                "auto": round(auto, 1),
                                "k": k,
                                "ratio": round(auto / plain, 2),
                                "best_fixed_ratio": round(best / plain, 2),
                                "clamped": round(clamped, 1),
                                "clamped_ratio": round(clamped / plain, 2),
                            }
                        )
    return out


def record(files: int = 8, tokens: int = 700) -> dict[str, object]:
    """Return, per position of held-out text, how many drafts agree with the target's own choices.

    The text is fed in blocks of 16; then each position of the block is a row of its own, which
    drafts and verifies as in a round, over the committed positions before it.
    """
    pair = load(hub.builtin())
    found = {
        file.name: pair.encode(file.read_text(), template=False)[:tokens]
        for file in held_out_files()[:files]
    }
    texts = {name: "".join(map(str, _agreeing(pair, ids))) for name, ids in found.items()}
    what = f"per position of held-out text, how many of {DRAFTS} drafts the target agrees with"
    command = "python -m bench.virtual --record"
    return {"command": command, "what": what, "drafts": DRAFTS, "files": texts}


def _agreeing(pair: Pair, tokens: list[int]) -> list[int]:
    assert pair.drafter is not None
    target = pair.target
    cache = Cache(target.config, 1, seat_size(len(tokens)), target.dtype)
    seat = Seat(0, seat_size(len(tokens)), 0)
    counts: list[int] = []
    greedy = batch_sampling([SamplingParams()] * MAX_BLOCK, [0] * MAX_BLOCK)

    def draw(h: mx.array, step: int) -> mx.array:
        return pair.drafter.choose(h, greedy, mx.zeros((MAX_BLOCK, 1), mx.int32))

    before = mx.zeros((1, target.config.hidden_size), target.dtype)
    for start in range(0, len(tokens) - MAX_BLOCK + 1, MAX_BLOCK):
        block = mx.array(tokens[start : start + MAX_BLOCK])
        rows = cache.rows([seat], mx.array([start]), [start])
        reader = VerifyReader(cache, rows, MAX_BLOCK)
        hidden = target.verify(block[None], reader)[0]
        mx.eval(hidden, reader.blocks)
        cache.commit(reader.blocks, rows)
        if start:  # at position 0 there is nothing to draft from
            at = range(start, start + MAX_BLOCK)
            rows = cache.rows([seat] * MAX_BLOCK, mx.array(list(at)), at)
            states = mx.concatenate([before, hidden[:-1]])
            shared = SharedKV(cache, rows)
            drafts = pair.drafter.draft(block, states, shared, target.embed, draw, DRAFTS)
            blocks = mx.concatenate([block[:, None], drafts], axis=1)
            logits = target.logits(target.verify(blocks, VerifyReader(cache, rows, DRAFTS + 1)))
            counts += accept(drafts, mx.argmax(logits, axis=-1)).tolist()
        before = hidden[-1:]
    return counts


HEAD = f"""\
# Predicted throughput

Written by `python -m bench.virtual`. **Predicted, not measured**: the clock is the cost model of
`mlx-gemma-mtp predict` for our kernels, which have not run on a GPU, at contexts of 1k. For MLX's
kernels its median error is {HELD_OUT_ERROR:.0%} (calibration.md). The controller is the package's
own, with 5 % noise and 2 % outliers on the clock; its first {SETTLED} of {ROUNDS} rounds are not
counted.

Text: `built-in pair` replays how many drafts of the built-in pair agree on held-out code (at most
{DRAFTS}), recorded in acceptance_trace.json; `.75` and `.88` is the chance of each draft. Plain is
K = 0 at the same number of rows; tokens per second are the batch's. Clamped is K = {CLAMP_K} with
every row keeping what the worst row keeps, as mlx-vlm 0.7.10 does for Gemma 4.
"""
COLUMNS = "| chip | B | text | plain tok/s | auto tok/s | K | auto / plain | best fixed K / plain "
COLUMNS += "| clamped tok/s | clamped / plain |"


def table(rows: list[dict[str, float | str]]) -> str:
    """Return the tables in Markdown."""
    parts = [HEAD]
    for model in ("26B-A4B", "31B"):
        for bits in ("4-bit", "bf16"):
            parts.append(f"\n## Predicted: {model} in 4 bits, drafter {bits}\n")
            parts += [COLUMNS, "|---|" + "---:|" * 9]
            for r in rows:
                if (r["model"], r["drafter"]) == (model, bits):
                    parts.append(
                        f"| {r['chip']} | {r['rows']} | {r['text']} | {r['plain']} | {r['auto']} "
                        f"| {r['k']} | **{r['ratio']:.2f}** | {r['best_fixed_ratio']:.2f} "
                        f"| {r['clamped']} | {r['clamped_ratio']:.2f} |"
                    )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Predict and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="record the acceptance trace first")
    args = parser.parse_args()
    if args.record:
        TRACE.write_text(json.dumps(record(), indent=1) + "\n")
    rows = predict()
    command = "python -m bench.virtual"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "virtual.md").write_text(table(rows))
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    what = "predicted on a virtual clock, not measured"
    (RESULTS / "virtual.json").write_text(
        f'{{"command": "{command}", "what": "{what}", "rows": [\n{lines}\n]}}\n'
    )
    print(table(rows))


if __name__ == "__main__":
    main()
