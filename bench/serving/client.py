"""An HTTP/1.1 client for measurements: cheap, and in control of when a connection ends.

One connection per request. Whoever leaves a reply's `async with` early closes the connection, as a
client does that has gone away.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
_MOST_LINE_BYTES = 1 << 20


@dataclass(slots=True)
class Reply:
    """A reply whose head has come and whose body is still to be read. headers: lower case."""

    status: int
    headers: dict[str, str]
    _reader: asyncio.StreamReader = field(repr=False)

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the body's lines as they come, without their ends; empty ones are left out."""
        rest = b""
        async for part in self._parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.strip():
                    yield line.strip()
        if rest.strip():
            yield rest.strip()

    async def read(self) -> bytes:
        """Return the whole body."""
        return b"".join([part async for part in self._parts()])

    async def _parts(self) -> AsyncIterator[bytes]:
        """Yield the body piece by piece. Raises: ConnectionError if it is cut short."""
        try:
            if self.headers.get("transfer-encoding") == "chunked":
                while size := int(await self._reader.readline() or b"cut", 16):
                    yield (await self._reader.readexactly(size + 2))[:-2]
            elif "content-length" in self.headers:
                yield await self._reader.readexactly(int(self.headers["content-length"]))
            else:
                while part := await self._reader.read(1 << 16):
                    yield part
        except (asyncio.IncompleteReadError, ValueError) as error:
            raise ConnectionError("the reply was cut short") from error


@asynccontextmanager
async def ask(
    port: int, path: str, body: Any = None, *, key: str | None = None, receive_bytes: int = 0
) -> AsyncIterator[Reply]:
    """Send a request and give its reply once the head is there; leaving closes the connection.

    body: JSON for a POST (bytes are sent as they are), None for a GET. receive_bytes: the socket's
    receive buffer, for a client that takes little at a time; 0 leaves it as the system has it.
    Raises: ConnectionError, TimeoutError.
    """
    sock = socket.socket()
    sock.setblocking(False)
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (HOST, port))
    except BaseException:
        sock.close()
        raise
    reader, writer = await asyncio.open_connection(
        sock=sock, limit=receive_bytes or _MOST_LINE_BYTES
    )
    try:
        writer.write(_head(path, port, body, key))
        await writer.drain()
        yield await _reply(reader)
    finally:
        writer.close()


def _head(path: str, port: int, body: Any, key: str | None) -> bytes:
    """Return a request as it goes over the wire."""
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {HOST}:{port}"]
    lines += ["Connection: close"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    data = b""
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


async def _reply(reader: asyncio.StreamReader) -> Reply:
    """Read a reply's head."""
    first = await reader.readline()
    if not first.startswith(b"HTTP/"):
        raise ConnectionError("the connection was closed without a reply")
    headers: dict[str, str] = {}
    while (line := await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return Reply(int(first.split()[1]), headers, reader)
