"""Downloads that clients ask for, each in a thread, told as they go on.

A client that leaves ends its download at the next bytes that arrive. They are kept, and the next
pull goes on from there. Of several that want the same file one fetches it and the others wait.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any

from gemma_mtp_mlx import hub
from gemma_mtp_mlx.download import File
from gemma_mtp_mlx.serve.errors import Refusal

MOST = 4


class _Left(Exception):
    """Nobody waits for this download any more."""


class Pulls:
    """The downloads of a server."""

    def __init__(self) -> None:
        self._running = 0

    async def progress(self, name: str) -> AsyncGenerator[dict[str, Any]]:
        """Download a model of the hub and its drafter; yield what Ollama's clients show of it.

        Raises: ValueError saying why it cannot be had; Refusal if too many run.
        """
        if self._running >= MOST:
            raise Refusal(
                429, f"{MOST} downloads are running, which is all", headers={"Retry-After": "10"}
            )
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        left = threading.Event()

        def tell(file: File, there: int) -> None:
            if left.is_set():
                raise _Left
            loop.call_soon_threadsafe(told.put_nowait, _grown(file, there))

        def end(error: Exception | None) -> None:
            self._running -= 1
            told.put_nowait(error)

        def work() -> None:
            problem: Exception | None = None
            try:
                hub.pull(name, tell=tell)
            except Exception as error:  # its client's, who is told
                problem = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(end, problem)

        self._running += 1
        threading.Thread(target=work, name="pull", daemon=True).start()
        try:
            yield {"status": "pulling manifest"}
            while (item := await told.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            left.set()
        yield {"status": "success"}


def _grown(file: File, there: int) -> dict[str, Any]:
    kind = "sha256" if len(file.digest) == 64 else "sha1"
    return {
        "status": f"pulling {file.digest[:12]}",
        "digest": f"{kind}:{file.digest}",
        "total": file.size,
        "completed": there,
    }
