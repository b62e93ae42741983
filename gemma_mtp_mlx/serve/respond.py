"""Responses whose work ends when the client goes: nobody computes for a closed connection."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemma_mtp_mlx.serve.errors import Refusal
from gemma_mtp_mlx.serve.log import entry_of

Answer = TypeVar("Answer")


class Gone(Exception):
    """The client has closed the connection."""


async def unless_gone(scope: Scope, receive: Receive, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Return what work returns, which is cancelled if the client goes.

    receive: of a request whose body has been read. Raises: Gone.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        entry_of(scope).disconnected = True
        raise Gone
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """A response that appears as it is made. Its status waits for the first part.

    What is raised before that is answered as any other request's; later it is the parts' matter.
    """

    def __init__(self, parts: AsyncGenerator[bytes], media_type: str) -> None:
        self._parts = parts
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the parts, as long as somebody takes them."""
        with suppress(Gone):
            await unless_gone(scope, receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            first = await anext(parts)
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def dump(value: Any) -> bytes:
    """Return JSON as it goes over the wire."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class JsonRoute(APIRoute):
    """A route that reads JSON with care: no NaN, no halves of characters, no towers of brackets."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, which FastAPI calls with each request."""
        handler = super().get_route_handler()

        async def careful(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return careful


class _JsonRequest(Request):
    async def json(self) -> Any:
        """Return the body. Raises: Refusal; json.JSONDecodeError, which FastAPI answers."""
        try:
            text = (await self.body()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(400, f"the body is not UTF-8 at byte {error.start}") from error
        depth = self.app.state.settings.json_depth
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except json.JSONDecodeError:
            raise
        except RecursionError as error:
            raise Refusal(400, f"the body is nested deeper than {depth} levels") from error
        except ValueError as error:  # a number of too many digits
            raise Refusal(400, f"the body is not JSON: {error}") from error
        check_json(value, depth)
        return value


def _no_constant(name: str) -> None:
    raise Refusal(400, f"the body is not JSON: {name} is no number")


def check_json(value: Any, depth: int) -> None:
    """Raise Refusal for what is nested too deeply, and for texts that are not Unicode."""
    level = [value]
    for _ in range(depth + 1):
        if not level:
            return
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str) and not _is_unicode(item):
                raise Refusal(400, "a text in the body has half a surrogate pair, which is no text")
        level = inner
    raise Refusal(400, f"the body is nested deeper than {depth} levels")


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
