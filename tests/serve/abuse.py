"""Clients that behave badly, by the thousand: `python -m tests.serve.abuse --connections 10000`.

Each opens a connection, does one of the things below and is gone. The server must stay up, answer
a probe with the same text as before, hold no more memory and no row. Loopback only, bounded in
count and time; prints one JSON line with what it found.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.serve.process import ServerProcess
from tests.serve.wire import CHAT, NO_END, body, head, request, wait_until

AT_ONCE = 100  # connections
PATIENCE_S = 20.0  # for one of them
ENDLESS = body(3000, logit_bias=NO_END, stream=True)
TLS_HELLO = bytes.fromhex("1603010200010001fc0303") + bytes(200)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Deed = Callable[[Streams, random.Random], Awaitable[None]]


async def nothing(streams: Streams, rng: random.Random) -> None:
    """Open and close."""


async def garbage(streams: Streams, rng: random.Random) -> None:
    """Bytes that are no request."""
    streams[1].write(rng.choice([rng.randbytes(300), TLS_HELLO, b"\r\n" * 50, b"GET\0/\r\n\r\n"]))
    with suppress(TimeoutError):  # it may look like the beginning of a line
        await asyncio.wait_for(streams[0].read(100), 0.5)


async def half_a_head(streams: Streams, rng: random.Random) -> None:
    """Headers that do not end."""
    whole = head(CHAT, 100)
    streams[1].write(whole[: rng.randrange(1, len(whole) - 1)])
    await streams[1].drain()


async def half_a_body(streams: Streams, rng: random.Random) -> None:
    """A body that does not come, of a size that is allowed or not."""
    streams[1].write(head(CHAT, rng.choice([10**4, 10**7, 10**15])) + b'{"messages": [')
    await streams[1].drain()


async def bad_json(streams: Streams, rng: random.Random) -> None:
    """A body that is no request, and its answer read."""
    data = bytearray(body())
    for _ in range(3):
        data[rng.randrange(len(data))] = rng.randrange(256)
    data = data.replace(b'"max_tokens": 4', b'"max_tokens": 1')
    streams[1].write(head(CHAT, len(data)) + data)
    await streams[0].read(100)


async def leave_at_once(streams: Streams, rng: random.Random) -> None:
    """A sound request whose sender does not wait for the answer."""
    streams[1].write(head(CHAT, len(ENDLESS)) + ENDLESS)
    await streams[1].drain()


async def leave_soon(streams: Streams, rng: random.Random) -> None:
    """A stream left after its first bytes."""
    streams[1].write(head(CHAT, len(ENDLESS)) + ENDLESS)
    await streams[0].read(rng.choice([1, 100, 600]))


async def half_closed(streams: Streams, rng: random.Random) -> None:
    """A sender that says it will say no more, and then listens."""
    data = body(2, stream=True)
    streams[1].write(head(CHAT, len(data)) + data)
    streams[1].write_eof()
    await streams[0].read()


async def pipelined(streams: Streams, rng: random.Random) -> None:
    """Many requests before the first answer."""
    streams[1].write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20)
    await streams[0].read(100)


DEEDS: dict[Deed, int] = {  # how many of a hundred
    nothing: 30,
    garbage: 20,
    half_a_head: 15,
    half_a_body: 15,
    bad_json: 8,
    leave_at_once: 4,
    leave_soon: 1,
    half_closed: 1,
    pipelined: 6,
}


async def _connect(port: int, deed: Deed, rng: random.Random, slots: asyncio.Semaphore) -> str:
    async with slots:
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                streams = await asyncio.open_connection("127.0.0.1", port)
                try:
                    with suppress(OSError):
                        await deed(streams, rng)
                finally:
                    streams[1].transport.abort()
                    with suppress(OSError):
                        await streams[1].wait_closed()
            return deed.__name__
        return "refused or too slow"


async def storm(port: int, connections: int, seed: int) -> Counter[str]:
    """Open and drop connections. Returns how many did what."""
    rng = random.Random(seed)
    deeds = rng.choices(list(DEEDS), list(DEEDS.values()), k=connections)
    slots = asyncio.Semaphore(AT_ONCE)
    return Counter(
        await asyncio.gather(
            *(_connect(port, deed, random.Random(rng.random()), slots) for deed in deeds)
        )
    )


async def slow_readers(port: int, count: int, probe: Callable[[], str]) -> str:
    """Ask for long streams and read nothing. Returns what a probe says meanwhile."""
    writers = []
    for _ in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(head(CHAT, len(ENDLESS)) + ENDLESS)
        await writer.drain()
        writers.append(writer)
    said = await asyncio.to_thread(probe)
    for writer in writers:
        writer.transport.abort()
        await writer.wait_closed()
    return said


def probe(port: int) -> str:
    """Ask what is always answered alike."""
    status, _, said = request(port, CHAT, body(24))
    assert status == 200, said
    text: str = json.loads(said)["choices"][0]["message"]["content"]
    return text


def abuse(server: ServerProcess, connections: int, seed: int = 0) -> dict[str, Any]:
    """Abuse a server. Returns figures. Raises: AssertionError for what must not be."""
    port = server.port
    expected = probe(port)
    asyncio.run(storm(port, max(connections // 10, 50), seed + 1))  # what is allocated once
    assert wait_until(lambda: server.health()["running"] == 0)
    before, began = server.memory_bytes(), time.monotonic()
    done = asyncio.run(storm(port, connections, seed))
    seconds = time.monotonic() - began
    assert asyncio.run(slow_readers(port, 7, lambda: probe(port))) == expected
    assert wait_until(lambda: server.health()["running"] == 0)
    assert probe(port) == expected
    health = server.health()
    assert health["status"] == "ok" and health["waiting"] == health["kv_bytes_used"] == 0
    statuses = Counter(entry["status"] for entry in server.entries())
    assert not any(status >= 500 for status in statuses), statuses
    assert "Traceback" not in server.said()
    return {
        "connections": connections,
        "seconds": round(seconds, 1),
        "memory_before_mb": round(before / 1e6, 1),
        "memory_after_mb": round(server.memory_bytes() / 1e6, 1),
        "did": dict(done.most_common()),
        "statuses": {str(status): count for status, count in statuses.most_common()},
    }


def main() -> None:
    """Start a server and abuse it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--connections", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(Path(folder) / "log", "--kv-budget", "0.1") as server,
    ):
        print(json.dumps(abuse(server, given.connections, given.seed)))


if __name__ == "__main__":
    main()
