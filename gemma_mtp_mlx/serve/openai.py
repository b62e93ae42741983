"""OpenAI's endpoints: /v1/chat/completions, /v1/completions, /v1/models."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.serve import errors
from gemma_mtp_mlx.serve.errors import Refusal
from gemma_mtp_mlx.serve.log import Entry, entry_of
from gemma_mtp_mlx.serve.openai_ask import ask_of_chat, ask_of_completion, offered
from gemma_mtp_mlx.serve.openai_reply import ChatChoice, TextChoice, head, usage
from gemma_mtp_mlx.serve.openai_schema import ChatRequest, CompletionRequest
from gemma_mtp_mlx.serve.respond import JsonRoute, Stream, dump, unless_gone
from gemma_mtp_mlx.serve.runner import Ask, Runner
from gemma_mtp_mlx.serve.served import Served

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)


@router.get("/models")
async def models(request: HttpRequest) -> dict[str, Any]:
    """List the model that is served."""
    return {"object": "list", "data": [_model(request.app.state.runner.served)]}


@router.get("/models/{name:path}")
async def model(request: HttpRequest, name: str) -> dict[str, Any]:
    """Describe the model that is served."""
    served: Served = request.app.state.runner.served
    served.check(name)
    return _model(served)


@router.post("/chat/completions", response_model=None)
async def chat(request: HttpRequest, body: ChatRequest) -> Response:
    """Answer a conversation."""
    runner: Runner = request.app.state.runner
    runner.served.check(body.model)
    ask = ask_of_chat(body, runner.served)
    speller = await runner.speller() if body.logprobs else None
    calls = bool(offered(body))

    def choice(index: int, answer: Request) -> ChatChoice:
        return ChatChoice(index, answer, speller, calls=calls)

    form = _Form("chat.completion", "chat.completion.chunk", "chatcmpl", choice)
    return await _respond(request, body, ask, form)


@router.post("/completions", response_model=None)
async def completions(request: HttpRequest, body: CompletionRequest) -> Response:
    """Continue a text as it is, without the chat template."""
    runner: Runner = request.app.state.runner
    runner.served.check(body.model)
    ask = ask_of_completion(body)
    speller = None if body.logprobs is None else await runner.speller()

    def choice(index: int, answer: Request) -> TextChoice:
        echo = runner.text_of(answer.prompt) if body.echo else ""
        return TextChoice(index, speller, echo)

    form = _Form("text_completion", "text_completion", "cmpl", choice)
    return await _respond(request, body, ask, form)


@dataclass(frozen=True, slots=True)
class _Form:
    """What a response is called, whole and streamed, and how its choices are made."""

    whole: str
    part: str
    prefix: str
    choice: Callable[[int, Request], ChatChoice | TextChoice]


async def _respond(
    request: HttpRequest, body: ChatRequest | CompletionRequest, ask: Ask, form: _Form
) -> Response:
    runner: Runner = request.app.state.runner
    entry = entry_of(request.scope)
    entry.model, entry.stream = runner.served.name, bool(body.stream)
    if body.stream:
        options = body.stream_options
        with_usage = options is not None and options.include_usage
        return Stream(_events(runner, ask, entry, form, with_usage), "text/event-stream")
    work = _whole(runner, ask, entry, form)
    return JSONResponse(await unless_gone(request.scope, request.receive, work))


async def _whole(runner: Runner, ask: Ask, entry: Entry, form: _Form) -> dict[str, Any]:
    async with runner.answer(ask, entry) as answers:
        choices = [form.choice(*numbered) for numbered in enumerate(answers.requests)]
        async for chunk in answers:
            choices[chunk.index].take(chunk)
        return {
            **head(form.whole, form.prefix, runner.served),
            "choices": [choice.whole() for choice in choices],
            "usage": usage(answers),
        }


async def _events(
    runner: Runner, ask: Ask, entry: Entry, form: _Form, with_usage: bool
) -> AsyncGenerator[bytes]:
    frame = head(form.part, form.prefix, runner.served)
    empty: dict[str, Any] = {"usage": None} if with_usage else {}
    async with runner.answer(ask, entry) as answers:
        choices = [form.choice(*numbered) for numbered in enumerate(answers.requests)]
        for choice in choices:
            for shown in choice.opening():
                yield _event({**frame, "choices": [shown], **empty})
        try:
            async for chunk in answers:
                for shown in choices[chunk.index].take(chunk):
                    yield _event({**frame, "choices": [shown], **empty})
        except Refusal as refusal:
            entry.error = refusal.detail
            yield _event(errors.body(entry.endpoint, refusal))
            return
        if with_usage:
            yield _event({**frame, "choices": [], "usage": usage(answers)})
        yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "mlx-gemma-mtp",
        "max_model_len": served.context,
    }
