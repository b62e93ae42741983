"""What drafting is worth here: a pair's speed at several depths, in turn on the same prompts.

Decoding is greedy and ignores EOS, so every row has as many tokens at every depth, and has to have
the same ones. Within a repeat the depths run one after the other, in every other repeat backwards,
so whatever else the machine does hits all alike; ratios are taken within a repeat.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import mlx.core as mx

from gemma_mtp_mlx import prompt_kinds
from gemma_mtp_mlx.api import Pair
from gemma_mtp_mlx.report import Totals
from gemma_mtp_mlx.sampling import SamplingParams

WARM_UP = 32  # tokens per row, at each depth, that do not count, after as many of the prompt
Progress = Callable[[int, int], None]  # tokens done, of how many


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Speed:
    """What one depth gave, over all rows.

    depth: drafts per round, 0 plain, None chosen while generating, from a fresh start in each
    measurement. tokens_per_s: from the moment when every row has its first token. ratio: to depth
    0 in the same repeat, None if that was not measured. prefill_per_s: prompt tokens, until every
    row has its first token; with several rows, rounds of those that began before are in it.
    rounds, drafted, accepted, accepted_per_position, tokens_per_round: as `Stats`, of all rows, in
    the last repeat. peak_memory_bytes: of MLX, weights included. first_difference: the first token
    of any row and repeat that is not the one the first depth gave, counted from 0; None if all are.
    """

    depth: int | None
    tokens_per_s: Spread
    ratio: Spread | None
    prefill_per_s: Spread
    rounds: int
    drafted: int
    accepted: int
    accepted_per_position: tuple[int, ...]
    tokens_per_round: float
    peak_memory_bytes: int
    first_difference: int | None


@dataclass(frozen=True, slots=True)
class Measured:
    """Speeds of one kind of prompts, the first `rows` of them. prompt_tokens: of each row."""

    kind: str
    rows: int
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    repeats: int
    speeds: tuple[Speed, ...]


class _Run(NamedTuple):
    tokens: list[list[int]]
    tokens_per_s: float
    prefill_per_s: float
    totals: Totals


def measure(
    pair: Pair,
    kind: str,
    rows: int,
    depths: Iterable[int | None] = (0, None),
    *,
    max_tokens: int = 64,
    repeats: int = 3,
    progress: Progress | None = None,
) -> Measured:
    """Measure a pair at some depths on the first prompts of a kind. The pair stays as it is.

    Raises: ValueError for more rows than there are prompts, prompts that cannot be encoded, a
    depth without a drafter, or a context that ends before max_tokens.
    """
    depths = tuple(dict.fromkeys(depths))
    if not depths or repeats < 1:
        raise ValueError("give at least one depth and one repeat to measure")
    if pair.drafter is None and any(depth != 0 for depth in depths):
        raise ValueError("this pair has no drafter; only depth 0 can be measured")
    ids = prompts(pair, kind, rows, max_tokens)
    endless = pair.endless()
    warm_up, begins = min(WARM_UP, max_tokens), [prompt[:WARM_UP] for prompt in ids]
    done, total = 0, rows * len(depths) * (warm_up + repeats * max_tokens)
    runs: dict[int | None, list[_Run]] = {depth: [] for depth in depths}
    for repeat in range(repeats + 1):
        length = max_tokens if repeat else warm_up
        for depth in depths if repeat % 2 else reversed(depths):
            run = _run(endless, ids if repeat else begins, depth, length)
            if repeat:
                runs[depth].append(run)
            done += rows * length
            if progress is not None:
                progress(done, total)
    speeds = tuple(_speed(depth, runs) for depth in depths)
    return Measured(kind, rows, tuple(map(len, ids)), max_tokens, repeats, speeds)


def prompts(pair: Pair, kind: str, rows: int, max_tokens: int) -> list[list[int]]:
    """Return the prompts that would be measured, as token ids. Raises: ValueError as `measure`."""
    if not 1 <= rows <= prompt_kinds.COUNT:
        raise ValueError(
            f"cannot measure {rows} rows: there are {prompt_kinds.COUNT} prompts of each kind; "
            f"give 1 to {prompt_kinds.COUNT}"
        )
    if max_tokens < 2:
        raise ValueError(f"cannot measure {max_tokens} tokens per row; give at least 2")
    ids = prompt_kinds.encode(kind, pair.prompts, rows)
    context = pair.target.config.max_position_embeddings
    if (longest := max(map(len, ids)) + max_tokens) > context:
        raise ValueError(
            f"prompts {kind!r} and {max_tokens} tokens need {longest} positions and the model's "
            f"context is {context}; measure fewer tokens"
        )
    return ids


def depth_name(depth: int | None) -> str:
    """Return a depth in words."""
    if depth is None:
        return "auto"
    return "plain" if depth == 0 else f"{depth} draft{'s' * (depth > 1)}"


def _run(pair: Pair, ids: list[list[int]], depth: int | None, max_tokens: int) -> _Run:
    tokens: list[list[int]] = [[] for _ in ids]
    totals = Totals()
    begun = 0  # tokens that were there when every row had its first
    mx.reset_peak_memory()
    start = first = last = time.perf_counter()
    params = SamplingParams(max_tokens=max_tokens)
    for chunk in pair.stream_batch(ids, params, num_draft_tokens=depth, max_batch=len(ids)):
        tokens[chunk.index] += chunk.tokens
        last = time.perf_counter()
        if not begun and all(tokens):
            begun, first = sum(map(len, tokens)), last
        if chunk.result is not None:
            totals.add(chunk.result.stats)
    assert totals.tokens == len(ids) * max_tokens
    decoded = (totals.tokens - begun) / (last - first)
    return _Run(tokens, decoded, totals.prompt_tokens / (first - start), totals)


def _speed(depth: int | None, runs: dict[int | None, list[_Run]]) -> Speed:
    own, plain = runs[depth], runs.get(0)
    reference = next(iter(runs.values()))[0]
    last = own[-1].totals
    ratio = None
    if plain is not None:
        pairs = zip(own, plain, strict=True)
        ratio = Spread.of([run.tokens_per_s / base.tokens_per_s for run, base in pairs])
    return Speed(
        depth,
        Spread.of([run.tokens_per_s for run in own]),
        ratio,
        Spread.of([run.prefill_per_s for run in own]),
        last.rounds,
        last.drafted,
        last.accepted,
        tuple(last.by_position),
        (last.tokens - last.requests) / last.rounds,
        max(run.totals.peak_memory_bytes for run in own),
        _first_difference(own, reference),
    )


def _first_difference(runs: Sequence[_Run], reference: _Run) -> int | None:
    found = [
        position
        for run in runs
        for row, wanted in zip(run.tokens, reference.tokens, strict=True)
        for position, (token, other) in enumerate(zip(row, wanted, strict=True))
        if token != other
    ]
    return min(found, default=None)
