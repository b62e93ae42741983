"""Ollama's endpoints: /api/chat, /api/generate, /api/tags, /api/show, /api/ps, /api/pull.

The model that is served is the only one. It stays loaded: keep_alive is read and has no effect.
"""

import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from gemma_mtp_mlx import __version__
from gemma_mtp_mlx.serve import errors
from gemma_mtp_mlx.serve.card import FAMILY
from gemma_mtp_mlx.serve.errors import Refusal
from gemma_mtp_mlx.serve.log import Entry, entry_of
from gemma_mtp_mlx.serve.ollama_ask import SAMPLING, ask_of_chat, ask_of_generate
from gemma_mtp_mlx.serve.ollama_names import check_name, full_name, hub_name, is_served
from gemma_mtp_mlx.serve.ollama_reply import Form, Reply
from gemma_mtp_mlx.serve.ollama_schema import (
    ChatRequest,
    GenerateRequest,
    PullRequest,
    ShowRequest,
)
from gemma_mtp_mlx.serve.pulls import Pulls
from gemma_mtp_mlx.serve.respond import JsonRoute, Stream, dump, unless_gone
from gemma_mtp_mlx.serve.runner import Ask, Runner
from gemma_mtp_mlx.serve.served import Served

NDJSON = "application/x-ndjson"
NEVER = "2200-01-01T00:00:00Z"  # when the model is unloaded; clients show it as forever

router = APIRouter(tags=["Ollama"], route_class=JsonRoute)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def root() -> Response:
    """Say that somebody is here, which Ollama's own client asks first."""
    return PlainTextResponse("mlx-gemma-mtp is running")


@router.get("/api/version")
async def version() -> dict[str, str]:
    """Say this program's version."""
    return {"version": __version__}


@router.get("/api/tags")
async def tags(request: HttpRequest) -> dict[str, Any]:
    """List the model that is served."""
    served: Served = request.app.state.runner.served
    return {"models": [{**_model(served), "modified_at": served.card.modified}]}


@router.get("/api/ps")
async def ps(request: HttpRequest) -> dict[str, Any]:
    """Say how much memory the model takes, its keys and values included."""
    runner: Runner = request.app.state.runner
    held, model = runner.occupancy(), _model(runner.served)
    size = model["size"] + held.bytes
    context = min(runner.served.context, held.positions)
    loaded = {"size": size, "size_vram": size, "context_length": context, "expires_at": NEVER}
    return {"models": [{**model, **loaded}]}


@router.post("/api/show")
async def show(request: HttpRequest, body: ShowRequest) -> dict[str, Any]:
    """Describe the model that is served."""
    served: Served = request.app.state.runner.served
    check_name(served, _named(body))
    card = served.card
    settings = SAMPLING | dict(card.sampling)
    return {
        "modelfile": f"# This server's one model; it is changed where the server is started.\n"
        f"FROM {full_name(served.name)}\n",
        "parameters": "\n".join(f"{name:<30} {value}" for name, value in settings.items()),
        "template": card.template,
        "details": _details(served),
        "model_info": dict(card.info),
        "capabilities": _capabilities(served),
        "modified_at": card.modified,
    }


@router.post("/api/chat", response_model=None)
async def chat(request: HttpRequest, body: ChatRequest) -> Response:
    """Answer a conversation."""
    runner: Runner = request.app.state.runner
    check_name(runner.served, body.model)
    if not body.messages:
        return _loaded(request, Form(body.model, chat=True))
    ask = ask_of_chat(body, runner.served)
    form = Form(
        body.model,
        chat=True,
        speller=await runner.speller() if body.logprobs else None,
        calls=bool(body.tools),
        ignored=body.settings.ignored,
    )
    return await _respond(request, ask, form, stream=body.stream is not False)


@router.post("/api/generate", response_model=None)
async def generate(request: HttpRequest, body: GenerateRequest) -> Response:
    """Answer a prompt, or continue it as it is if it is raw."""
    runner: Runner = request.app.state.runner
    check_name(runner.served, body.model)
    ask = ask_of_generate(body, runner.served)
    if not body.prompt:
        return _loaded(request, Form(body.model, chat=False))
    form = Form(
        body.model,
        chat=False,
        speller=await runner.speller() if body.logprobs else None,
        context=not body.raw,
        ignored=body.settings.ignored,
    )
    return await _respond(request, ask, form, stream=body.stream is not False)


@router.post("/api/pull", response_model=None)
async def pull(request: HttpRequest, body: PullRequest) -> Response:
    """Download a model from the hub, for a later start of this server."""
    pulls: Pulls = request.app.state.pulls
    name, served = _named(body), request.app.state.runner.served
    entry = entry_of(request.scope)
    entry.model, entry.stream = name, body.stream is not False
    progress = _nothing() if is_served(served, name) else pulls.progress(hub_name(name))
    if entry.stream:
        return Stream(_lines(progress, entry), NDJSON)

    async def last() -> dict[str, Any]:
        return [status async for status in progress][-1]

    return JSONResponse(await unless_gone(request.scope, request.receive, last()))


async def _nothing() -> AsyncGenerator[dict[str, Any]]:
    """Yield what is shown of a download of what is here."""
    yield {"status": "pulling manifest"}
    yield {"status": "success"}


def _loaded(request: HttpRequest, form: Form) -> Response:
    entry_of(request.scope).model = request.app.state.runner.served.name
    return JSONResponse(form.loaded())


async def _respond(request: HttpRequest, ask: Ask, form: Form, *, stream: bool) -> Response:
    runner: Runner = request.app.state.runner
    entry = entry_of(request.scope)
    entry.model, entry.stream = runner.served.name, stream
    if stream:
        return Stream(_lines(_objects(runner, ask, entry, form), entry), NDJSON)
    work = _whole(runner, ask, entry, form)
    return JSONResponse(await unless_gone(request.scope, request.receive, work))


async def _whole(runner: Runner, ask: Ask, entry: Entry, form: Form) -> dict[str, Any]:
    async with runner.answer(ask, entry) as answers:
        reply = Reply(form, answers.requests[0], entry.began, time.perf_counter())
        async for chunk in answers:
            reply.take(chunk)
        return reply.whole()


async def _objects(
    runner: Runner, ask: Ask, entry: Entry, form: Form
) -> AsyncGenerator[dict[str, Any]]:
    async with runner.answer(ask, entry) as answers:
        reply = Reply(form, answers.requests[0], entry.began, time.perf_counter())
        async for chunk in answers:
            for shown in reply.take(chunk):
                yield shown


async def _lines(objects: AsyncGenerator[dict[str, Any]], entry: Entry) -> AsyncGenerator[bytes]:
    """Yield objects a line each. What fails behind the first is the last line."""
    begun = False
    try:
        async for shown in objects:
            yield dump(shown) + b"\n"
            begun = True
    except (Refusal, ValueError) as error:
        if not begun:
            raise
        refusal = errors.as_refusal(error)
        entry.error = refusal.detail[:500]
        yield dump(errors.body(entry.endpoint, refusal)) + b"\n"
    finally:
        await objects.aclose()


def _named(body: PullRequest | ShowRequest) -> str:
    name = body.model or body.name
    if not name:
        raise Refusal(400, "model is required", param="model")
    return name


def _model(served: Served) -> dict[str, Any]:
    name = full_name(served.name)
    return {
        "name": name,
        "model": name,
        "size": served.card.weights_bytes,
        "digest": served.fingerprint,
        "details": _details(served),
    }


def _details(served: Served) -> Mapping[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": FAMILY,
        "families": [FAMILY],
        "parameter_size": served.card.size,
        "quantization_level": served.card.packing,
    }


def _capabilities(served: Served) -> list[str]:
    can = {"completion": True, "tools": served.markers is not None, "thinking": served.thinks}
    return [name for name, known in can.items() if known]
