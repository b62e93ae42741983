"""Coroutines share one running batch: each gets its own text, and its own errors."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gemma_mtp_mlx import Pair, SamplingParams, Session, hub, load
from gemma_mtp_mlx.async_session import AsyncSession
from gemma_mtp_mlx.session import Chunk

PROMPTS = ["def add(a, b):", "class Stack:", "import os\n", "for i in range("]
PARAMS = [SamplingParams(max_tokens=20), SamplingParams(max_tokens=12, temperature=0.8, seed=4)]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load(hub.builtin())


def session_of(pair: Pair) -> Session:
    return pair.session(max_batch=3, positions=3000)


async def text_of(chunks: AsyncIterator[Chunk]) -> str:
    pieces = [chunk async for chunk in chunks]
    assert [piece.result is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    return "".join(piece.text for piece in pieces)


def test_each_coroutine_gets_its_own_text(pair: Pair) -> None:
    async def run() -> list[str]:
        async with AsyncSession(lambda: session_of(pair)) as session:
            streams = [session.stream(p, PARAMS[n % 2]) for n, p in enumerate(PROMPTS)]
            return await asyncio.gather(*map(text_of, streams))

    found = asyncio.run(run())  # first: nothing of the pair may wait for another thread
    assert found == [
        pair.generate(prompt, PARAMS[n % 2], num_draft_tokens=0).text
        for n, prompt in enumerate(PROMPTS)
    ]


def test_bad_input_is_its_senders(pair: Pair) -> None:
    async def run() -> str:
        async with AsyncSession(lambda: session_of(pair)) as session:
            good = asyncio.create_task(text_of(session.stream(PROMPTS[0], PARAMS[0])))
            with pytest.raises(ValueError, match="context is 4096"):
                await text_of(session.stream([7] * 5000))
            return await good

    assert asyncio.run(run()) == pair.generate(PROMPTS[0], PARAMS[0], num_draft_tokens=0).text


def test_who_stops_listening_frees_the_row(pair: Pair) -> None:
    sessions = []

    def make() -> Session:
        sessions.append(session_of(pair))
        return sessions[0]

    async def run() -> None:
        async with AsyncSession(make) as session:
            chunks = session.stream(PROMPTS[0], SamplingParams(max_tokens=2000))
            await anext(chunks)
            await chunks.aclose()  # type: ignore[attr-defined]
            await text_of(session.stream(PROMPTS[1], PARAMS[1]))
            assert not sessions[0].engine.running

    asyncio.run(run())


def test_the_end_of_the_session_reaches_everybody(pair: Pair) -> None:
    async def run() -> None:
        async with AsyncSession(lambda: session_of(pair)) as session:
            waiting = asyncio.create_task(
                text_of(session.stream(PROMPTS[0], SamplingParams(max_tokens=2000)))
            )
            await text_of(session.stream(PROMPTS[1], PARAMS[1]))
        with pytest.raises(RuntimeError, match="session has ended"):
            await waiting
        with pytest.raises(RuntimeError, match="session has ended"):
            await text_of(session.stream(PROMPTS[0]))

    asyncio.run(run())


def test_a_failure_of_the_batch_reaches_everybody(pair: Pair) -> None:
    def make() -> Session:
        session = session_of(pair)

        def fail() -> None:
            raise MemoryError("no memory")

        session.engine.step = fail  # type: ignore[method-assign, assignment]
        return session

    async def run() -> None:
        async with AsyncSession(make) as session:
            with pytest.raises(RuntimeError, match="no memory"):
                await text_of(session.stream(PROMPTS[0]))

    asyncio.run(run())
