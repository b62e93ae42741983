"""From chunks to what Ollama's clients read: one object a chunk, and one at the end that counts.

Times are in nanoseconds. load_duration is what passes before the prompt is computed, preparing and
queueing; prompt_eval_duration ends with the first token, eval_duration with the reply; the three
are total_duration. draft_rounds, draft_n and draft_n_accepted are ours: rounds of the model, tokens
drafted, and drafts that became part of the answer.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from llguidance import LLTokenizer

from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.sections import ToolCall
from gemma_mtp_mlx.serve.card import stamp
from gemma_mtp_mlx.serve.openai_reply import spelled_logprob
from gemma_mtp_mlx.session import Chunk, Result

NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Form:
    """What a reply looks like.

    model: as the client calls it; chat: whether it is a message, else a response; speller: spells
    tokens for log-probabilities, None if none are asked for; calls: whether tool calls are given
    as such; context: whether the last object has the tokens so far; ignored: options of no effect.
    """

    model: str
    chat: bool
    speller: LLTokenizer | None = None
    calls: bool = False
    context: bool = False
    ignored: Sequence[str] = ()

    def body(self, said: Mapping[str, Any], *, done: bool) -> dict[str, Any]:
        """Return an object that says something. said: text, and thinking and calls if any."""
        head = {"model": self.model, "created_at": stamp(datetime.now(UTC))}
        more = {name: said[name] for name in ("thinking", "tool_calls") if said.get(name)}
        text = said.get("text", "")
        if self.chat:
            return {**head, "message": {"role": "assistant", "content": text, **more}, "done": done}
        return {**head, "response": text, **more, "done": done}

    def loaded(self) -> dict[str, Any]:
        """Return the reply to a request that asks for nothing: the model is there."""
        return {**self.body({}, done=True), "done_reason": "load"}


class Reply:
    """One reply as it grows. began: when the request came; ready: when it was prepared."""

    def __init__(self, form: Form, request: Request, began: float, ready: float) -> None:
        self._form, self._request = form, request
        self._began, self._ready = began, ready
        self._said: dict[str, Any] = {"text": "", "thinking": "", "tool_calls": []}
        self._logprobs: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}

    def take(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Take a chunk in. Returns the objects that a stream shows of it."""
        said, logprobs = self._read(chunk), self._spelled(chunk)
        for name, value in said.items():
            self._said[name] += value
        self._logprobs += logprobs
        shown = []
        if any(said.values()) or logprobs:
            shown.append(self._form.body(said, done=False))
            if logprobs:
                shown[0]["logprobs"] = logprobs
        if chunk.result is not None:
            self._last = self._end(chunk.result)
            shown.append({**self._form.body({}, done=True), **self._last})
        return shown

    def whole(self) -> dict[str, Any]:
        """Return the reply that is not streamed."""
        body = {**self._form.body(self._said, done=True), **self._last}
        if self._form.speller is not None:
            body["logprobs"] = self._logprobs
        return body

    def _read(self, chunk: Chunk) -> dict[str, Any]:
        if self._request.sections is None:
            return {"text": chunk.text}
        said: dict[str, Any] = {"text": "", "thinking": "", "tool_calls": []}
        for piece in chunk.pieces:
            if piece.kind == "tool_call" and self._form.calls:
                before = len(self._said["tool_calls"]) + len(said["tool_calls"])
                said["tool_calls"] += [_call(c, before + n) for n, c in enumerate(piece.calls)]
            else:
                said["thinking" if piece.kind == "reasoning" else "text"] += piece.text
        return said

    def _spelled(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Return the log-probabilities of a chunk's tokens, but for one that ended the text."""
        if self._form.speller is None:
            return []
        tokens = chunk.tokens
        if chunk.result is not None and self._request.sections is not None:
            tokens = tokens[: len(self._request.sections.kinds) - len(self._logprobs)]
        pairs = zip(tokens, chunk.logprobs, strict=False)
        return [spelled_logprob(self._form.speller, token, logprob) for token, logprob in pairs]

    def _end(self, result: Result) -> dict[str, Any]:
        """Return what the last object says beside the text."""
        stats = result.stats
        total = time.perf_counter() - self._began
        load = self._ready - self._began + stats.queued_s
        counted: dict[str, Any] = {
            "done_reason": result.finish_reason,
            "total_duration": _ns(total),
            "load_duration": _ns(load),
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": _ns(stats.prompt_s),
            "eval_count": stats.generation_tokens,
            "eval_duration": _ns(total - load - stats.prompt_s),
            "draft_rounds": stats.draft_rounds,
            "draft_n": stats.draft_n,
            "draft_n_accepted": stats.draft_n_accepted,
        }
        if self._form.context:
            counted["context"] = [*self._request.prompt, *self._request.tokens]
        if self._form.ignored:
            counted["ignored_options"] = list(self._form.ignored)
        return counted


def _ns(seconds: float) -> int:
    """Return a time as clients count it; none is 0, which they would divide by."""
    return max(round(seconds * NS), 1)


def _call(call: ToolCall, index: int) -> dict[str, Any]:
    function = {"index": index, "name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "function": function}
