"""What an endpoint has said so far: the same record for a stream and for one whole body.

Tokens are what the server counts in its usage fields, never pieces: a piece may hold several
tokens, or none that has become text yet.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from bench.serving.client import Reply


@dataclass(slots=True)
class Answer:
    """Texts and reasons by choice; usage once it is told. complete: all of it has come."""

    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    complete: bool = False

    def add(self, said: dict[str, Any]) -> int:
        """Take one object of a reply. Returns the characters of text in it.

        Raises: ValueError with the server's message, if it is an error.
        """
        if said.get("error"):
            error = said["error"]
            raise ValueError(str(error.get("message", error) if isinstance(error, dict) else error))
        if "choices" not in said:
            return self._add_ollama(said)
        usage = said.get("usage")
        if usage:
            self.prompt_tokens = usage["prompt_tokens"]
            self.completion_tokens = usage["completion_tokens"]
        return sum(self._add_choice(choice) for choice in said["choices"])

    def _add_choice(self, choice: dict[str, Any]) -> int:
        """Take a choice of OpenAI's: a completion, a message or a delta."""
        message = choice.get("delta") or choice.get("message") or {}
        index, text = choice["index"], choice.get("text") or message.get("content") or ""
        self.texts[index] = self.texts.get(index, "") + text
        if choice.get("finish_reason"):
            self.finishes[index] = choice["finish_reason"]
        told = choice.get("logprobs") or {}
        values = told.get("token_logprobs") or [of["logprob"] for of in told.get("content") or []]
        if values:
            self.logprobs[index] = self.logprobs.get(index, []) + values
        return len(text)

    def _add_ollama(self, said: dict[str, Any]) -> int:
        """Take an object of Ollama's."""
        text = said.get("response") or (said.get("message") or {}).get("content") or ""
        self.texts[0] = self.texts.get(0, "") + text
        if said.get("done"):
            self.finishes[0] = said.get("done_reason") or ""
            self.prompt_tokens = said.get("prompt_eval_count")
            self.completion_tokens = said.get("eval_count")
            self.complete = True
        return len(text)


async def read_answer(reply: Reply, answer: Answer) -> AsyncIterator[int]:
    """Read a reply into an answer; yields the characters of text in each piece as it comes.

    Raises: ValueError for an error of the server's, or a reply that ends before it is complete.
    """
    if reply.status != 200:
        text = (await reply.read()).decode(errors="replace")
        raise ValueError(f"{reply.status}: {' '.join(text.split())[:300]}")
    if reply.headers.get("content-type", "").startswith("application/json"):
        length = answer.add(json.loads(await reply.read()))
        answer.complete = True
        yield length
        return
    async for line in reply.lines():
        if line.startswith(b":"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            answer.complete = True
        elif not line.startswith(b"event:"):
            yield answer.add(json.loads(data))
    if not answer.complete:
        raise ValueError("the stream ended before it said so")


def difference(got: Answer, wanted: Answer) -> str | None:
    """Say how an answer differs from the one it should be; a part has to be its beginning."""
    for index, text in got.texts.items():
        whole = wanted.texts.get(index)
        if whole is None:
            return f"choice {index} was not asked for"
        if (text != whole) if got.complete else not whole.startswith(text):
            return f"choice {index} is {text!r}, not {whole!r}"
    if not got.complete:
        return None
    for what in ("finishes", "completion_tokens", "prompt_tokens", "logprobs"):
        if (it := getattr(got, what)) != (due := getattr(wanted, what)):
            return f"{what} are {it!r}, not {due!r}"
    return None if got.texts.keys() == wanted.texts.keys() else "a choice is missing"
