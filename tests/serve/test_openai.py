"""The openai package drives every field, streaming and not, and gets what the engine says."""

import asyncio
import json
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from gemma_mtp_mlx import Pair, SamplingParams
from gemma_mtp_mlx.sampling import derived_seed
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


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ab", "cd"]}, "n": {"type": "integer", "maximum": 9}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
# What a client sends, and what the engine is given for it.
FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"stop": "return"}, {"stop": ("return",)}),
    ({"stop": ["nothing", "a"]}, {"stop": ("nothing", "a")}),
    ({"logit_bias": {"40": 100, "50": -100.0}}, {"logit_bias": {40: 100.0, 50: -100.0}}),
    ({"seed": -1, "temperature": 1}, {"seed": 2**32 - 1, "temperature": 1.0}),
    ({"seed": 5}, {"seed": 5, "temperature": 1.0}),  # the protocol's temperature
    (
        {"extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}, "seed": 1},
        {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 1, "temperature": 1.0},
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        {"json_schema": SCHEMA},
    ),
    ({"response_format": {"type": "json_object"}}, {"json_schema": {}}),
    ({"response_format": {"type": "text"}}, {}),
    # Of no consequence.
    ({"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}, {}),
    ({"modalities": ["text"], "parallel_tool_calls": True, "tools": []}, {}),
]


@pytest.mark.parametrize("sent, meant", FIELDS)
def test_fields_mean_what_they_say(
    client: OpenAI, pair: Pair, sent: dict[str, Any], meant: dict[str, Any]
) -> None:
    settings = {"temperature": 0, **sent} if "temperature" not in meant else sent
    answer = client.chat.completions.create(
        model="builtin", messages=MESSAGES, max_completion_tokens=16, **settings
    )
    expected = plain(pair, max_tokens=16, **meant)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason


def test_choices_have_seeds_of_their_own(client: OpenAI, pair: Pair) -> None:
    answer = client.chat.completions.create(
        model="builtin", messages=MESSAGES, max_tokens=12, seed=3, n=3
    )
    expected = [
        plain(pair, max_tokens=12, temperature=1.0, seed=derived_seed(3, n)).text for n in range(3)
    ]
    assert [choice.message.content for choice in answer.choices] == expected
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="builtin", messages=MESSAGES, max_tokens=12, seed=3, n=3, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected


def test_logprobs_are_the_engines(client: OpenAI, pair: Pair) -> None:
    result = plain(pair, max_tokens=10, logprobs=3)
    settings: Any = {"model": "builtin", "messages": MESSAGES, "max_tokens": 10, "temperature": 0}
    answer = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == result.text
    assert [entry.logprob for entry in entries] == [each.logprob for each in result.logprobs]
    assert [[other.logprob for other in entry.top_logprobs] for entry in entries] == [
        [value for _, value in each.top] for each in result.logprobs
    ]
    streamed = []
    for chunk in client.chat.completions.create(
        **settings, logprobs=True, top_logprobs=3, stream=True
    ):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == entries


def test_usage_counts_tokens_and_drafts(client: OpenAI, pair: Pair) -> None:
    settings: Any = {"model": "builtin", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**settings).usage
    *_, last = client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    for usage in (whole, last.usage):
        assert usage.prompt_tokens == len(pair.encode(PROMPT))
        assert usage.completion_tokens == 40
        assert usage.total_tokens == usage.prompt_tokens + 40
        details = usage.completion_tokens_details
        assert 0 < details.accepted_prediction_tokens < 40
        assert details.rejected_prediction_tokens >= 0


def test_a_long_prompt_is_taken_over(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "x = 1\n" * 150}]
    settings: Any = {"model": "builtin", "messages": messages, "max_tokens": 2, "temperature": 0}
    first, second = (client.chat.completions.create(**settings) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    details = second.usage.prompt_tokens_details
    assert details.cached_tokens >= 512


def test_completions_continue_a_text(client: OpenAI, pair: Pair) -> None:
    ids = pair.encode(PROMPT, template=False)
    expected = pair.generate(ids, SamplingParams(max_tokens=16, logprobs=2), num_draft_tokens=0)
    other = pair.generate(
        pair.encode("import", template=False), SamplingParams(max_tokens=16), num_draft_tokens=0
    )
    settings: Any = {"model": "builtin", "temperature": 0}
    answer = client.completions.create(prompt=[PROMPT, "import"], **settings)
    assert [choice.text for choice in answer.choices] == [expected.text, other.text]
    assert answer.usage.completion_tokens == 32  # 16 is the protocol's default
    by_ids = client.completions.create(prompt=ids, logprobs=2, echo=False, **settings)
    assert by_ids.choices[0].text == expected.text
    logprobs = by_ids.choices[0].logprobs
    assert logprobs.token_logprobs == [each.logprob for each in expected.logprobs]
    assert "".join(logprobs.tokens) == expected.text
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    echoed = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(prompt=PROMPT, echo=True, stream=True, **settings)
    )
    assert echoed == PROMPT + expected.text


def test_models_are_listed_and_checked(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["builtin"]
    assert client.models.retrieve("BUILTIN").id == "builtin"
    with pytest.raises(NotFoundError, match="there is builtin") as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "sent, param",
    [
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"audio": {"voice": "x", "format": "mp3"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"extra_body": {"web_search_options": {}}}, "web_search_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
            "tools",
        ),
    ],
)
def test_what_is_refused_is_named(client: OpenAI, sent: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model="builtin", messages=MESSAGES, **sent)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "message, says",
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "text only",
        ),
        ({"role": "user", "content": None}, "has no content"),
        ({"role": "robot", "content": "a"}, "messages.0.role"),
        ({"role": "tool", "content": "a", "tool_call_id": "1"}, "unknown role"),
    ],
)
def test_messages_that_cannot_be_read(client: OpenAI, message: Any, says: str) -> None:
    with pytest.raises(BadRequestError, match=says):
        client.chat.completions.create(model="builtin", messages=[message])


def test_parts_and_roles_are_one_text(client: OpenAI, pair: Pair) -> None:
    parts = [{"type": "text", "text": "def add"}, {"type": "text", "text": "(a, b):"}]
    answer = client.chat.completions.create(
        model="builtin",
        messages=[{"role": "developer", "content": "Python"}, {"role": "user", "content": parts}],
        max_tokens=8,
        temperature=0,
    )
    ids = pair.encode(PROMPT, system="Python")
    expected = pair.generate(ids, SamplingParams(max_tokens=8), num_draft_tokens=0)
    assert answer.choices[0].message.content == expected.text


def test_every_response_has_its_id_and_line(server: ServerProcess, client: OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="builtin", messages=MESSAGES, max_tokens=20, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert answer.headers["x-request-id"] == "mine-1"
    (entry,) = [entry for entry in server.entries() if entry["id"] == "mine-1"]
    usage = answer.parse().usage
    assert entry["status"] == 200 and entry["endpoint"] == "/v1/chat/completions"
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (usage.prompt_tokens, 20)
    assert entry["accepted"] == usage.completion_tokens_details.accepted_prediction_tokens
    assert entry["drafted"] - entry["accepted"] == (
        usage.completion_tokens_details.rejected_prediction_tokens
    )
    assert PROMPT not in json.dumps(server.entries())


def test_metrics_add_up(server: ServerProcess, client: OpenAI) -> None:
    before = server.metrics()
    usage = client.chat.completions.create(
        model="builtin", messages=MESSAGES, max_tokens=30, temperature=0
    ).usage
    after = server.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    details = usage.completion_tokens_details
    accepted, rejected = (
        details.accepted_prediction_tokens,
        details.rejected_prediction_tokens,
    )
    assert grown("vllm:spec_decode_num_accepted_tokens_total") == accepted
    assert grown("vllm:spec_decode_num_draft_tokens_total") == accepted + rejected
    positions = [
        grown(f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{place}"}}')
        for place in range(15)
    ]
    assert sum(positions) == accepted
    assert positions == sorted(positions, reverse=True)
    assert positions[0] <= grown("vllm:spec_decode_num_drafts_total") <= 30
    assert grown("vllm:generation_tokens_total") == 30
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    assert grown("vllm:inter_token_latency_seconds_count") == 29
    assert grown('vllm:request_success_total{finished_reason="length"}') == 1
    assert after["vllm:num_requests_running"] == after["vllm:kv_cache_usage_perc"] == 0
