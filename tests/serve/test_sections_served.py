"""Thinking and tool calls reach the openai package as such, streaming and not."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI

THOUGHT = "<|channel>thought\nhm, so\n<channel|>"
CALL = '<|tool_call>call:f{a:<|"|>x{,}日<|"|>,b:[1,{c:true}]}<tool_call|>'
ARGUMENTS = {"a": "x{,}日", "b": [1, {"c": True}]}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def ask(client: OpenAI, script: str, *, stream: bool = False, **more: Any) -> dict[str, Any]:
    """Let the model say a script. Returns what its client made of it."""
    settings = {"max_tokens": 120, "temperature": 0, **more}
    messages = [{"role": "user", "content": script}]
    if not stream:
        answer = client.chat.completions.create(model="target", messages=messages, **settings)
        message = answer.choices[0].message
        return {
            "text": message.content or "",
            "reasoning": getattr(message, "reasoning_content", ""),
            "calls": [
                (call.function.name, json.loads(call.function.arguments))
                for call in message.tool_calls or []
            ],
            "finish": answer.choices[0].finish_reason,
            "usage": answer.usage,
            "logprobs": answer.choices[0].logprobs,
        }
    said: dict[str, Any] = {"text": "", "reasoning": "", "finish": None, "logprobs": None}
    calls: dict[int, list[str]] = {}
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model="target", messages=messages, stream=True, stream_options=options, **settings
    ):
        said["usage"] = chunk.usage
        for choice in chunk.choices:
            said["text"] += choice.delta.content or ""
            said["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                calls.setdefault(call.index, ["", ""])
                calls[call.index][0] += call.function.name or ""
                calls[call.index][1] += call.function.arguments or ""
            said["finish"] = choice.finish_reason or said["finish"]
    said["calls"] = [(name, json.loads(text)) for name, text in calls.values()]
    return said


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_reasoning_content(echo_client: OpenAI, stream: bool) -> None:
    said = ask(echo_client, THOUGHT + "yes, so what", stream=stream, stop=[", so"])
    assert (said["reasoning"], said["text"], said["finish"]) == ("hm, so", "yes", "stop")
    details = said["usage"].completion_tokens_details
    assert details.reasoning_tokens == len("\nhm, so\n") + len("thought") + 2
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens >= 0


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_tool_calls(echo_client: OpenAI, stream: bool) -> None:
    tools = [tool("f"), tool("g")]
    said = ask(echo_client, f"{THOUGHT}one{CALL}{CALL}", stream=stream, tools=tools)
    assert said["calls"] == [("f", ARGUMENTS)] * 2
    assert (said["reasoning"], said["text"], said["finish"]) == ("hm, so", "one", "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "script, settings",
    [
        ("a<|tool_call>call it<tool_call|>b", {"tools": [tool("f")]}),  # no call
        (CALL, {}),  # no tools
        (CALL, {"tools": [tool("f")], "tool_choice": "none"}),
    ],
)
def test_what_is_no_call_is_text(
    echo_client: OpenAI, script: str, settings: dict[str, Any], stream: bool
) -> None:
    said = ask(echo_client, script, stream=stream, **settings)
    assert (said["text"], said["calls"], said["finish"]) == (script, [], "stop")


def test_a_call_is_forced(echo_client: OpenAI) -> None:
    tools = [tool("f"), tool("other")]
    named = {"type": "function", "function": {"name": "other"}}
    other = CALL.replace("call:f", "call:other")
    for choice, script, calls in (
        ("required", CALL, [("f", ARGUMENTS)]),
        ("required", CALL + CALL, [("f", ARGUMENTS)] * 2),
        (named, other, [("other", ARGUMENTS)]),
    ):
        said = ask(echo_client, script, tools=tools, tool_choice=choice)
        assert (said["calls"], said["text"]) == (calls, "")
    said = ask(
        echo_client, CALL + CALL, tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    assert said["calls"] == [("f", ARGUMENTS)]
    # What is not allowed is not said, however much the model wants to.
    for choice, script, begins in (
        ("required", "no", "<|tool_call>call:"),
        (named, CALL, "<|tool_call>call:other{"),
    ):
        settings = {"tools": tools, "tool_choice": choice, "reasoning_effort": "none"}
        said = ask(echo_client, script, **settings, max_tokens=20)
        assert said["text"].startswith(begins) or said["calls"]


def test_json_or_a_call(echo_client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    settings = {"tools": [tool("f")], "response_format": form}
    assert ask(echo_client, '{"n": 12}', **settings)["text"] == '{"n": 12}'
    assert ask(echo_client, CALL, **settings)["calls"] == [("f", ARGUMENTS)]
    said = ask(echo_client, "n is 12", **settings, reasoning_effort="none", max_tokens=8)
    assert said["text"].startswith(("{", "<|tool_call>"))


def test_thinking_is_asked_for_or_not(echo_client: OpenAI) -> None:
    def size(**settings: Any) -> int:
        tokens = ask(echo_client, "a", **settings)["usage"].prompt_tokens
        assert isinstance(tokens, int)
        return tokens

    no = size(reasoning_effort="none")
    assert size(reasoning_effort="minimal") == no
    assert size(extra_body={"chat_template_kwargs": {"enable_thinking": False}}) == no
    assert size(reasoning_effort="high") == size() > no
    assert size(extra_body={"chat_template_kwargs": {"enable_thinking": True}}) == size()


def test_logprobs_are_the_texts(echo_client: OpenAI) -> None:
    said = ask(echo_client, THOUGHT + "é日", logprobs=True, top_logprobs=2)
    entries = said["logprobs"].content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "é日"
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in entries)
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_an_answer_that_fails_is_its_own(echo_client: OpenAI) -> None:
    script = "and now<unk>"
    with pytest.raises(openai.InternalServerError, match="this was in the script"):
        ask(echo_client, script)
    messages: Any = [{"role": "user", "content": script}]
    with (
        echo_client.chat.completions.create(
            model="target", messages=messages, stream=True
        ) as stream,
        ThreadPoolExecutor() as others,
    ):
        other = others.submit(ask, echo_client, "x" * 60)
        chunks: list[Any] = []
        with pytest.raises(openai.APIError, match="this was in the script"):
            chunks.extend(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "and now"
        assert other.result()["text"] == "x" * 60


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "g",
        ),
        ({"tools": [tool("a b")]}, "tools.0.function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"extra_body": {"chat_template_kwargs": {"other": 1}}}, "chat_template_kwargs"),
        ({"extra_body": {"functions": []}}, "functions"),
    ],
)
def test_what_is_refused_is_named(echo_client: OpenAI, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(echo_client, "a", **settings)
