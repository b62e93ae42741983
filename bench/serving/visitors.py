"""How the soak's clients behave, and what they make of the answers.

A visitor completes its answer, streamed or whole, reads slowly, leaves in the middle, leaves before
the first token, or asks for nonsense. What it got is compared with what it had to get; a part must
be the beginning of it.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.serving.answers import Answer, difference, read_answer
from bench.serving.client import Reply, ask
from bench.serving.jobs import Job

BEHAVIOURS = {"stream": 40, "whole": 25, "slow": 6, "leave": 13, "vanish": 9, "nonsense": 7}
REQUEST_S = 300
RETRY_S = 2.0  # a visitor is less patient than Retry-After may say
MOST_TOLD = 20


@dataclass(slots=True)
class Ledger:
    """What happened. wrong: answers that differ; errors: anything else that must not happen."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0

    def note(self, problems: list[str], text: str) -> None:
        """Count a problem; only the first ones are kept in words."""
        self.counts["wrong" if problems is self.wrong else "errors"] += 1
        if len(problems) < MOST_TOLD:
            problems.append(text)


class Visitor:
    """A client of one server. wanted: the answer of each job, by its number."""

    def __init__(
        self,
        port: int,
        wanted: dict[int, Answer],
        nonsense: list[tuple[str, Any]],
        ledger: Ledger,
        seed: int,
    ) -> None:
        self._port = port
        self._wanted = wanted
        self._nonsense = nonsense
        self._ledger = ledger
        self._random = np.random.RandomState(seed)

    async def visit(self, jobs: list[Job], behaviour: str | None = None) -> None:
        """Ask one of the jobs, behaving somehow; what goes wrong is in the ledger."""
        job = jobs[self._random.randint(len(jobs))]
        if behaviour is None:
            shares = np.array(list(BEHAVIOURS.values())) / sum(BEHAVIOURS.values())
            behaviour = str(self._random.choice(list(BEHAVIOURS), p=shares))
        self._ledger.counts[behaviour] += 1
        try:
            async with asyncio.timeout(REQUEST_S):
                if behaviour == "nonsense":
                    await self._ask_nonsense()
                else:
                    await self._ask(job, behaviour)
        except TimeoutError:
            self._ledger.note(self._ledger.errors, f"{told(job, behaviour)}: not done in time")
        except (OSError, ValueError) as error:
            said = str(error) or type(error).__name__
            self._ledger.note(self._ledger.errors, f"{told(job, behaviour)}: {said}")

    async def _ask(self, job: Job, behaviour: str) -> None:
        """Ask until there is room, then take what the behaviour takes, and compare."""
        answer = Answer()
        stream = behaviour != "whole" and (behaviour != "vanish" or self._random.rand() < 0.5)
        patience = self._random.uniform(0, 0.4) if behaviour == "vanish" else REQUEST_S
        while True:
            try:
                async with asyncio.timeout(patience):
                    again = await self._once(job, behaviour, answer, stream)
            except TimeoutError:
                if behaviour != "vanish":
                    raise
                break
            if again is None:
                break
            await asyncio.sleep(min(again, RETRY_S))
        if answer.complete:
            self._ledger.counts["completed"] += 1
            self._ledger.tokens += answer.completion_tokens or 0
        elif any(answer.texts.values()):
            self._ledger.counts["parts"] += 1
        problem = difference(answer, self._wanted[job.number])
        if problem is not None:
            self._ledger.note(self._ledger.wrong, f"{told(job, behaviour)}: {problem}")

    async def _once(self, job: Job, behaviour: str, answer: Answer, stream: bool) -> float | None:
        """Ask once. Returns after how many seconds to try again, None if there was room."""
        small = 4096 if behaviour == "slow" else 0
        left = int(self._random.randint(1, 6))
        body = job.asked(stream=stream)
        async with ask(self._port, job.path, body, receive_bytes=small) as reply:
            if reply.status == 429:
                self._ledger.counts["429"] += 1
                return retry_after(reply)
            async for characters in read_answer(reply, answer):
                left -= bool(characters)
                if behaviour == "leave" and left <= 0:
                    return None
                if behaviour == "slow":
                    await asyncio.sleep(0.2)
        return None

    async def _ask_nonsense(self) -> None:
        """Ask for what must be refused, and see that it is."""
        path, body = self._nonsense[self._random.randint(len(self._nonsense))]
        async with ask(self._port, path, body) as reply:
            said = await reply.read()
            if not 400 <= reply.status < 500:
                raise ValueError(f"{path} {body!r:.80} was answered {reply.status} {said[:80]!r}")


def retry_after(reply: Reply) -> float:
    """Return a refusal's Retry-After. Raises: ValueError if it is not a number of seconds."""
    seconds = reply.headers.get("retry-after", "")
    if not seconds.isdecimal() or int(seconds) < 1:
        raise ValueError(f"a full queue was answered with Retry-After {seconds!r}")
    return float(seconds)


def told(job: Job, behaviour: str) -> str:
    """Return how a job is called in a message."""
    return f"job {job.number} ({job.path}, {behaviour})"
