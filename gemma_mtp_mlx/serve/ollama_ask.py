"""From Ollama's fields to what is generated.

A setting that a request leaves out is the model's own, where its generation_config.json has one
(Gemma 4's: temperature 1, top_k 64, top_p 0.95), and else Ollama's.
"""

from typing import Any

from gemma_mtp_mlx.round import MAX_DRAFTS
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.serve.errors import Refusal
from gemma_mtp_mlx.serve.ollama_schema import ChatRequest, Common, GenerateRequest, Message, Options
from gemma_mtp_mlx.serve.runner import Ask
from gemma_mtp_mlx.serve.served import Served
from gemma_mtp_mlx.serve.tool_grammar import answer_grammar

SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
LAST_N = 64  # tokens that penalties look at
SEEDS = 2**32


def ask_of_chat(body: ChatRequest, served: Served) -> Ask:
    """Return what a chat request asks for. Raises: Refusal, ValueError."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    settings = _settings(body, served) | {"thinking": _thinking(body, served)}
    if tools and "json_schema" in settings:
        if served.markers is None:
            raise Refusal(400, f"{body.model!r} does not support tools")
        names = [tool["function"]["name"] for tool in tools]
        schema = settings.pop("json_schema")
        settings["grammar"] = answer_grammar(names, served.markers, several=True, schema=schema)
    return Ask(
        prompts=[[_message(message) for message in body.messages or []]],
        params=SamplingParams(**settings),
        max_tokens=_most(body),
        tools=tools,
    )


def ask_of_generate(body: GenerateRequest, served: Served) -> Ask:
    """Return what a generate request asks for. Raises: Refusal, ValueError."""
    if body.suffix:
        raise Refusal(400, f"{body.model!r} does not support insert; leave suffix out")
    if body.template:
        raise Refusal(400, "template is not supported; lay the prompt out yourself and set raw")
    if body.raw and (body.system or body.context):
        raise Refusal(400, "raw mode does not support template, system, or context")
    prompt: Any = body.prompt or ""
    if body.system:
        prompt = [{"role": "system", "content": body.system}, {"role": "user", "content": prompt}]
    settings = _settings(body, served)
    settings["thinking"] = False if body.raw else _thinking(body, served)
    return Ask(
        prompts=[prompt],
        params=SamplingParams(**settings),
        max_tokens=_most(body),
        template=not body.raw,
        sections=not body.raw,
        before=body.context or (),
    )


def _settings(body: Common, served: Served) -> dict[str, Any]:
    """Translate what both endpoints share."""
    options = body.settings
    defaults = SAMPLING | dict(served.card.sampling)
    given = {name: getattr(options, name) for name in SAMPLING}
    settings: dict[str, Any] = defaults | {n: v for n, v in given.items() if v is not None}
    settings["top_k"] = max(settings["top_k"], 0)
    settings["top_p"] = min(settings["top_p"], 1.0)
    settings["min_p"] = options.min_p or 0.0
    if options.seed is not None and options.seed != -1:
        settings["seed"] = options.seed % SEEDS
    stop = [options.stop] if isinstance(options.stop, str) else options.stop or []
    settings["stop"] = tuple(stop)
    if options.draft_num_predict is not None:
        settings["num_draft_tokens"] = min(options.draft_num_predict, MAX_DRAFTS)
    if body.logprobs:
        settings["logprobs"] = body.top_logprobs or 0
    if body.format:
        settings["json_schema"] = {} if body.format == "json" else body.format
    return settings | _penalties(options, served)


def _penalties(options: Options, served: Served) -> dict[str, Any]:
    """Translate the penalties; all look at the last repeat_last_n tokens, the prompt's included."""
    last = LAST_N if options.repeat_last_n is None else options.repeat_last_n
    if last == 0:
        return {}
    size = served.context if last == -1 else min(last, served.context)
    penalties = {
        "repetition": options.repeat_penalty,
        "presence": options.presence_penalty,
        "frequency": options.frequency_penalty,
    }
    given = {kind: value for kind, value in penalties.items() if value is not None}
    return {f"{kind}_penalty": value for kind, value in given.items()} | {
        f"{kind}_context_size": size for kind in given
    }


def _most(body: Common) -> int | None:
    """Return the most tokens; none said, -1 and -2 leave it to what the memory allows."""
    said = body.settings.num_predict
    return said if said is not None and said > 0 else None


def _thinking(body: Common, served: Served) -> bool | None:
    """Whether the model is asked to think; a level of it is as good as yes."""
    if not served.thinks:
        if body.think:
            raise Refusal(400, f"{body.model!r} does not support thinking")
        return None
    return None if body.think is None else bool(body.think)


def _message(message: Message) -> dict[str, Any]:
    """Return a message as chat templates read it."""
    said: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_calls:
        said["tool_calls"] = [
            {"id": call.id or "", "type": "function", "function": call.function.model_dump()}
            for call in message.tool_calls
        ]
    renamed = {
        "name": message.tool_name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.thinking,
    }
    return said | {name: value for name, value in renamed.items() if value is not None}
