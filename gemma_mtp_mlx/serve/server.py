"""From a loaded model to a server that runs until it is told to stop.

A signal (Ctrl-C, SIGTERM) closes the door: nothing new is taken, what is connected is answered to
its end or until `Settings.shutdown_s` has passed. A second signal ends at once.
"""

import asyncio
import contextlib
import errno
import logging
import math
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_mtp_mlx import catalogue, hub, load
from gemma_mtp_mlx.api import Pair
from gemma_mtp_mlx.async_session import AsyncSession
from gemma_mtp_mlx.constraint import Thinking
from gemma_mtp_mlx.memory import left_bytes
from gemma_mtp_mlx.serve.app import make_app
from gemma_mtp_mlx.serve.card import Card
from gemma_mtp_mlx.serve.log import write
from gemma_mtp_mlx.serve.runner import Runner
from gemma_mtp_mlx.serve.served import Served
from gemma_mtp_mlx.serve.settings import Settings
from gemma_mtp_mlx.serve.tool_grammar import Markers
from gemma_mtp_mlx.session import Session
from gemma_mtp_mlx.weights import fingerprint

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AT_ONCE = 130  # the exit code of a second signal
HEAD_BYTES = 64 << 10  # of a request's line and headers
HEAD_S = 30  # in which they must come
KEEP_ALIVE_S = 15


def bind(host: str, port: int) -> socket.socket:
    """Take a port, without answering yet. Raises: ValueError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {host} is in use; give another --port") from error
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
    return listener


def load_served(model: str | None, draft_model: str | None, *, fast: bool) -> tuple[Pair, Served]:
    """Load what is to be served, and say what clients may call it."""
    began = time.perf_counter()
    folder = hub.builtin() if model is None else hub.resolve(model)
    drafter = None if draft_model == "none" else draft_model or "auto"
    pair = load(folder, drafter, fast=fast)
    tokenizer = pair.tokenizer
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer, and clients send texts; add tokenizer.json")
    is_path = model is None or Path(model).expanduser().exists()
    served = Served(
        name=folder.resolve().name if is_path else str(model),
        aliases=_aliases(model, folder),
        drafter=None if pair.drafter is None else draft_model or "its own drafter",
        # While the weights are nobody else's: the session's thread has them from then on.
        fingerprint=fingerprint(pair.target, pair.target.config),
        context=pair.target.config.max_position_embeddings,
        thinks=Thinking.of(tokenizer) is not None,
        markers=Markers.of(tokenizer),
        card=Card.of(folder, pair.target.config, str(tokenizer.chat_template or "")),
    )
    write([f"Loaded in {time.perf_counter() - began:.1f} s", *pair.notes])
    return pair, served


def _aliases(model: str | None, folder: Path) -> frozenset[str]:
    """What a model may be called: as it was given, by its repository, by a short name."""
    repository = hub.known_as(folder)
    names = {repository, repository.rpartition("/")[2], folder.resolve().name, model or ""}
    published = catalogue.drafter_repository(repository) is not None  # and no fine-tune
    for size in catalogue.SIZES:
        tags = {tag for tag, copy in size.copies().items() if copy == repository}
        if published and catalogue.size_of(repository) == size.name:
            tags.add("")  # in whatever format
        names |= {f"{catalogue.SHORT}{own}{tag}" for own in (size.tag, size.name) for tag in tags}
    return frozenset(name.lower() for name in names if name)


def make_runner(
    pair: Pair, served: Served, settings: Settings, drafts: int | None, kv_bytes: int | None
) -> Runner:
    """Return the runner of a pair.

    drafts: tokens drafted per round, None for the fastest; kv_bytes: None for half of what is left
    on this device, where a server seldom is alone.
    """

    def session() -> Session:
        budget = max(left_bytes() // 2, 0) if kv_bytes is None else kv_bytes
        return pair.session(max_batch=settings.max_batch, num_draft_tokens=drafts, kv_bytes=budget)

    return Runner(AsyncSession(session), served, settings)


def run(runner: Runner, listener: socket.socket) -> int:
    """Serve until a signal. Returns the exit code. Raises: ValueError if memory is not there."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    _allow_files(2 * runner.settings.connections)
    asyncio.run(_run(runner, listener))
    return 0


async def _run(runner: Runner, listener: socket.socket) -> None:
    settings = runner.settings
    config = uvicorn.Config(
        make_app(runner),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.connections,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_s),
    )
    async with runner.session:
        await runner.start()
        write([greeting(runner, listener)])
        await Server(config).serve(sockets=[listener])


def greeting(runner: Runner, listener: socket.socket) -> str:
    """Return the line that says what is served where."""
    served, settings = runner.served, runner.settings
    host, port = listener.getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    how = "without a drafter" if served.drafter is None else f"with {served.drafter}"
    held = runner.occupancy()
    return (
        f"Serving {served.name} {how} on {where}: {settings.max_batch} answers at a time, "
        f"{settings.max_queue} waiting, {held.bytes / 1e9:.2f} GB for keys and values "
        f"({held.positions} positions)"
    )


class Server(uvicorn.Server):
    """uvicorn's, ended by two kinds of signal the same way."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the door and say so."""
        await super().startup(sockets)
        write(["Ready"])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Heed signals while serving. A graceful end is none that a signal should be raised for."""
        before = {name: signal.signal(name, self.handle_exit) for name in SIGNALS}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Close the door; told twice, leave at once, whoever waits."""
        if self.should_exit:
            os._exit(AT_ONCE)
        self.should_exit = True
        write(["Finishing what runs; a second signal ends it at once"])


class Connection(H11Protocol):
    """uvicorn's, with a limit on how long a request's line and headers may take to come."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for a request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request, or of its head."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self.timeout_keep_alive_handler)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _allow_files(wanted: int) -> None:
    """Raise the number of files this process may have open, where the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
