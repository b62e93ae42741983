"""From OpenAI's fields to what is generated. Settings left out are the protocol's: temperature 1.

Penalties look at the last 20 tokens, the prompt's included, as everywhere in this program.
"""

import json
from typing import Any

from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.serve.errors import Refusal
from gemma_mtp_mlx.serve.openai_schema import (
    ChatRequest,
    Common,
    CompletionRequest,
    Message,
    MessageCall,
    NamedTool,
)
from gemma_mtp_mlx.serve.runner import Ask
from gemma_mtp_mlx.serve.served import Served
from gemma_mtp_mlx.serve.tool_grammar import answer_grammar

SEEDS = 2**32
MOST_PROMPTS = 128


def ask_of_chat(body: ChatRequest, served: Served) -> Ask:
    """Return what a chat request asks for. Raises: Refusal, ValueError."""
    settings = _settings(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "top_logprobs goes with logprobs: true", param="top_logprobs")
    if body.logprobs:
        settings["logprobs"] = body.top_logprobs or 0
    settings["thinking"] = _thinking(body, served)
    settings |= _rules(body, served)
    return Ask(
        prompts=[[_message(message) for message in body.messages]],
        params=SamplingParams(**settings),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        choices=body.n or 1,
        tools=[tool.model_dump(exclude_none=True) for tool in offered(body)],
    )


def ask_of_completion(body: CompletionRequest) -> Ask:
    """Return what a completion request asks for. Raises: Refusal, ValueError."""
    if body.best_of not in (None, body.n or 1):
        raise Refusal(400, "best_of has to be n; answers are not ranked", param="best_of")
    if body.echo and body.logprobs is not None:
        raise Refusal(400, "echo does not go with logprobs; a prompt has none", param="echo")
    given = body.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or _is_ids(given) else list(given)
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise Refusal(400, f"give 1 to {MOST_PROMPTS} prompts", param="prompt")
    return Ask(
        prompts=prompts,
        params=SamplingParams(**_settings(body), logprobs=body.logprobs),
        max_tokens=body.max_tokens or 16,
        choices=body.n or 1,
        template=False,
        sections=False,
    )


def offered(body: ChatRequest) -> list[Any]:
    """Return the tools that may be called."""
    return [] if body.tool_choice == "none" else body.tools or []


def _settings(body: Common) -> dict[str, Any]:
    """Translate what both endpoints share."""
    bias = body.logit_bias or {}
    if not all(token.isdecimal() and len(token) < 10 for token in bias):
        raise Refusal(400, "the keys of logit_bias are token ids", param="logit_bias")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": max(body.top_k or 0, 0),
        "min_p": body.min_p or 0.0,
        "repetition_penalty": body.repetition_penalty or 1.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "seed": None if body.seed is None else body.seed % SEEDS,
        "stop": tuple(stop),
        "logit_bias": {int(token): value for token, value in bias.items()},
    }


def _thinking(body: ChatRequest, served: Served) -> bool | None:
    """Whether the model is asked to think; None where nobody says, or it cannot."""
    if not served.thinks:
        return None
    asked = (body.chat_template_kwargs or {}).get("enable_thinking")
    if asked is None and body.reasoning_effort is not None:
        asked = body.reasoning_effort not in ("none", "minimal")
    return asked


def _rules(body: ChatRequest, served: Served) -> dict[str, Any]:
    """Return the settings that say what the text must be."""
    schema = None
    wanted = body.response_format
    if wanted is not None and wanted.type != "text":
        described = wanted.json_schema
        if wanted.type == "json_schema" and described is None:
            raise Refusal(400, "json_schema is missing", param="response_format.json_schema")
        schema = {} if described is None else described.rules
    tools, choice = offered(body), body.tool_choice
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise Refusal(
                400,
                f"tool_choice names {choice.function.name}, which is not in tools",
                param="tool_choice",
            )
        names = [choice.function.name]
    if choice not in (None, "none", "auto") and not tools:
        raise Refusal(400, "tool_choice needs tools", param="tool_choice")
    if not tools or (choice in (None, "auto") and schema is None):
        return {} if schema is None else {"json_schema": schema}
    if served.markers is None:
        raise Refusal(400, "this model's tokenizer has no tokens for tool calls", param="tools")
    several = body.parallel_tool_calls is not False
    instead = schema if choice in (None, "auto") else None
    return {"grammar": answer_grammar(names, served.markers, several=several, schema=instead)}


def _message(message: Message) -> dict[str, Any]:
    """Return a message as chat templates read it."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text or "" for part in content)
    if content is None and not message.tool_calls and message.role != "assistant":
        raise Refusal(400, f"a message of the {message.role} has no content", param="messages")
    said: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    if message.tool_calls:
        said["tool_calls"] = [_call(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            said[name] = value
    return said


def _call(call: MessageCall) -> dict[str, Any]:
    """Return a call with its arguments as an object, which templates spell their own way."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError as error:
        arguments = error
    if not isinstance(arguments, dict):
        raise Refusal(
            400,
            f"the arguments of the call of {call.function.name} are no JSON object",
            param="messages",
        )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _is_ids(value: Any) -> bool:
    return bool(value) and all(type(item) is int for item in value)
