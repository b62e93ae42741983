"""The engine behind the protocols: its share for each answer, and what is told when it is dead."""

import asyncio
from typing import Any

import pytest

from gemma_mtp_mlx import Pair, SamplingParams
from gemma_mtp_mlx.async_session import AsyncSession
from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.serve.app import make_app
from gemma_mtp_mlx.serve.card import Card
from gemma_mtp_mlx.serve.errors import Refusal
from gemma_mtp_mlx.serve.log import Entry
from gemma_mtp_mlx.serve.runner import Ask, Runner
from gemma_mtp_mlx.serve.served import Served
from gemma_mtp_mlx.serve.settings import Settings
from gemma_mtp_mlx.session import Session

CARD = Card(1, 2, "BF16", "", {}, None, "", {})
SERVED = Served("m", frozenset(), None, "f", 4096, thinks=False, markers=None, card=CARD)
GREEDY = SamplingParams()


def runner_of(pair: Pair, *, dies: bool = False) -> Runner:
    """Return a runner for two rows of 1000 positions each. dies: in its first step."""

    def make() -> Session:
        session = pair.session(max_batch=2, positions=2000)

        def fail() -> None:
            raise MemoryError("no memory")

        if dies:
            session.engine.step = fail  # type: ignore[method-assign, assignment]
        return session

    return Runner(AsyncSession(make), SERVED, Settings(max_batch=2, max_queue=1))


async def status_of(runner: Runner, path: str) -> int:
    """Ask the application for a path. Returns the status."""
    statuses = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope = {"type": "http", "method": "GET", "path": path, "query_string": b""}
    headers = [(b"host", b"localhost")]
    await make_app(runner)({**scope, "headers": headers}, receive, send)
    return int(statuses[0])


def test_a_dead_engine_is_told(pair: Pair) -> None:
    async def run() -> None:
        runner = runner_of(pair, dies=True)
        async with runner.session:
            await runner.start()
            assert await status_of(runner, "/health") == 200
            for _ in range(2):
                with pytest.raises(Refusal, match="the engine has stopped: no memory") as caught:
                    async with runner.answer(
                        Ask(["a"], GREEDY), Entry("1", "POST", "/")
                    ) as answers:
                        await anext(aiter(answers))
                assert caught.value.status_code == 503
            assert await status_of(runner, "/health") == 503
            assert runner.waiting == 0

    asyncio.run(run())


def test_who_names_no_limit_gets_a_share(pair: Pair) -> None:
    async def limit(runner: Runner, prompt: list[int], max_tokens: int | None) -> int:
        ask = Ask([prompt], GREEDY, max_tokens)
        async with runner.answer(ask, Entry("1", "POST", "/")) as answers:
            return answers.requests[0].max_tokens

    async def run() -> None:
        runner = runner_of(pair)
        async with runner.session:
            await runner.start()
            assert await limit(runner, [7] * 10, None) == 1000 - seat_size(10)
            assert await limit(runner, [7] * 10, 1500) == 1500
            # More than its share already: what is usual, where it is there.
            assert await limit(runner, [7] * 1200, None) == 512
            assert await limit(runner, [7] * 1900, None) == 2000 - seat_size(1900)
            with pytest.raises(Refusal, match="1990 tokens and 1 new ones need 2007"):
                await limit(runner, [7] * 1990, None)

    asyncio.run(run())
