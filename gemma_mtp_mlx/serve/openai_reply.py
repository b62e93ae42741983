"""From chunks to what OpenAI's clients read: choices, deltas, log-probabilities, usage."""

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from llguidance import LLTokenizer

from gemma_mtp_mlx.outcome import Logprob
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.sections import Piece, ToolCall
from gemma_mtp_mlx.serve.runner import Answers
from gemma_mtp_mlx.serve.served import Served
from gemma_mtp_mlx.session import Chunk

LEAST_LOGPROB = -9999.0  # of what is impossible: JSON has no infinity, and OpenAI says this
_TEXT_LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def head(kind: str, prefix: str, served: Served) -> dict[str, Any]:
    """Return what every object of a response begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": f"fp_{served.fingerprint}",
    }


def usage(answers: Answers) -> dict[str, Any]:
    """Return the tokens of all answers, and what became of the drafts."""
    stats = [result.stats for result in answers.results]
    generated = sum(each.generation_tokens for each in stats)
    accepted = sum(each.draft_n_accepted for each in stats)
    sections = [r.sections for r in answers.requests if r.sections is not None]
    reasoning = sum(each.kinds.count("reasoning") for each in sections)
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": answers.prompt_tokens + generated,
        "prompt_tokens_details": {
            "cached_tokens": max((e.cached_tokens for e in stats), default=0)
        },
        "completion_tokens_details": {
            "reasoning_tokens": reasoning,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(each.draft_n for each in stats) - accepted,
        },
    }


class ChatChoice:
    """One answer of a chat as it grows: what its next delta says, and what it says in all.

    speller: spells tokens for log-probabilities, None if none are asked for. calls: whether tool
    calls are given as such; else they are text.
    """

    def __init__(
        self, index: int, request: Request, speller: LLTokenizer | None, *, calls: bool
    ) -> None:
        self._index = index
        self._content = ""
        self._reasoning = ""
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None
        self._request = request
        self._speller = speller
        self._gives_calls = calls
        self._waiting: list[tuple[int, Logprob]] = []  # of tokens whose kind is not certain yet
        self._known = 0

    def opening(self) -> list[dict[str, Any]]:
        """Return what a stream shows before anything is generated."""
        return [self._choice({"role": "assistant", "content": ""})]

    def take(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Take a chunk in. Returns the choices, one per piece, that a stream shows of it."""
        shown = [self._delta(piece) for piece in chunk.pieces]
        new = self._new_logprobs(chunk)
        if new and not any("content" in delta for delta in shown):
            shown.append({"content": ""})
        choices = [self._choice(delta) for delta in shown]
        for choice in choices:
            if new and "content" in choice["delta"]:
                choice["logprobs"], new = {"content": new, "refusal": None}, []
        if chunk.result is not None:
            reason = chunk.result.finish_reason
            self._finish_reason = "tool_calls" if self._calls and reason == "stop" else reason
            choices.append(self._choice({}) | {"finish_reason": self._finish_reason})
        return choices

    def whole(self) -> dict[str, Any]:
        """Return the choice of a response that is not streamed."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._calls and not self._content else self._content,
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self._calls:
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"}
                for call in self._calls
            ]
        logprobs = None
        if self._speller is not None:
            logprobs = {"content": self._logprobs, "refusal": None}
        return {
            "index": self._index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason,
        }

    def _choice(self, delta: Mapping[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if piece.kind == "reasoning":
            self._reasoning += piece.text
            return {"reasoning_content": piece.text}
        if piece.kind == "tool_call" and self._gives_calls:
            calls = [_call(call, len(self._calls) + n) for n, call in enumerate(piece.calls)]
            self._calls += calls
            return {"tool_calls": calls}
        self._content += piece.text
        return {"content": piece.text}

    def _new_logprobs(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Return those of text whose tokens have become certain; an EOS token has none."""
        if self._speller is None or self._request.sections is None:
            return []
        self._waiting += zip(chunk.tokens, chunk.logprobs, strict=True)
        kinds = self._request.sections.kinds[self._known :]
        settled = list(zip(self._waiting, kinds, strict=False))
        del self._waiting[: len(settled)]
        self._known += len(settled)
        new = [
            _logprob(self._speller, token, logprob)
            for (token, logprob), kind in settled
            if kind == "text"
        ]
        self._logprobs += new
        return new


def _call(call: ToolCall, index: int) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "index": index,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _logprob(speller: LLTokenizer, token: int, logprob: Logprob) -> dict[str, Any]:
    def spelled(token: int, value: float) -> dict[str, Any]:
        data = speller.decode_bytes([token])
        return {
            "token": data.decode(errors="replace"),
            "logprob": max(value, LEAST_LOGPROB),
            "bytes": list(data),
        }

    best = [spelled(other, value) for other, value in logprob.top]
    return spelled(token, logprob.logprob) | {"top_logprobs": best}


class TextChoice:
    """One completion as it grows. echo: the prompt, if it is to be part of the text."""

    def __init__(self, index: int, speller: LLTokenizer | None, echo: str) -> None:
        self._index = index
        self._speller = speller
        self._echo = echo
        self._text = echo
        self._offset = len(echo)
        self._logprobs: dict[str, list[Any]] = {name: [] for name in _TEXT_LOGPROBS}
        self._finish_reason: str | None = None

    def opening(self) -> list[dict[str, Any]]:
        """Return what a stream shows before anything is generated."""
        return [self._choice(self._echo, None)] if self._echo else []

    def take(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Take a chunk in. Returns the choices that a stream shows of it."""
        self._text += chunk.text
        logprobs = None if self._speller is None else self._spelled(self._speller, chunk)
        if chunk.result is not None:
            self._finish_reason = chunk.result.finish_reason
        shows = chunk.text or chunk.result is not None or (logprobs and chunk.tokens)
        return [self._choice(chunk.text, logprobs)] if shows else []

    def whole(self) -> dict[str, Any]:
        """Return the choice of a response that is not streamed."""
        return self._choice(self._text, self._logprobs if self._speller is not None else None)

    def _choice(self, text: str, logprobs: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason,
        }

    def _spelled(self, speller: LLTokenizer, chunk: Chunk) -> dict[str, list[Any]]:
        """Return the log-probabilities of a chunk in the older shape: lists beside each other."""
        said: dict[str, list[Any]] = {name: [] for name in _TEXT_LOGPROBS}
        for token, logprob in zip(chunk.tokens, chunk.logprobs, strict=True):
            entry = _logprob(speller, token, logprob)
            best = {other["token"]: other["logprob"] for other in entry["top_logprobs"]}
            row = (entry["token"], entry["logprob"], best, self._offset)
            for name, value in zip(_TEXT_LOGPROBS, row, strict=True):
                said[name].append(value)
                self._logprobs[name].append(value)
            self._offset += len(entry["token"])
        return said
