"""Who may ask, and how much: Host, Origin, key, size of the body, patience with slow clients.

Pages of other sites can send requests to a server on this machine through a visitor's browser, by
its address or by a name of theirs that resolves to it; the browser then says so in Origin or Host.
"""

import asyncio
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_mtp_mlx.serve import errors
from gemma_mtp_mlx.serve.errors import Refusal
from gemma_mtp_mlx.serve.log import entry_of
from gemma_mtp_mlx.serve.settings import Settings

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/health",)  # without a key
_FORM = "application/x-www-form-urlencoded"  # what curl -d says unless told otherwise


class Guard:
    """Refuses what is not allowed before anything of its body is read."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._hosts = {*LOOPBACK, settings.host.lower(), *map(str.lower, settings.allow_hosts)}
        self._far = not _is_loopback(settings.host)
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def patient(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            async with asyncio.timeout(self._settings.send_s):
                await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._bounded(scope, receive), patient)
        except Refusal as refusal:
            if started:
                raise
            await errors.response(scope["path"], refusal)(scope, receive, send)
        except TimeoutError:
            if not started:
                raise
            # It takes nothing any more; uvicorn closes what is not complete.
            entry_of(scope).disconnected = True

    def _check(self, scope: Scope) -> None:
        headers = MutableHeaders(scope=scope)
        host, allowed = headers.get("host", ""), self._settings.allow_hosts
        if "*" not in allowed and not self._knows(host):
            raise Refusal(
                403, f"the Host header {host[:80]!r} is not this server's; see --allow-host"
            )
        origin = headers.get("origin")
        allowed = self._settings.allow_origins
        own = {f"http://{host}", f"https://{host}"}
        if origin is not None and not {"*", origin} & set(allowed) and origin not in own:
            raise Refusal(403, f"the Origin {origin[:80]!r} is not allowed; see --allow-origin")
        if self._key is not None and scope["path"] not in OPEN:
            self._check_key(headers.get("authorization", ""))
        if headers.get("content-type", _FORM) == _FORM:
            headers["content-type"] = "application/json"

    def _knows(self, host: str) -> bool:
        """Whether a Host header names this server. An address cannot be made to mean another."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._hosts or (self._far and _is_address(name))

    def _check_key(self, given: str) -> None:
        assert self._key is not None
        scheme, _, key = given.partition(" ")
        same = hmac.compare_digest(key.strip().encode(), self._key)
        if scheme.lower() != "bearer" or not same:
            why = "wrong API key" if given else "this server wants an API key"
            raise Refusal(
                401,
                f"{why}; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Return `receive` with a limit on the body's size and on the time it takes."""
        settings = self._settings
        length = Headers(scope=scope).get("content-length", "0")
        most = settings.body_bytes
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            raise Refusal(413, f"the body has {length[:20]} bytes; at most {most} are read")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + settings.body_s
        seen, complete = 0, False

        async def bounded() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise Refusal(
                    408, f"the body was not complete within {settings.body_s:g} seconds"
                ) from error
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > most:
                raise Refusal(
                    413, f"the body has more than {most} bytes, which is all that is read"
                )
            return message

        return bounded


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
