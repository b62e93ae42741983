"""What the command line shows: texts as they grow, JSON objects, statistics.

A batch's prompts grow together but are shown one after the other: the first unfinished one live,
the next ones, as far as they have come, when it is done.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import mlx.core as mx

from gemma_mtp_mlx.api import Chunk, Pair, Result
from gemma_mtp_mlx.convert import Report
from gemma_mtp_mlx.convert.conversion import Written


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


def as_json(result: Result) -> dict[str, Any]:
    """Return a result under mlx_lm's names (peak_memory in GB) and those of the drafts."""
    stats = result.stats
    return {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
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


def summary(results: Sequence[Result]) -> list[str]:
    """Return the lines after a run: the whole batch's speed, memory and acceptance."""
    stats = [result.stats for result in results]
    prompt = sum(s.prompt_tokens for s in stats)
    generated = sum(s.generation_tokens for s in stats)
    prompt_s = sum(s.prompt_s for s in stats)
    generation_s = max(s.generation_s for s in stats)
    peak = max(s.peak_memory_bytes for s in stats)
    return [
        f"Prompt: {prompt} tokens, {_rate(prompt, prompt_s)} tokens per second",
        f"Generation: {generated} tokens, "
        f"{_rate(generated - len(stats), generation_s)} tokens per second",
        f"Peak memory: {peak / 1e9:.3f} GB",
        *_drafts(results),
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


def converted(report: Report, folder: Path) -> list[str]:
    """Return what a conversion wrote and how to use it."""
    lines = [f"{folder}: {_written(report.target)}"]
    if report.drafter is None:
        lines.append("No drafter was converted; name one with --draft-hf-path to draft with it")
    else:
        lines.append(f"{folder / 'drafter'}: {_written(report.drafter)}")
    try_it = f"mlx-gemma-mtp generate --model {shlex.quote(str(folder))} --prompt Hello"
    return [*lines, f"Try: {try_it}"]


def _written(part: Written) -> str:
    text = f"{part.used} tensors, {part.bytes_in / 1e6:.1f} MB as {part.bytes_out / 1e6:.1f} MB"
    if part.quantized:
        text += f", {part.quantized} modules quantised"
    if part.kept:
        text += f", {len(part.kept)} not ({', '.join(part.kept)})"
    for reason, count in part.skipped.items():
        text += f", {count} skipped ({reason})"
    return text


def _drafts(results: Sequence[Result]) -> list[str]:
    stats = [result.stats for result in results]
    rounds = sum(s.draft_rounds for s in stats)
    drafted = sum(s.draft_n for s in stats)
    if not drafted:
        return ["Drafts: none"]
    emitted = sum(s.generation_tokens - 1 for s in stats)
    kept = sum(s.draft_n_accepted for s in stats) / drafted
    depth = max(len(s.accepted_per_position) for s in stats)
    by_position = [
        sum(s.accepted_per_position[place] for s in stats if place < len(s.accepted_per_position))
        for place in range(depth)
    ]
    shares = " ".join(f"{count / rounds:.2f}" for count in by_position)
    return [
        f"Drafts: {emitted / rounds:.2f} tokens per round, {kept:.0%} of {drafted} accepted",
        f"Accepted by position: {shares} of {rounds} rounds",
    ]


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.1f}" if seconds else "-"
