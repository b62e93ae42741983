"""What a chat says about its answers: a line after each, statistics when asked."""

from gemma_mtp_mlx.chat import Answer, Chat
from gemma_mtp_mlx.report import Totals, drafts, rate
from gemma_mtp_mlx.request import Stats

GAP = " · "


def count(number: int, noun: str) -> str:
    """Return a number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def progress(stats: Stats) -> list[str]:
    """Return what to say of an answer that is being generated, the most important first."""
    if not stats.generation_tokens:
        return [f"reading {count(stats.prompt_tokens, 'token')}"]
    return [f"{stats.generation_tps:.1f} tokens/s", count(stats.generation_tokens, "token")]


def status(answer: Answer, context: int) -> list[str]:
    """Return what to say of an answer that is over, the most important first."""
    stats = answer.stats
    parts = [f"{stats.generation_tps:.1f} tokens/s"]
    if stats.draft_n:
        parts.append(f"{stats.acceptance_rate:.0%} accepted")
        parts.append(f"{stats.mean_accept_len:.2f} per round")
    parts.append(f"context {answer.used} of {context}")
    if stats.cached_tokens:
        parts.append(f"{stats.cached_tokens} reused")
    return parts


def ending(answer: Answer, chat: Chat) -> str:
    """Return what else ended an answer than the model, or nothing."""
    if answer.end == "stopped":
        return "stopped" if answer.kept else "stopped before it began: the question is forgotten"
    if answer.end == "max_tokens":
        return f"cut after {chat.params.max_tokens} tokens; --max-tokens allows more"
    if answer.end == "context":
        return (
            f"cut, the context of {chat.context} tokens is full; /save FILE keeps the "
            "conversation, /reset begins a new one"
        )
    return ""


def fitting(parts: list[str], width: int) -> str:
    """Join as many parts as fit into a line, the first one whatever it is."""
    line = parts[0][:width]
    for part in parts[1:]:
        if len(line) + len(GAP) + len(part) > width:
            break
        line += GAP + part
    return line


def statistics(chat: Chat) -> list[str]:
    """Return what all answers of a conversation cost, and what their drafts were worth."""
    if not chat.answers:
        return ["Nothing was asked yet"]
    every = [answer.stats for answer in chat.answers]
    totals = Totals()
    for stats in every:
        if stats.generation_tokens:  # and was not stopped before
            totals.add(stats)
    prompts = sum(stats.prompt_tokens for stats in every)
    reused = sum(stats.cached_tokens for stats in every)
    prompt_s = sum(stats.prompt_s for stats in every)
    generation_s = sum(stats.generation_s for stats in every)
    stopped = sum(answer.end == "stopped" for answer in chat.answers)
    note = f", {stopped} of them stopped" if stopped else ""
    return [
        f"Answers: {len(every)}{note}",
        f"Prompts: {prompts} tokens, {reused} of them reused, "
        f"{rate(prompts - reused, prompt_s)} new ones per second",
        f"Generation: {totals.tokens} tokens, "
        f"{rate(totals.tokens - totals.requests, generation_s)} per second",
        *drafts(totals),
        f"Context: {chat.answers[-1].used} of {chat.context} tokens",
        f"Peak memory: {totals.peak_memory_bytes / 1e9:.3f} GB",
    ]
