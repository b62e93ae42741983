"""What the command line shows: texts as they grow, JSON objects, progress, statistics.

A batch's prompts grow together but are shown one after the other: the first unfinished one live,
the next ones, as far as they have come, when it is done.
"""

import json
import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import mlx.core as mx
from tqdm import tqdm  # type: ignore[import-untyped]

from gemma_mtp_mlx.api import Chunk, Pair, Result
from gemma_mtp_mlx.depth import DepthState
from gemma_mtp_mlx.request import Stats

LINE_S = 10.0  # between two lines of progress where no bar can be drawn
MOST_NAMED = 10


class Printer(Protocol):
    """Shows chunks as they come."""

    def add(self, chunk: Chunk) -> None:
        """Take a chunk and show what can be shown."""

    def close(self) -> None:
        """Show what is still held back; nothing follows."""


class TextPrinter:
    """Texts in the order of their prompts, each under a heading if there are several."""

    def __init__(self, count: int, out: TextIO) -> None:
        self._out = out
        self._waiting = [""] * count
        self._finished = [False] * count
        self._current = 0
        self._line_open = False
        self._heading()

    def add(self, chunk: Chunk) -> None:
        """Show the chunk if it is its prompt's turn, and then whatever waited for that prompt."""
        self._waiting[chunk.index] += chunk.text
        self._finished[chunk.index] = chunk.result is not None
        self._show()
        while self._current < len(self._finished) and self._finished[self._current]:
            self._next()
        self._out.flush()

    def close(self) -> None:
        """Show the texts that were interrupted, as far as they have come."""
        while self._current < len(self._finished):
            self._next()
        self._out.flush()

    def _next(self) -> None:
        if self._line_open:
            self._write("\n")
        self._current += 1
        if self._current < len(self._waiting):
            self._heading()
            self._show()

    def _heading(self) -> None:
        if len(self._waiting) > 1:
            gap = "\n" if self._current else ""
            self._write(f"{gap}==> prompt {self._current + 1} <==\n")

    def _show(self) -> None:
        if self._current < len(self._waiting):
            self._write(self._waiting[self._current])
            self._waiting[self._current] = ""

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._line_open = not text.endswith("\n")


class JsonPrinter:
    """One JSON object a line, in the order of the prompts, each when its prompt is done."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._results: dict[int, Result] = {}
        self._current = 0

    def add(self, chunk: Chunk) -> None:
        """Keep a finished prompt's result; print those whose turn has come."""
        if chunk.result is not None:
            self._results[chunk.index] = chunk.result
        while self._current in self._results:
            self._out.write(json.dumps(as_json(self._results[self._current])) + "\n")
            self._current += 1
        self._out.flush()

    def close(self) -> None:
        """Show nothing: an object is either whole or not there."""


def show(chunks: Iterable[Chunk], printer: Printer) -> list[Result]:
    """Show chunks as they come and return the results, by prompt. Ctrl-C shows what is there."""
    results = {}
    try:
        for chunk in chunks:
            printer.add(chunk)
            if chunk.result is not None:
                results[chunk.index] = chunk.result
    except KeyboardInterrupt:
        printer.close()
        raise
    return [results[index] for index in sorted(results)]


@dataclass(slots=True)
class Totals:
    """What several requests cost together, and what their drafts were worth."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: list[int] = field(default_factory=list)
    peak_memory_bytes: int = 0

    def add(self, stats: Stats) -> None:
        """Add a request's."""
        self.requests += 1
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.cached_tokens
        self.tokens += stats.generation_tokens
        self.rounds += stats.draft_rounds
        self.drafted += stats.draft_n
        self.accepted += stats.draft_n_accepted
        self.by_position += [0] * (len(stats.accepted_per_position) - len(self.by_position))
        for position, count in enumerate(stats.accepted_per_position):
            self.by_position[position] += count
        self.peak_memory_bytes = max(self.peak_memory_bytes, stats.peak_memory_bytes)


class Progress:
    """How far a run of many requests has come: a bar on a terminal, else a line now and then.

    total: requests; done: those that were there before.
    """

    def __init__(self, total: int, done: int, out: TextIO) -> None:
        self.totals = Totals()
        self.done = self._before = done
        self._total = total
        self._out = out
        self._tokens = 0
        self._began = self._shown = time.monotonic()
        self._bar: tqdm | None = None
        if out.isatty():
            shape = "{n_fmt}/{total_fmt} requests |{bar}| {desc} [{elapsed}]"
            self._bar = tqdm(
                total=total,
                initial=done,
                file=out,
                bar_format=shape,
                dynamic_ncols=True,
                miniters=0,
                leave=False,
            )

    def add(self, chunk: Chunk) -> None:
        """Count a chunk."""
        self._tokens += len(chunk.tokens)
        if chunk.result is not None:
            self.done += 1
            self.totals.add(chunk.result.stats)

    def show(self, running: Collection[Stats]) -> None:
        """Show how far it has come, if it is time. running: of the requests under way."""
        if self._bar is not None:
            self._bar.set_description_str(self._speed(running), refresh=False)
            self._bar.update(self.done - self._bar.n)
        elif time.monotonic() - self._shown >= LINE_S:
            self._shown = time.monotonic()
            line = f"{self.done} of {self._total} requests, {self._speed(running)}"
            print(line, file=self._out, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def summary(self, state: DepthState) -> list[str]:
        """Return the lines after a run."""
        totals, seconds = self.totals, time.monotonic() - self._began
        before = f", {self._before} of them before" if self._before else ""
        return [
            f"Requests: {self.done} of {self._total} done{before}",
            f"Prompts: {totals.prompt_tokens} tokens, {totals.cached_tokens} of them taken over "
            "from earlier ones",
            f"Generation: {self._tokens} tokens in {seconds:.1f} s, "
            f"{rate(self._tokens, seconds)} tokens per second",
            f"Peak memory: {totals.peak_memory_bytes / 1e9:.3f} GB",
            *drafts(totals),
            *depth(state),
        ]

    def _speed(self, running: Collection[Stats]) -> str:
        speed = rate(self._tokens, time.monotonic() - self._began)
        drafted = self.totals.drafted + sum(stats.draft_n for stats in running)
        accepted = self.totals.accepted + sum(stats.draft_n_accepted for stats in running)
        kept = f", {accepted / drafted:.0%} accepted" if drafted else ""
        return f"{speed} tokens/s, {len(running)} running{kept}"


def as_json(result: Result) -> dict[str, Any]:
    """Return a result under mlx_lm's names (peak_memory in GB) and those of the drafts.

    A request that failed has an error, and nothing else.
    """
    stats = result.stats
    if result.error is not None:
        return {"error": " ".join(str(result.error).split()) or type(result.error).__name__}
    shown = {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "prompt_tps": stats.prompt_tps,
        "generation_tokens": stats.generation_tokens,
        "generation_tps": stats.generation_tps,
        "peak_memory": stats.peak_memory_bytes / 1e9,
        "seed": stats.seed,
        "draft_rounds": stats.draft_rounds,
        "draft_n": stats.draft_n,
        "draft_n_accepted": stats.draft_n_accepted,
        "accepted_per_position": stats.accepted_per_position,
        "acceptance_rate": stats.acceptance_rate,
        "mean_accept_len": stats.mean_accept_len,
    }
    if result.logprobs:
        # What a grammar forbids has no logarithm, and JSON no infinity.
        shown["logprobs"] = [
            {"token": token, "logprob": own, "top": [[t, p] for t, p in top if math.isfinite(p)]}
            for token, (own, top) in zip(result.tokens, result.logprobs, strict=True)
        ]
    return shown


def summary(results: Sequence[Result]) -> list[str]:
    """Return the lines after a run: the whole batch's speed, memory and acceptance."""
    totals = Totals()
    for result in results:
        totals.add(result.stats)
    prompt_s = sum(result.stats.prompt_s for result in results)
    generation_s = max(result.stats.generation_s for result in results)
    return [
        f"Prompt: {totals.prompt_tokens} tokens, {rate(totals.prompt_tokens, prompt_s)} "
        "tokens per second",
        f"Generation: {totals.tokens} tokens, "
        f"{rate(totals.tokens - totals.requests, generation_s)} tokens per second",
        f"Peak memory: {totals.peak_memory_bytes / 1e9:.3f} GB",
        *drafts(totals),
    ]


def details(results: Sequence[Result]) -> list[str]:
    """Return a line per prompt."""
    return [
        f"Prompt {number}: {stats.prompt_tokens} tokens in {stats.prompt_s:.2f} s; generated "
        f"{stats.generation_tokens} in {stats.generation_s:.2f} s, ended by {reason}; "
        f"{stats.draft_rounds} rounds of {stats.mean_accept_len:.2f} tokens; seed {stats.seed}"
        for number, (stats, reason) in enumerate(
            ((result.stats, result.finish_reason) for result in results), 1
        )
    ]


def depth(state: DepthState) -> list[str]:
    """Return a line on how many tokens were drafted per round, nothing if there was no drafter."""
    if not state.rounds:
        return []
    parts = [f"{k} with {n} row{'s' * (n > 1)}" for n, k in sorted(state.depth.items())]
    shown = max([*state.depth.values(), 1])
    acceptance = " ".join(f"{a:.2f}" for a in state.acceptance[:shown])
    return [
        f"Depth: {', '.join(parts)}; acceptance {acceptance or '-'}; switches: {state.switches}, "
        f"tries: {state.probes} at {max(state.probe_share, 0):.1%} of the time"
    ]


def taken_over(results: Sequence[Result], file: Path) -> list[str]:
    """Return what a prompt cache was worth to each prompt."""
    counts = [result.stats.cached_tokens for result in results]
    if not any(counts):
        return [f"{file}: no prompt begins with what it holds, so it was of no use"]
    return [f"{file}: {', '.join(map(str, counts))} prompt tokens taken over"]


def errors(results: Sequence[Result]) -> list[str]:
    """Return a line for every prompt that failed."""
    return [
        f"prompt {number} failed: {as_json(result)['error']}"
        for number, result in enumerate(results, 1)
        if result.error is not None
    ]


def failures(lines: Collection[int], prompts: str, output: Path) -> str:
    """Return what to know of requests that failed. lines: numbers from 0, of the prompts file."""
    numbers = sorted(lines)
    named = ", ".join(str(number + 1) for number in numbers[:MOST_NAMED])
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    noun = "line" if len(numbers) == 1 else "lines"
    return (
        f'requests of {prompts} failed: {noun} {named}{more}; their "error" in {output} says '
        "why; to try them again, remove their results there and run the same command"
    )


def describe(pair: Pair) -> list[str]:
    """Return what was loaded, a line for the target and one for the drafter."""
    config, dtype = pair.target.config, str(pair.target.dtype).removeprefix("mlx.core.")
    device = str(mx.default_device().type).removeprefix("DeviceType.")
    lines = [
        f"Target: {len(config.layers)} layers of width {config.hidden_size}, vocabulary "
        f"{config.vocab_size}, window {config.sliding_window}, context "
        f"{config.max_position_embeddings}, {dtype} on the {device}",
        *(f"Skipped: {count} tensors ({reason})" for reason, count in pair.skipped.items()),
    ]
    if pair.drafter is not None:
        text = pair.drafter.config.text
        head = "centroid" if pair.drafter.config.use_ordered_embeddings else "full"
        lines.append(f"Drafter: {len(text.layers)} layers of width {text.hidden_size}, {head} head")
    return lines


def drafts(totals: Totals) -> list[str]:
    """Return lines on what drafts were worth."""
    if not totals.drafted:
        return ["Drafts: none"]
    emitted, rounds = totals.tokens - totals.requests, totals.rounds
    kept = totals.accepted / totals.drafted
    shares = " ".join(f"{count / rounds:.2f}" for count in totals.by_position)
    return [
        f"Drafts: {emitted / rounds:.2f} tokens per round, {kept:.0%} of {totals.drafted} accepted",
        f"Accepted by position: {shares} of {rounds} rounds",
    ]


def rate(count: int, seconds: float) -> str:
    """Return so many per second, as text; "-" if there was no time."""
    return f"{count / seconds:.1f}" if seconds else "-"
