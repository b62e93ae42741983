"""Thinking and tool calls reach the ollama package as such, streaming and not."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from ollama import Client, ResponseError
from openai import OpenAI

from gemma_mtp_mlx.serve.card import Card
from gemma_mtp_mlx.serve.ollama_ask import ask_of_chat
from gemma_mtp_mlx.serve.ollama_schema import ChatRequest
from gemma_mtp_mlx.serve.served import Served
from tests.serve.process import ServerProcess
from tests.serve.wire import request

THOUGHT = "<|channel>thought\nhm, so\n<channel|>"
CALL = '<|tool_call>call:f{a:<|"|>x{,}日<|"|>,b:[1,{c:true}]}<tool_call|>'
ARGUMENTS = {"a": "x{,}日", "b": [1, {"c": True}]}


def f(a: str, b: int) -> str:
    """Do something.

    Args:
        a: one
        b: two
    """
    return a * b


@pytest.fixture
def asks(echo: ServerProcess) -> Iterator[Client]:
    with Client(host=echo.url) as made:
        yield made


def ask(client: Client, script: str, *, stream: bool = False, **more: Any) -> dict[str, Any]:
    """Let the model say a script. Returns what the package made of it."""
    options = {"temperature": 0, "num_predict": 120, **more.pop("options", {})}
    messages = [{"role": "user", "content": script}]
    answer: Any = client.chat(
        model="target", messages=messages, stream=stream, options=options, **more
    )
    parts = list(answer) if stream else [answer]
    calls = [call.function for part in parts for call in part.message.tool_calls or []]
    return {
        "text": "".join(part.message.content or "" for part in parts),
        "thinking": "".join(part.message.thinking or "" for part in parts),
        "calls": [(call.name, call.arguments) for call in calls],
        "tokens": "".join(each.token for part in parts for each in part.logprobs or []),
        "prompt": parts[-1].prompt_eval_count,
        "reason": parts[-1].done_reason,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_apart(asks: Client, stream: bool) -> None:
    script = THOUGHT + "yes, so what"
    said = ask(asks, script, stream=stream, options={"stop": [", so"]})
    assert (said["thinking"], said["text"], said["reason"]) == ("hm, so", "yes", "stop")
    made: Any = asks.generate(
        model="target", prompt=script, options={"temperature": 0}, stream=stream
    )
    parts = list(made) if stream else [made]
    assert "".join(part.thinking or "" for part in parts) == "hm, so"
    assert "".join(part.response for part in parts) == "yes, so what"


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_tool_calls(asks: Client, stream: bool) -> None:
    said = ask(asks, f"{THOUGHT}one{CALL}{CALL}", stream=stream, tools=[f])
    assert said["calls"] == [("f", ARGUMENTS)] * 2
    assert (said["thinking"], said["text"], said["reason"]) == ("hm, so", "one", "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "script, tools", [("a<|tool_call>call it<tool_call|>b", [f]), (CALL, None)]
)
def test_what_is_no_call_is_text(asks: Client, script: str, tools: Any, stream: bool) -> None:
    said = ask(asks, script, stream=stream, tools=tools)
    assert (said["text"], said["calls"]) == (script, [])


def test_calls_have_ids_and_places(echo: ServerProcess) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    said = {"model": "target", "messages": [{"role": "user", "content": CALL * 2}]}
    said |= {"tools": [tool], "stream": False, "options": {"temperature": 0}}
    _, _, data = request(echo.port, "/api/chat", json.dumps(said).encode())
    calls = json.loads(data)["message"]["tool_calls"]
    assert [call["function"]["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2


def test_json_or_a_call(asks: Client) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    settings: Any = {"tools": [f], "format": schema}
    assert ask(asks, '{"n": 12}', **settings)["text"] == '{"n": 12}'
    assert ask(asks, CALL, **settings)["calls"] == [("f", ARGUMENTS)]
    said = ask(asks, "n is 12", think=False, options={"num_predict": 8}, **settings)
    assert said["text"].startswith(("{", "<|tool_call>"))
    thought = ask(asks, THOUGHT + '{"n": 12}', format=schema)  # rules begin behind it
    assert (thought["thinking"], thought["text"]) == ("hm, so", '{"n": 12}')


def test_thinking_is_asked_for_or_not(asks: Client) -> None:
    without = ask(asks, "a", think=False)["prompt"]
    for think in (None, True, "low", "medium", "high", "max"):
        assert ask(asks, "a", think=think)["prompt"] > without
    with pytest.raises(ResponseError, match="think"):
        ask(asks, "a", think="some")


def test_logprobs_are_every_tokens(asks: Client) -> None:
    for stream in (False, True):
        said = ask(asks, THOUGHT + "ab", stream=stream, logprobs=True, top_logprobs=1)
        assert said["tokens"].endswith("ab") and "hm, so" in said["tokens"]
        assert "<turn|>" not in said["tokens"]


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "go"},
    {
        "role": "assistant",
        "thinking": "hm",
        "tool_calls": [{"function": {"name": "f", "arguments": ARGUMENTS}}],
    },
    {"role": "tool", "content": "done", "tool_name": "f"},
]


def test_a_call_and_its_result_reach_the_template(asks: Client, echo_client: OpenAI) -> None:
    chat: Any = asks.chat(
        model="target", messages=HISTORY, tools=[f], options={"temperature": 0, "num_predict": 2}
    )
    call = {"name": "f", "arguments": json.dumps(ARGUMENTS)}
    same = echo_client.chat.completions.create(
        model="target",
        messages=[
            {"role": "user", "content": "go"},
            {"role": "assistant", "tool_calls": [{"id": "", "type": "function", "function": call}]},
            {"role": "tool", "content": "done", "tool_call_id": ""},
        ],
        tools=[{"type": "function", "function": {"name": "f"}}],
        max_tokens=2,
        temperature=0,
    )
    assert chat.prompt_eval_count == same.usage.prompt_tokens


def test_messages_are_as_templates_read_them() -> None:
    card = Card(1, 2, "BF16", "", {}, None, "", {})
    served = Served("target", frozenset(), None, "a1", 4096, True, None, card)
    ((user, model, tool),) = ask_of_chat(
        ChatRequest.model_validate({"model": "target", "messages": HISTORY}), served
    ).prompts
    assert user == HISTORY[0]
    assert model["reasoning_content"] == "hm" and model["tool_calls"][0]["type"] == "function"
    assert model["tool_calls"][0]["function"] == HISTORY[1]["tool_calls"][0]["function"]
    assert tool == {"role": "tool", "content": "done", "name": "f"}


def test_it_says_what_it_can(asks: Client) -> None:
    assert asks.show("target").capabilities == ["completion", "tools", "thinking"]
