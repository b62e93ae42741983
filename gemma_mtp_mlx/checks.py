"""The checks of a pair: each looks at one thing and says whether it is as it should be.

Thresholds are where what works and what does not were seen apart, or published so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_reduce

from gemma_mtp_mlx import agreement, expected, footprint, machine, measure, wiring
from gemma_mtp_mlx.agreement import Agreement
from gemma_mtp_mlx.api import Pair
from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels import kernel
from gemma_mtp_mlx.memory import device_bytes
from gemma_mtp_mlx.round import Models

PASS, WARN, FAIL, SKIP = "pass", "warn", "fail", "skip"
ROWS = (1, 4, 8)
SHORT = 4096  # tokens; a context below that is worth a warning
# Tokens of the prompts that wiring is watched on: a short one, and one past the window, unless that
# takes too long to compute.
SHORT_PROMPT, PAST, FEW, MOST_WINDOW = 24, 40, 96, 512
UNSURE = 0.8  # entropy of a uniform choice: untrained .996 and more, trained .3 and less
SAME = 0.9  # share of one token among first drafts
SURER = 0.3  # that a drafter may be surer than it is right
KIND, TOKENS, REPEATS = "code", 64, 3
# Of plain decoding's speed, in the best of the repeats. A fresh controller may lose 6 plain rounds
# of 64 to trying, .09; the rest is what a machine's own noise may be.
SLOWER = 0.85
OWN_DRAFTER = "use the target's own assistant (mlx-gemma-mtp pull finds it)"
REPORT = "please report it, with this output (--json)"


@dataclass(frozen=True, slots=True)
class Check:
    """One check. summary: in a line; details: more lines; data: the same for programs; remedy: what
    to do unless it passed."""

    name: str
    status: str
    summary: str
    details: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""


def check_versions() -> Check:
    """Say what computes, and on what."""
    versions, here = machine.versions(), machine.facts()
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    data = {"versions": versions, "machine": here.line()}
    return Check("versions", PASS, words, (here.line(),), data)


def check_model(pair: Pair) -> Check:
    """Look at what the target is, and whether text can be given to it."""
    config = pair.target.config
    if pair.tokenizer is None:
        return Check(
            "model",
            FAIL,
            "its folder has no tokenizer.json",
            remedy="put the tokenizer's files there, or convert or pull it again",
        )
    size = expected.size_of(config)
    dtype = str(pair.target.dtype).removeprefix("mlx.core.")
    name = "the built-in pair" if size == expected.BUILT_IN else f"Gemma 4 {size or 'of no known'}"
    summary = f"{name}{'' if size else ' size'}, {len(config.layers)} layers, {dtype}"
    if not pair.tokenizer.has_chat_template:
        return Check(
            "model",
            WARN,
            f"{summary}; its tokenizer has no chat template",
            remedy="put its chat_template.jinja into the folder",
        )
    return Check("model", PASS, summary, data={"size": size, "dtype": dtype})


def check_memory(pair: Pair) -> Check:
    """Look at what the device's memory leaves for keys and values."""
    config, has = pair.target.config, device_bytes()
    held = [_bytes(part) for part in (pair.target, pair.drafter) if part is not None]
    room = footprint.room(config, pair.target.dtype, has, *held)
    contexts = {rows: room.largest_context(rows) for rows in ROWS}
    data = {"weights_bytes": held, "memory_bytes": has, "largest_context": contexts}
    words = ", ".join(f"{context} with {rows}" for rows, context in contexts.items())
    summary = f"{sum(held) / 1e9:.2f} of {has / 1e9:.2f} GB; tokens per row: {words}"
    least = min(SHORT, config.max_position_embeddings)
    remedy = "use fewer bits (mlx-gemma-mtp convert -q) or a smaller model"
    if not contexts[1]:
        return Check("memory", FAIL, f"no context fits: {summary}", data=data, remedy=remedy)
    status = PASS if contexts[1] >= least else WARN
    return Check("memory", status, summary, data=data, remedy="" if status == PASS else remedy)


def _bytes(module: nn.Module) -> int:
    return int(tree_reduce(lambda total, x: total + x.nbytes, module.parameters(), 0))


def check_pair(pair: Pair) -> Check:
    """Look at what speaks against the drafter; that it fits was a condition of loading it."""
    if pair.drafter is None:
        remedy = "name its drafter with --draft-model"
        return Check("pair", WARN, "there is no drafter, so it decodes plainly", remedy=remedy)
    if pair.doubts:
        first, _, remedy = pair.doubts[0].rpartition("; ")
        return Check("pair", WARN, first, tuple(pair.doubts[1:]), {"doubts": pair.doubts}, remedy)
    return Check("pair", PASS, "the drafter's shapes are the target's, nothing speaks against it")


def check_kernels(pair: Pair) -> Check:
    """Look at what trying the kernels has found when the pair was loaded."""
    if not on_gpu():
        return Check("kernels", SKIP, "MLX computes on the CPU here, with reference operations")
    data = {"notes": pair.tried, "fewer_threads": dict(kernel.limited)}
    fewer = tuple(
        f"{name} runs with {threads} threads, the most this GPU lets it have"
        for name, threads in kernel.limited.items()
    )
    if pair.tried:
        return Check("kernels", WARN, pair.tried[0], (*pair.tried[1:], *fewer), data)
    return Check(
        "kernels",
        PASS,
        "a block has the same bits whole, in parts, alone and in company",
        fewer,
        data,
    )


def _models(pair: Pair) -> Models:
    return Models(pair.target, pair.drafter, pair.arithmetic)


def check_wiring(pair: Pair, prompts: Mapping[str, Sequence[int]]) -> Check:
    """Watch what rounds hand the drafter."""
    text = [token for ids in prompts.values() for token in ids]
    window = pair.target.config.sliding_window
    length = window + PAST if window <= MOST_WINDOW else FEW
    long = list(islice(cycle(text), length))
    found = wiring.check(_models(pair), (long, text[:SHORT_PROMPT]))
    data = {
        "prompt_tokens": found.lengths,
        "past_window": found.past_window,
        "tolerance": found.tolerance,
        "findings": [
            {"name": f.name, "compared": f.compared, "problem": f.problem} for f in found.findings
        ],
    }
    if found.problem is not None:
        return Check("wiring", FAIL, found.problem, data=data, remedy=REPORT)
    past = "" if found.past_window else f", not past the window of {window}"
    compared = sum(finding.compared for finding in found.findings)
    summary = f"what the drafter is handed is right in all of {compared} comparisons{past}"
    return Check("wiring", PASS, summary, data=data)


def check_acceptance(pair: Pair, prompts: Mapping[str, Sequence[int]]) -> Check:
    """Measure what drafts are worth, and judge it."""
    found = agreement.measure(_models(pair), prompts)
    status, summary, remedy = judge(pair, found)
    config = pair.target.config
    data = {
        "kinds": {
            kept.kind: {"rounds": kept.rounds, "accepted_per_position": kept.by_position}
            for kept in found.kinds
        },
        "by_chance": found.chance,
        "drafter_sure": found.sure,
        "drafter_entropy": found.entropy,
        "most_frequent_draft": found.same,
        "share_of_published": expected.ratio(config, found),
        "published": [
            {"kind": p.kind, "share": p.share, "drafts": p.drafts, "source": p.source}
            for p in expected.published(config)
        ],
    }
    return Check("acceptance", status, summary, tuple(_table(found, pair)), data, remedy)


def judge(pair: Pair, found: Agreement) -> tuple[str, str, str]:
    """Return a status, a summary and a remedy for what drafts were worth."""
    whole, first = found.whole, found.whole.shares[0]
    kept = f"{first:.0%} of first drafts are the target's own"
    if first < expected.FLOOR and (found.entropy > UNSURE or found.same > SAME):
        why = "any token is as likely to it as any other"
        if found.entropy <= UNSURE:
            why = f"{found.same:.0%} of its first drafts are one and the same token"
        return FAIL, f"the drafter is not trained: {why}, and {kept}", OWN_DRAFTER
    if first < expected.FLOOR and found.sure - first > SURER:
        summary = (
            f"the drafter is another target's: it gives its first drafts {found.sure:.0%} on "
            f"average, but {kept}{', no more than by chance' if found.by_chance else ''}"
        )
        return FAIL, summary, OWN_DRAFTER
    if first < expected.FLOOR:
        return FAIL, f"the drafter is of no use: {kept}", OWN_DRAFTER
    ratio = expected.ratio(pair.target.config, found)
    doubted = "as the check of the pair says; " if pair.doubts else ""
    if ratio is not None and ratio < expected.LITTLE:
        summary = f"{whole.share:.0%} of drafts are kept, {ratio:.0%} of what this size has shown"
        return WARN, summary, f"{doubted}the drafter may be another version's: {OWN_DRAFTER}"
    if found.sure - first > SURER:
        summary = f"{kept}, where the drafter itself expects {found.sure:.0%}"
        return WARN, summary, f"{doubted}the target may be another version: {OWN_DRAFTER}"
    return PASS, f"{kept}, and {whole.share:.0%} of all", ""


def _table(found: Agreement, pair: Pair) -> list[str]:
    """Lines of acceptance by position, with what is published beside it."""
    published = expected.published(pair.target.config)
    known = {each.kind or "all": f"{each.share:11.2f}" for each in published}
    positions = "".join(f"{place:6}" for place in range(1, agreement.K + 1))
    lines = [f"drafts kept{positions}   all{'  published' if known else ''}"]
    for kept in (*found.kinds, found.whole):
        shares = "".join(f"{share:6.2f}" for share in (*kept.shares, kept.share))
        lines.append(f"  {kept.kind:9}{shares}{known.get(kept.kind, '')}")
    if sources := dict.fromkeys(each.source for each in published):
        lines.append(f"published: {'; '.join(sources)}")
    return lines


def check_speed(pair: Pair, prompts: Mapping[str, Sequence[int]]) -> Check:
    """Measure plain decoding, fixed drafts and auto, and judge them."""
    depths = (0, agreement.K, None)
    found = measure.measure(pair, KIND, 1, depths, max_tokens=TOKENS, repeats=REPEATS)
    return judge_speed(found)


def judge_speed(found: measure.Measured) -> Check:
    """Judge plain decoding, fixed drafts and auto, in this order, on the same prompts."""
    plain, fixed, auto = found.speeds
    assert fixed.ratio is not None and auto.ratio is not None and fixed.depth is not None
    needed = fixed.tokens_per_round / fixed.ratio.median
    each = break_even(needed, fixed.depth)
    data = {
        "plain_tokens_per_s": plain.tokens_per_s.median,
        "auto_ratio": [auto.ratio.median, auto.ratio.least, auto.ratio.most],
        "fixed_ratio": [fixed.ratio.median, fixed.ratio.least, fixed.ratio.most],
        "tokens_per_round": fixed.tokens_per_round,
        "break_even_tokens_per_round": needed,
        "break_even_acceptance": each,
    }
    details = [
        f"{name}: {speed.tokens_per_s.median:.1f} tokens per second, {_ratio(speed)} x plain"
        for name, speed in ((f"{fixed.depth} drafts", fixed), ("auto", auto))
    ]
    chance = "more than they can give" if each is None else f"each draft kept with {each:.2f}"
    details.append(
        f"{fixed.depth} drafts pay here from {needed:.2f} tokens per round ({chance}); these are "
        f"{fixed.tokens_per_round:.2f}"
    )
    summary = f"plain {plain.tokens_per_s.median:.1f} tokens per second, auto {_ratio(auto)} x that"
    if any(speed.first_difference is not None for speed in (fixed, auto)):
        return Check("speed", FAIL, "drafting changes the text", tuple(details), data, REPORT)
    if auto.ratio.most < SLOWER:
        remedy = f"use --num-draft-tokens 0 until it is repaired, and {REPORT}"
        return Check("speed", FAIL, f"auto is slower: {summary}", tuple(details), data, remedy)
    if max(auto.ratio.median, fixed.ratio.median) < 1:
        remedy = "leave --num-draft-tokens at auto, which decodes plainly where that is faster"
        summary = f"drafting does not pay on this machine: {summary}"
        return Check("speed", WARN, summary, tuple(details), data, remedy)
    return Check("speed", PASS, summary, tuple(details), data)


def _ratio(speed: measure.Speed) -> str:
    assert speed.ratio is not None
    return f"{speed.ratio.median:.2f} ({speed.ratio.least:.2f} to {speed.ratio.most:.2f})"


def break_even(tokens: float, k: int) -> float | None:
    """Return the chance a with 1 + a + ... + a^k = tokens, 0 if tokens < 1, None if > k + 1."""
    if tokens > k + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        few = sum(middle**i for i in range(k + 1)) < tokens
        low, high = (middle, high) if few else (low, middle)
    return high
