"""Thousands of requests through one engine: nothing is lost, mixed up or left behind.

    python -m bench.soak [--model DIR] [--requests 10000] [--distinct 1000] [--batch 8] [--alone 20]

Request i has the prompt and settings of request i mod DISTINCT and must have its result; some of
them also run alone, without a drafter. After the first DISTINCT requests memory must stay flat:
MLX's active memory and the process's resident memory are sampled every 100 requests. Exits with 1
if anything differs. One JSON line comes last.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from gemma_mtp_mlx import Pair, SamplingParams, Session, hub, load

PAGE = resource.getpagesize()
SAMPLE_EVERY = 100
GROWTH_BYTES = 32e6  # resident memory may wander by so much: allocators keep what they had


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(hub.builtin()))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--distinct", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--alone", type=int, default=20)
    args = parser.parse_args()
    pair = load(args.model)
    jobs = [job(pair, number) for number in range(args.distinct)]
    session = pair.session(max_batch=args.batch, positions=args.batch * 256)
    began = time.perf_counter()
    results, memory = run(session, jobs, args.requests)
    seconds = time.perf_counter() - began
    wrong = [n for n, tokens in enumerate(results) if tokens != results[n % args.distinct]]
    checked = np.linspace(0, args.distinct - 1, args.alone).astype(int).tolist()
    wrong += [n for n in checked if alone(pair, *jobs[n]) != results[n]]
    settled = memory[args.distinct // SAMPLE_EVERY :] or memory[-1:]
    growth = {
        kind: max(sample[kind] for sample in settled) - settled[0][kind] for kind in settled[0]
    }
    report = {
        "requests": len(results),
        "tokens": sum(map(len, results)),
        "seconds": round(seconds, 1),
        "wrong": len(wrong),
        "checked_alone": len(checked),
        "growth_bytes": growth,
        "active_bytes": settled[-1]["active"],
        "depth": session.depth.depth,
    }
    print(json.dumps(report))
    if wrong or growth["resident"] > GROWTH_BYTES or len(results) != args.requests:
        sys.exit(1)


def job(pair: Pair, number: int) -> tuple[list[int], SamplingParams]:
    """Return the prompt and the settings of request `number`."""
    random = np.random.RandomState(number)
    vocab_size = pair.target.config.vocab_size
    prompt = random.randint(6, vocab_size, random.randint(1, 40)).tolist()
    sampled = number % 3 > 0
    return prompt, SamplingParams(
        max_tokens=int(random.randint(1, 17)),
        temperature=0.9 if sampled else 0.0,
        top_p=0.9 if number % 3 == 2 else 1.0,
        seed=number,
        repetition_penalty=1.3 if number % 7 == 0 else 1.0,
        presence_penalty=0.4 if number % 11 == 0 else 0.0,
        num_draft_tokens=number % 5 if number % 13 == 0 else None,
        logit_bias={7: 1.5} if number % 17 == 0 else {},
    )


def run(
    session: Session, jobs: list[tuple[list[int], SamplingParams]], count: int
) -> tuple[list[list[int]], list[dict[str, int]]]:
    """Keep the session's queue filled until all are done. Returns tokens, and memory samples."""
    results: list[list[int]] = [[] for _ in range(count)]
    memory = []
    submitted = done = 0
    progress = tqdm(total=count, unit="requests", file=sys.stderr, mininterval=5)
    while done < count:
        while submitted < min(count, done + 32):
            session.submit(*jobs[submitted % len(jobs)], index=submitted)
            submitted += 1
        for chunk in session.step():
            if chunk.result is not None:
                results[chunk.index] = chunk.result.tokens
                done += 1
                progress.update()
                if done % SAMPLE_EVERY == 0:
                    memory.append({"active": mx.get_active_memory(), "resident": resident()})
    progress.close()
    return results, memory


def alone(pair: Pair, prompt: list[int], params: SamplingParams) -> list[int]:
    """Return what a request gives alone, decoded plainly."""
    return pair.generate(prompt, params, num_draft_tokens=0).tokens


def resident() -> int:
    """Bytes of the process in memory now; where /proc is not there, the most there ever were."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * PAGE
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
