"""Minutes of mixed traffic through our server: no wrong text, nothing left behind.

    python -m bench.soak_serve [--minutes 20] [--model DIR] [--jobs 200] [--clients 12] [--batch 8]
                               [--queue 16] [--burst-every 30] [--num-draft-tokens 3]
                               [--out bench/results/soak_serve.json]

First a server with --num-draft-tokens 0 answers every distinct job alone, one after the other: what
has to come. Then one that drafts gets them from many clients at once, at all endpoints, streamed or
whole, greedy or seeded, with stop texts, penalties, logit bias, log-probabilities, JSON schemas and
several choices. It drafts three tokens always unless told otherwise: auto hardly drafts for a full
batch on a CPU, and a run without an accepted draft fails. Clients complete, read slowly, leave in
the middle, leave before the first token or ask for nonsense (4xx expected); now and then a burst
overfills the queue (429, tried again). Every complete answer must be the one without drafts, with
its finish reason, counts and log-probabilities, every part its beginning.

Rows in use, waiting requests, KV bytes, file descriptors, threads and resident memory are sampled
every 5 seconds (a hundredth of a short run). After a tenth of the time, at most two minutes, and at
the end, clients pause until the server is idle: it must then hold no more than before, but for 40
threads of pools that fill; resident memory may grow by 32 MB, by the line through its samples.
Exits with 1 if anything is wrong. Ctrl-C ends the run with the summary so far. One JSON line comes
last.
"""

import argparse
import asyncio
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from bench.peers import machine
from bench.serving import leaks
from bench.serving.answers import Answer, read_answer
from bench.serving.client import ask
from bench.serving.jobs import OLLAMA, Job, bad_requests, make_jobs
from bench.serving.leaks import Sample, sample
from bench.serving.processes import Server, free_port, heed_sigterm
from bench.serving.visitors import Ledger, Visitor
from gemma_mtp_mlx import hub

SAMPLE_S = 5.0
IDLE_S = 30.0  # so long may the last rows take to be given up


def main() -> None:
    """Run, compare, print."""
    args = parse_arguments(sys.argv[1:])
    heed_sigterm()
    try:
        summary = asyncio.run(soak(args))
    except KeyboardInterrupt:
        sys.exit("ended before there was any traffic")
    summary |= {
        "command": f"python -m bench.soak_serve {shlex.join(sys.argv[1:])}".strip(),
        "machine": machine.facts(),
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    if not summary["sound"]:
        sys.exit(1)


def parse_arguments(given: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--model", default=str(hub.builtin()))
    parser.add_argument("--jobs", type=int, default=200, help="distinct requests")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--num-draft-tokens", default="3", help="or auto")
    parser.add_argument("--burst-every", type=float, default=30, help="seconds")
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args(given)


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Return the summary of a run."""
    ledger = Ledger()
    with start(args, "0") as server:
        await server.started()
        model = await server.served_name()
        ollama = await has_ollama(server.port)
        jobs = make_jobs(args.jobs, model, ollama=ollama)
        wanted = await reference(server.port, jobs, ledger)
    jobs = [job for job in jobs if job.number in wanted]
    with start(args, args.num_draft_tokens) as server:
        await server.started()
        traffic = Traffic(server, jobs, wanted, ledger, args)
        await traffic.run(bad_requests(model, ollama=ollama))
        return traffic.summary()


def start(args: argparse.Namespace, drafts: str) -> Server:
    """Start one of our servers."""
    port = free_port()
    command = ["-m", "gemma_mtp_mlx", "serve", "--model", args.model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num-draft-tokens", drafts]
    command += ["--max-batch", str(args.batch), "--max-queue", str(args.queue)]
    return Server(command, port)


async def has_ollama(port: int) -> bool:
    """Whether the server has Ollama's endpoints."""
    async with ask(port, "/openapi.json") as reply:
        return set(OLLAMA) <= json.loads(await reply.read())["paths"].keys()


async def reference(port: int, jobs: list[Job], ledger: Ledger) -> dict[int, Answer]:
    """Return each job's answer, given alone; one that is refused is noted and left out."""
    wanted = {}
    for job in jobs:
        answer = Answer()
        async with ask(port, job.path, job.asked(stream=False)) as reply:
            try:
                async for _ in read_answer(reply, answer):
                    pass
            except ValueError as error:
                ledger.note(ledger.errors, f"job {job.number} ({job.path}), alone: {error}")
                continue
        wanted[job.number] = answer
    return wanted


class Traffic:
    """The clients of one server, and what is seen of it meanwhile."""

    def __init__(
        self,
        server: Server,
        jobs: list[Job],
        wanted: dict[int, Answer],
        ledger: Ledger,
        args: argparse.Namespace,
    ) -> None:
        self.ledger = ledger
        self.idle: list[Sample] = []
        self.samples: list[Sample] = []
        self._server = server
        self._jobs = jobs
        self._wanted = wanted
        self._args = args
        self._began = time.monotonic()
        self._interrupted = False

    async def run(self, nonsense: list[tuple[str, Any]]) -> None:
        """Let the clients come until the time is up or somebody presses Ctrl-C."""
        seconds = self._args.minutes * 60
        warm = min(seconds / 10, 120)
        visitors = [
            Visitor(self._server.port, self._wanted, nonsense, self.ledger, seed)
            for seed in range(self._args.clients + 1)
        ]
        try:
            await self._keep_busy(visitors, warm)
            await self._settle()
            await self._keep_busy(visitors, seconds - warm)
        except asyncio.CancelledError:
            self._interrupted = True
        await self._settle()
        if not (self._interrupted or (self.idle and self.idle[-1].accepted)):
            self.ledger.note(self.ledger.errors, "no draft was accepted, so nothing is shown")

    async def _keep_busy(self, visitors: list[Visitor], seconds: float) -> None:
        """Let visitors come for some seconds, then wait for those that are there."""
        until = time.monotonic() + seconds
        busy = [asyncio.create_task(self._client(visitor, until)) for visitor in visitors[1:]]
        busy += [asyncio.create_task(self._bursts(visitors[0], until))]
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.gather(*busy)
        finally:
            for task in (*busy, watching):
                task.cancel()
            await asyncio.gather(*busy, watching, return_exceptions=True)

    async def _client(self, visitor: Visitor, until: float) -> None:
        while self._server.alive and time.monotonic() < until:
            await visitor.visit(self._jobs)

    async def _bursts(self, visitor: Visitor, until: float) -> None:
        """Come with more short requests at once than rows and queue hold, now and then."""
        size = self._args.batch + self._args.queue + 4
        short = [job for job in self._jobs if (self._wanted[job.number].completion_tokens or 0) < 8]
        while self._server.alive and time.monotonic() + self._args.burst_every < until:
            await asyncio.sleep(self._args.burst_every)
            await asyncio.gather(*(visitor.visit(short, "stream") for _ in range(size)))

    async def _watch(self) -> None:
        """Take a sample every few seconds, and say every minute how it goes."""
        said = time.monotonic()
        while True:
            await asyncio.sleep(min(SAMPLE_S, self._args.minutes * 0.6))
            try:
                self.samples.append(await sample(self._server.port, self._server.pid))
            except (OSError, ValueError) as error:
                self.ledger.note(self.ledger.errors, f"no sample: {error}")
            if time.monotonic() - said >= 60:
                said, counts = time.monotonic(), self.ledger.counts
                found = f"{counts['completed']} answers, {counts['wrong']} wrong"
                minutes = round((said - self._began) / 60)
                print(f"{minutes} minutes: {found}", file=sys.stderr, flush=True)

    async def _settle(self) -> None:
        """Wait until the server is idle, or long enough, and keep how it then is."""
        until = time.monotonic() + IDLE_S
        while self._server.alive:
            found = await sample(self._server.port, self._server.pid)
            before = self.idle[0] if self.idle else found
            if not leaks.leaks(before, found, []) or time.monotonic() > until:
                self.idle.append(found)
                return
            await asyncio.sleep(0.5)
        words = self._server.last_words()
        self.ledger.note(self.ledger.errors, f"the server has ended: {words}")

    def summary(self) -> dict[str, Any]:
        """Return what is to be said of the run."""
        late = [found for found in self.samples if self.idle and found.at >= self.idle[0].at]
        leaked = leaks.leaks(self.idle[0], self.idle[-1], late) if self.idle else []
        counts = self.ledger.counts
        return {
            "sound": not (leaked or counts["wrong"] or counts["errors"]),
            "interrupted": self._interrupted,
            "seconds": round(time.monotonic() - self._began, 1),
            "jobs": len(self._jobs),
            "endpoints": sorted({job.path for job in self._jobs}),
            "requests": dict(sorted(counts.items())),
            "tokens": self.ledger.tokens,
            "wrong": self.ledger.wrong,
            "errors": self.ledger.errors,
            "leaks": leaked,
            "idle": [leaks.record(found) for found in self.idle],
            "most": {name: max((getattr(s, name) for s in late), default=0) for name in leaks.HELD},
            "rss_growth_bytes": round(leaks.grown(late)),
            "samples": len(late),
        }


if __name__ == "__main__":
    main()
