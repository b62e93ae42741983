"""A session for asyncio: one thread runs the batch, coroutines await their own pieces of text.

Everything of the session happens in that thread, its making included: MLX's graphs belong to the
thread they were built in.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from gemma_mtp_mlx.prompts import Prompt
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.session import Chunk, Session

Answer = TypeVar("Answer")


class SessionEnded(RuntimeError):
    """The session has failed as a whole, or was closed."""


@dataclass(eq=False, slots=True)
class _Listener:
    """Who waits for chunks; an exception ends the waiting."""

    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Chunk | Exception] = field(default_factory=asyncio.Queue)

    def send(self, piece: Chunk | Exception) -> None:
        """Hand over a piece, from the session's thread."""
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


@dataclass(frozen=True, slots=True)
class _Command:
    """What the session's thread is to do; fail is called instead once the session has ended."""

    run: Callable[[Session], None]
    fail: Callable[[Exception], None]


class AsyncSession:
    """Streams many prompts from one running batch. Use it as an async context manager.

    make: makes the session; called in the thread that runs it.
    """

    def __init__(self, make: Callable[[], Session]) -> None:
        self._make = make
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._listeners: dict[Request, _Listener] = {}
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)
        self._lock = threading.Lock()  # nothing is asked of a session that has ended
        self._failure: Exception | None = None

    async def __aenter__(self) -> "AsyncSession":
        """Start the thread."""
        self._thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End the thread; who still waits gets an error."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    @property
    def failed(self) -> bool:
        """Whether the session has ended, by itself or because it was closed."""
        return self._failure is not None

    async def call(self, function: Callable[[Session], Answer]) -> Answer:
        """Run a function between two steps, in the session's thread, and return what it returns.

        Raises: what the function raises; SessionEnded.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def settle(how: Callable[[], None]) -> None:
            if not future.cancelled():
                how()

        def run(session: Session) -> None:
            try:
                answer = function(session)
            except Exception as error:  # the caller's
                fail(error)
            else:
                loop.call_soon_threadsafe(settle, lambda: future.set_result(answer))

        def fail(error: Exception) -> None:
            loop.call_soon_threadsafe(settle, lambda: future.set_exception(error))

        self._post(_Command(run, fail))
        return await future

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[Chunk]:
        """Yield a prompt's output as it is generated; closing the iterator ends the request.

        Raises: ValueError for bad input; SessionEnded.
        """
        settings = params or SamplingParams()
        request = await self.call(lambda session: session.prompts.request(prompt, settings))
        async for chunk in self.stream_requests([request]):
            yield chunk

    async def stream_requests(self, requests: Sequence[Request]) -> AsyncGenerator[Chunk]:
        """Yield the output of requests that `Prompts.request` has made; see `stream`.

        Chunks carry the request's index.
        """
        listener = _Listener(asyncio.get_running_loop())
        left = len(requests)
        self._post(_Command(lambda s: self._submit(s, listener, requests), listener.send))
        try:
            while left:
                piece = await listener.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.result is not None
                yield piece
        finally:
            if left:
                with suppress(SessionEnded):  # and with it the requests
                    self._post(_Command(lambda s: self._forget(s, requests), lambda error: None))

    def _post(self, command: _Command) -> None:
        """Ask the session's thread to do something. Raises: SessionEnded."""
        with self._lock:
            if self._failure is not None:
                raise _ended(self._failure)
            self._commands.put(command)

    def _submit(self, session: Session, listener: _Listener, requests: Sequence[Request]) -> None:
        try:
            for index, request in enumerate(requests):
                session.enqueue(request, index)
                self._listeners[request] = listener
        except Exception as error:  # bad input is its sender's
            listener.send(error)

    def _forget(self, session: Session, requests: Sequence[Request]) -> None:
        """End requests that nobody waits for any more."""
        for request in requests:
            if self._listeners.pop(request, None) is not None:
                session.cancel(request)

    def _run(self) -> None:
        try:
            session = self._make()
            while self._obey(session):
                for chunk in session.step():
                    listener = self._listeners.get(chunk.request)
                    if listener is not None:
                        listener.send(chunk)
                    if chunk.result is not None:
                        self._listeners.pop(chunk.request, None)
            failure: Exception = RuntimeError("closed")
        except Exception as error:  # of the whole batch: everybody has to know
            failure = error
        with self._lock:
            self._failure = failure
        for listener in self._listeners.values():
            listener.send(_ended(failure))
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command.fail(_ended(failure))

    def _obey(self, session: Session) -> bool:
        """Carry out what was asked for; wait for it if there is nothing else to do."""
        while True:
            try:
                command = self._commands.get(block=not session.engine.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command.run(session)


def _ended(failure: Exception) -> SessionEnded:
    error = SessionEnded(f"the session has ended: {failure}")
    error.__cause__ = failure
    return error
