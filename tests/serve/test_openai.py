"""The openai package drives every field, streaming and not, and gets what the engine says."""

import asyncio

import pytest
from openai import AsyncOpenAI, OpenAI

from gemma_mtp_mlx import Pair, SamplingParams
from gemma_mtp_mlx.session import Result
from tests.serve.process import ServerProcess

PROMPT = "def add(a, b):"
MESSAGES = [{"role": "user", "content": PROMPT}]
SETTINGS = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    {"temperature": 0.7, "seed": 2**32 - 1, "presence_penalty": 1.5, "frequency_penalty": -0.5},
]


def plain(pair: Pair, **settings: object) -> Result:
    """What the engine says to the prompt without a drafter."""
    return pair.generate(PROMPT, SamplingParams(**settings), num_draft_tokens=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("stream", [False, True])
def test_text_is_the_engines(
    client: OpenAI, pair: Pair, settings: dict[str, float], stream: bool
) -> None:
    answer = client.chat.completions.create(
        model="builtin", messages=MESSAGES, max_tokens=24, stream=stream, **settings
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    assert text == plain(pair, max_tokens=24, **settings).text


def test_text_does_not_depend_on_who_else_is_served(server: ServerProcess, pair: Pair) -> None:
    async def ask(client: AsyncOpenAI, number: int) -> str:
        settings = SETTINGS[number % len(SETTINGS)]
        answer = await client.chat.completions.create(
            model="builtin", messages=MESSAGES, max_tokens=12 + number, **settings
        )
        return answer.choices[0].message.content

    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(8)))

    expected = [
        plain(pair, max_tokens=12 + number, **SETTINGS[number % len(SETTINGS)]).text
        for number in range(8)
    ]
    assert asyncio.run(run()) == expected
