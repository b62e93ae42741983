"""From a request that a protocol has understood to its answers, piece by piece.

All protocols come through here: it bounds the queue, prepares prompts beside the batch's thread,
submits them, frees rows that nobody waits for, and counts. Everything but preparing happens on
the event loop.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from llguidance import LLTokenizer

from gemma_mtp_mlx.async_session import AsyncSession, SessionEnded
from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.engine import Occupancy
from gemma_mtp_mlx.prompts import Prompt
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.serve.errors import Refusal
from gemma_mtp_mlx.serve.log import Entry
from gemma_mtp_mlx.serve.metrics import Metrics
from gemma_mtp_mlx.serve.served import Served
from gemma_mtp_mlx.serve.settings import Settings
from gemma_mtp_mlx.session import Chunk, Result, Session

PREPARING = 2  # prompts tokenised and grammars compiled at a time
LEAST_DEFAULT = 512  # tokens for an answer whose request names no limit
LONGEST_RETRY_S = 60


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client wants generated: `choices` answers to each of its prompts.

    params: but for max_tokens, which is max_tokens, None for what a row's share of the memory
    allows. template: whether a text goes through the chat template. sections: whether answers
    come in pieces, thinking and tool calls apart. before: tokens that go before the prompts, which
    then do not begin a text.
    """

    prompts: Sequence[Prompt]
    params: SamplingParams
    max_tokens: int | None = None
    choices: int = 1
    template: bool = True
    sections: bool = True
    tools: Sequence[Mapping[str, Any]] = ()
    before: Sequence[int] = ()


class Answers:
    """The answers to one request, in order: to the first prompt, to the second, ...

    Iterate once, for chunks whose index is the answer's; results has what is done by then.
    """

    def __init__(
        self, chunks: AsyncGenerator[Chunk], requests: Sequence[Request], choices: int, entry: Entry
    ) -> None:
        self.requests = requests
        self.prompt_tokens = sum(len(request.prompt) for request in requests[::choices])
        self._chunks = chunks
        self._entry = entry
        self._results: dict[int, Result] = {}

    @property
    def results(self) -> list[Result]:
        """The results that are there."""
        return [self._results[index] for index in sorted(self._results)]

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield chunks as they come. Raises: Refusal for an answer that failed."""
        try:
            async for chunk in self._chunks:
                if chunk.result is not None:
                    self._results[chunk.index] = chunk.result
                    if chunk.result.error is not None:
                        raise failed(chunk.result.error)
                yield chunk
        except SessionEnded as error:
            raise Refusal(503, f"the engine has stopped: {error.__cause__}") from error


class Runner:
    """One engine, and the queue in front of it. session has to be running before `start`."""

    def __init__(self, session: AsyncSession, served: Served, settings: Settings) -> None:
        self.session = session
        self.served = served
        self.settings = settings
        self.metrics = Metrics(served.name, lambda: self.waiting, self.occupancy)
        self._pool = ThreadPoolExecutor(PREPARING, "prepare")
        self._session: Session | None = None
        self._open = 0  # answers that are prepared, wait or run
        self._answer_s = 1.0  # what an answer took of late

    async def start(self) -> None:
        """Wait until the session is there. Raises: ValueError if its memory is not."""
        try:
            self._session = await self.session.call(lambda session: session)
        except SessionEnded as error:
            raise (error.__cause__ or error) from None

    def occupancy(self) -> Occupancy:
        """What the engine holds, as seen from another thread while it works."""
        assert self._session is not None
        return self._session.engine.occupancy

    @property
    def waiting(self) -> int:
        """Answers that are prepared or wait for a row."""
        return max(self._open - self.occupancy().running, 0)

    @asynccontextmanager
    async def answer(self, ask: Ask, entry: Entry) -> AsyncIterator[Answers]:
        """Take a request in; its answers run until the context ends, however it does.

        Raises: Refusal for a full queue, a prompt that is too long and settings that do not fit.
        """
        wanted = len(ask.prompts) * ask.choices
        self._admit(wanted)
        self._open += wanted
        began = time.perf_counter()
        try:
            requests = await self._prepared(ask)
            entry.requests = requests
            async with aclosing(self.session.stream_requests(requests)) as stream:
                watched = self.metrics.watch(stream, requests, entry)
                answers = Answers(watched, requests, ask.choices, entry)
                self.metrics.prompt(answers.prompt_tokens)
                yield answers
            self._answer_s += 0.2 * (time.perf_counter() - began - self._answer_s)
        finally:
            self._open -= wanted

    async def speller(self) -> LLTokenizer:
        """Return what knows every token's bytes. Raises: ValueError if the model has no EOS."""
        assert self._session is not None
        prompts = self._session.prompts
        return await asyncio.get_running_loop().run_in_executor(self._pool, prompts.speller)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of a prompt."""
        assert self._session is not None and self._session.prompts.tokenizer is not None
        return str(self._session.prompts.tokenizer.decode(tokens, skip_special_tokens=True))

    async def _prepared(self, ask: Ask) -> list[Request]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._prepare, ask)
        except ValueError as error:
            raise failed(error) from error

    def _admit(self, wanted: int) -> None:
        """Raise Refusal if there is no room for so many answers."""
        most = self.settings.most_answers
        if wanted > most:
            raise Refusal(
                400,
                f"{wanted} answers are asked for at once; this server takes {most} at a time "
                f"({self.settings.max_batch} running, {self.settings.max_queue} waiting)",
                param="n",
            )
        if self._open + wanted > most:
            wait = math.ceil(self._answer_s * wanted / self.settings.max_batch)
            raise Refusal(
                429,
                f"the queue is full: {self._open} answers are running or waiting, of {most}",
                code="queue_full",
                headers={"Retry-After": str(min(max(wait, 1), LONGEST_RETRY_S))},
            )

    def _prepare(self, ask: Ask) -> list[Request]:
        """Turn a request into what the engine runs, in a thread of the pool."""
        assert self._session is not None
        prompts, seating = self._session.prompts, self._session.engine.seating
        requests = []
        for prompt in ask.prompts:
            ids = prompts.encode(
                prompt, template=ask.template, thinking=ask.params.thinking, tools=ask.tools
            )
            if ask.before:
                begins = prompts.tokenizer is not None and ids[0] == prompts.tokenizer.bos_token_id
                ids = [*ask.before, *ids[begins:]]
            most = self._share(len(ids)) if ask.max_tokens is None else ask.max_tokens
            for params in replace(ask.params, max_tokens=most).choices(ask.choices):
                request = prompts.request(ids, params, sections=ask.sections)
                seating.check(request)
                requests.append(request)
        return requests

    def _share(self, prompt: int) -> int:
        """Most tokens of an answer whose request does not say: the model's own limit, if it fits.

        Else what a row's share has left: max_batch such requests run at a time, and what one gets
        does not depend on others.
        """
        assert self._session is not None
        positions = self.occupancy().positions
        share, whole = positions // self.settings.max_batch, positions
        fits = max(share - seat_size(prompt), min(LEAST_DEFAULT, whole - seat_size(prompt)), 1)
        return min(fits, self.served.card.max_new_tokens or fits)


def failed(error: Exception) -> Refusal:
    """Return what went wrong with an answer as its client is told."""
    if isinstance(error, ValueError):
        return Refusal(400, " ".join(str(error).split()))
    return Refusal(500, f"this answer failed: {' '.join(str(error).split())[:500]}")
