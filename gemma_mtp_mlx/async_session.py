"""A session for asyncio: one thread runs the batch, coroutines await their own pieces of text.

Everything of the session happens in that thread, its making included: MLX's graphs belong to the
thread they were built in.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from gemma_mtp_mlx.prompts import Prompt
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.session import Chunk, Session


@dataclass(eq=False, slots=True)
class _Listener:
    """Who waits for a request's chunks; an exception ends the waiting."""

    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Chunk | Exception] = field(default_factory=asyncio.Queue)

    def send(self, piece: Chunk | Exception) -> None:
        """Hand over a piece, from the session's thread."""
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


Command = Callable[[], None]


class AsyncSession:
    """Streams many prompts from one running batch. Use it as an async context manager.

    make: makes the session; called in the thread that runs it.
    """

    def __init__(self, make: Callable[[], Session]) -> None:
        self._make = make
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._listeners: dict[Request, _Listener] = {}
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)
        self._session: Session | None = None
        self._failure: Exception | None = None

    async def __aenter__(self) -> "AsyncSession":
        """Start the thread."""
        self._thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End the thread; who still waits gets an error."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[Chunk]:
        """Yield a prompt's output as it is generated; closing the iterator ends the request.

        Raises: ValueError for bad input; RuntimeError if the session has ended.
        """
        listener = _Listener(asyncio.get_running_loop())
        requests: list[Request] = []
        self._commands.put(lambda: self._submit(listener, requests, prompt, params))
        try:
            while True:
                if self._failure is not None and listener.pieces.empty():
                    raise RuntimeError("the session has ended") from self._failure
                piece = await listener.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.result is not None:
                    return
        finally:
            self._commands.put(lambda: self._forget(requests))

    def _submit(
        self,
        listener: _Listener,
        requests: list[Request],
        prompt: Prompt,
        params: SamplingParams | None,
    ) -> None:
        assert self._session is not None
        try:
            request = self._session.submit(prompt, params)
        except Exception as error:  # bad input is its sender's
            listener.send(error)
            return
        requests.append(request)
        self._listeners[request] = listener

    def _forget(self, requests: list[Request]) -> None:
        """End requests that nobody waits for any more."""
        assert self._session is not None
        for request in requests:
            if self._listeners.pop(request, None) is not None:
                self._session.cancel(request)

    def _run(self) -> None:
        try:
            self._session = self._make()
            while self._obey():
                for chunk in self._session.step():
                    listener = self._listeners.get(chunk.request)
                    if listener is not None:
                        listener.send(chunk)
                    if chunk.result is not None:
                        self._listeners.pop(chunk.request, None)
            self._failure = RuntimeError("closed")
        except Exception as error:  # of the whole batch: everybody has to know
            self._failure = error
        for listener in self._listeners.values():
            listener.send(RuntimeError(f"the session has ended: {self._failure}"))

    def _obey(self) -> bool:
        """Carry out what was asked for; wait for it if there is nothing else to do."""
        assert self._session is not None
        while True:
            idle = not self._session.engine.busy
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
