"""A server on loopback that says what a test gives it, and a chat stream to give it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

Reply = tuple[int, str, list[Any]]  # status, content type, objects


def streamed(texts: list[str], tokens: int, finish: str = "length") -> list[Any]:
    """Return a chat stream's objects."""
    deltas = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ["", *texts]]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}}
    return [*deltas, end, usage]


class ScriptedServer:
    """Answers requests in order from a function of path and body, chunked as a stream is."""

    def __init__(self, answer: Callable[[str, Any], Reply], pause_s: float = 0.0) -> None:
        self.answer, self.pause_s = answer, pause_s
        self.here = self.most = 0
        self.bodies: list[Any] = []

    def run(self, visit: Callable[[int], Awaitable[Any]]) -> Any:
        """Return what a coroutine makes of the port."""

        async def both() -> Any:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            async with server:
                return await visit(server.sockets[0].getsockname()[1])

        return asyncio.run(both())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = head.lower().partition("content-length: ")[2].split("\r\n")[0]
        data = await reader.readexactly(int(length or 0))
        self.here += 1
        self.most = max(self.most, self.here)
        try:
            try:
                body = json.loads(data or b"null")
            except ValueError:
                body = data
            self.bodies.append(body)
            status, kind, objects = self.answer(head.split()[1], body)
            extra = "Retry-After: 1\r\n" if status == 429 else ""
            writer.write(f"HTTP/1.1 {status} x\r\n{extra}Content-Type: {kind}\r\n".encode())
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
            for said in objects:
                text = json.dumps(said) + "\n"
                part = f"data: {text}\n" if kind == "text/event-stream" else text
                writer.write(f"{len(part):x}\r\n{part}\r\n".encode())
                await asyncio.sleep(self.pause_s)
            if kind == "text/event-stream":
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n")
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.here -= 1
            writer.close()
