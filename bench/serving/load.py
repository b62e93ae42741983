"""Streams of one server, asked for in a closed loop or as they arrive, with their time stamps.

Closed loop: so many streams, each asks again as soon as it has its answer. Open loop: arrivals do
not wait for anybody, and a wait counts from the arrival, whether or not the client came to send it.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.serving.answers import Answer, read_answer
from bench.serving.client import ask
from gemma_mtp_mlx import prompt_kinds

PATH = "/v1/chat/completions"
PHASE_S = 900  # longer and a server counts as stuck


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. at: seconds after the start (open loop only)."""

    content: str
    max_tokens: int
    at: float = 0.0


@dataclass(slots=True)
class Stream:
    """A question's answer in time. pieces: when text came, seconds from the start."""

    asked: float
    pieces: list[float] = field(default_factory=list)
    answer: Answer = field(default_factory=Answer)


class Client:
    """Asks one server for streams and keeps the time."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    async def stream(self, question: Question, asked: float) -> Stream:
        """Ask one question. Raises: ValueError unless all tokens asked for have come."""
        stream = Stream(asked)
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question.content}],
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with ask(self._port, PATH, body) as reply:
            async for characters in read_answer(reply, stream.answer):
                if characters:
                    stream.pieces.append(self.now())
        made = stream.answer.completion_tokens
        if made != question.max_tokens or not stream.pieces:
            raise ValueError(f"{question.max_tokens} tokens were asked for, {made} came")
        return stream

    async def closed(self, questions: list[Question], streams: int) -> list[Stream]:
        """Ask all questions, at most so many at a time. Returns the answers in their order."""
        waiting = iter(range(len(questions)))
        done: dict[int, Stream] = {}
        self._start = time.perf_counter()

        async def one() -> None:
            for number in waiting:
                done[number] = await self.stream(questions[number], self.now())

        await _all([one() for _ in range(streams)])
        return [done[number] for number in range(len(questions))]

    async def open(self, questions: list[Question]) -> list[Stream]:
        """Ask each question at its time. Returns the answers in their order."""
        self._start = time.perf_counter()

        async def one(question: Question) -> Stream:
            await asyncio.sleep(question.at - self.now())
            return await self.stream(question, question.at)

        return await _all([one(question) for question in questions])


async def _all(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run all at once; the first error, or too long a time, ends the others.

    Raises: ValueError.
    """
    try:
        async with asyncio.timeout(PHASE_S), asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except* (OSError, ValueError) as errors:  # TimeoutError is an OSError
        raise ValueError(str(errors.exceptions[0]) or f"not done in {PHASE_S} s") from None
    return [task.result() for task in tasks]


def contents(kinds: Sequence[str]) -> list[str]:
    """Return the built-in prompts of some kinds, of conversations what was said last."""
    prompts = [prompt for kind in kinds for prompt in prompt_kinds.read(kind)]
    return [p if isinstance(p, str) else str(p[-1]["content"]) for p in prompts]


def questions(
    count: int, tag: str, max_tokens: int, kinds: Sequence[str] = ("chat",)
) -> list[Question]:
    """Return prompts of some kinds in a fixed random order, `max_tokens` each.

    tag: makes them other texts from the first line on, so that nothing is found in a prompt cache.
    """
    texts = contents(kinds)
    order = np.random.RandomState(7).permutation(len(texts))
    chosen = [texts[order[number % len(order)]] for number in range(count)]
    return [Question(f"# {tag} {n}\n{text}", max_tokens) for n, text in enumerate(chosen)]


def arrivals(count: int, tag: str, rate: float, max_tokens: int) -> list[Question]:
    """Return prompts that arrive as a Poisson process of `rate` per second, the same every time.

    They are of all categories, so of mixed lengths, and want a quarter of max_tokens to all of it.
    """
    random = np.random.RandomState(11)
    at = np.cumsum(random.exponential(1 / rate, count)).tolist()
    wanted = random.randint(-(-max_tokens // 4), max_tokens + 1, count).tolist()
    asked = questions(count, tag, max_tokens, prompt_kinds.KINDS)
    return [Question(q.content, w, t) for q, w, t in zip(asked, wanted, at, strict=True)]
