"""One JSON line per request on stderr: what it was, how it ended, what its drafts were worth.

Never what was said in it, nor a key.
"""

import asyncio
import json
import re
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.serve import errors

_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
QUIET = ("/health", "/metrics")  # asked every few seconds


@dataclass(slots=True)
class Entry:
    """What is logged of a request. began: by time.perf_counter."""

    id: str
    method: str
    endpoint: str
    began: float = field(default_factory=time.perf_counter)
    status: int = 0
    model: str | None = None
    stream: bool = False
    ttft_s: float | None = None
    disconnected: bool = False
    error: str | None = None
    requests: Sequence[Request] = ()

    def line(self) -> str:
        """Return it as one line of JSON."""
        seconds = time.perf_counter() - self.began
        stats = [request.stats for request in self.requests]
        tokens = sum(each.generation_tokens for each in stats)
        drafted = sum(each.draft_n for each in stats)
        accepted = sum(each.draft_n_accepted for each in stats)
        slowest = max((each.generation_s for each in stats), default=0.0)
        said = {
            "id": self.id,
            "method": self.method,
            "endpoint": self.endpoint,
            "status": self.status,
            "duration_ms": round(1000 * seconds, 1),
            "model": self.model,
            "stream": self.stream,
            "error": self.error,
            "client_disconnected": self.disconnected,
        }
        if stats:
            said |= {
                "answers": len(stats),
                "prompt_tokens": stats[0].prompt_tokens,
                "cached_tokens": sum(each.cached_tokens for each in stats),
                "completion_tokens": tokens,
                "queued_ms": round(1000 * max((each.queued_s for each in stats), default=0.0), 1),
                "ttft_ms": None if self.ttft_s is None else round(1000 * self.ttft_s, 1),
                "tokens_per_s": round(tokens / slowest, 1) if slowest else None,
                "rounds": sum(each.draft_rounds for each in stats),
                "drafted": drafted,
                "accepted": accepted,
                "acceptance": round(accepted / drafted, 3) if drafted else None,
                "finish_reasons": [ending(request) for request in self.requests],
            }
        return json.dumps({name: value for name, value in said.items() if value is not None})


def ending(request: Request) -> str:
    """How an answer ended: stop, length, error, or abort if nobody waited for its end."""
    return "abort" if request.finish_reason in (None, "cancelled") else str(request.finish_reason)


def entry_of(scope: Scope) -> Entry:
    """Return the entry of a request that has passed through `Log`."""
    entry = scope["state"]["entry"]
    assert isinstance(entry, Entry)
    return entry


class Log:
    """Gives every request an id, which its response carries, and writes its line at the end."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        """count: is told each request's endpoint and status."""
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        entry = Entry(name, scope["method"], scope["path"])
        scope.setdefault("state", {})["entry"] = entry

        started = False

        async def note(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, entry.status = True, message["status"]
                MutableHeaders(scope=message)["x-request-id"] = entry.id
            await send(message)

        try:
            await self._app(scope, receive, note)
        except asyncio.CancelledError:  # uvicorn's, at its end, which closes the connection
            entry.error = "cut off by the server's end"
        except Exception as error:  # a bug: the client is told, the log says where
            if started:
                raise
            traceback.print_exc()
            entry.error = repr(error)[:500]
            await errors.response(entry.endpoint, error)(scope, receive, note)
        finally:
            route = scope.get("route")
            self._count("other" if route is None else route.path, entry.status)
            if entry.endpoint not in QUIET or entry.status != 200:
                write([entry.line()])


def write(lines: Iterable[str]) -> None:
    """Write lines to stderr; one that cannot be written is nobody's fault."""
    try:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    except OSError:
        return
