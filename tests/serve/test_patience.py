"""Clients that are slow on purpose are let go: in their head, in their body, in what they read."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gemma_mtp_mlx.serve import server
from gemma_mtp_mlx.serve.guard import Guard
from gemma_mtp_mlx.serve.log import Log
from gemma_mtp_mlx.serve.settings import Settings
from tests.serve.wire import CHAT, head, read_until, wait_until

SHORT_S = 0.3
ENOUGH_S = 20.0
SIZES = {"/flood": 65536, "/drops": 1}  # of the parts of answers that do not end


class Reader:
    """Reads a body, answers for ever where asked to, and tells what ended it."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.end: Callable[[], None]  # tells its server to end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while scope["path"] in SIZES:
                part = bytes(SIZES[scope["path"]])
                await send({"type": "http.response.body", "body": part, "more_body": True})
                await asyncio.sleep(0.001)
        except (TimeoutError, asyncio.CancelledError) as error:
            self.ended.append(type(error).__name__)
            raise
        await send({"type": "http.response.body", "body": b"read", "more_body": False})


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Reader]]:
    """Yield the port of an impatient server, and its application."""
    monkeypatch.setattr(server, "HEAD_S", SHORT_S)
    application = Reader()
    settings = Settings(body_s=SHORT_S, send_s=SHORT_S)
    app = Log(Guard(application, settings), count=lambda endpoint, status: None)
    config = uvicorn.Config(
        app,
        http=server.Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        application.end = lambda: setattr(running, "should_exit", True)
        yield listener.getsockname()[1], application
        running.should_exit = True
        thread.join(ENOUGH_S)
    assert not thread.is_alive()


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=ENOUGH_S)


@pytest.mark.parametrize("said", [b"", b"GET /", b"GET / HTTP/1.1\r\nhost: local"])
def test_a_head_that_does_not_end(reader: tuple[int, Reader], said: bytes) -> None:
    with _connect(reader[0]) as connection:
        connection.sendall(said)
        assert connection.recv(1) == b""


def test_a_head_that_comes_in_drops(reader: tuple[int, Reader]) -> None:
    def is_let_go() -> bool:
        time.sleep(SHORT_S / 10)
        try:
            connection.sendall(b"G")
        except ConnectionError:
            return True
        return False

    with _connect(reader[0]) as connection:
        assert wait_until(is_let_go)


def test_a_body_that_does_not_end(reader: tuple[int, Reader]) -> None:
    with _connect(reader[0]) as connection:
        connection.sendall(head(CHAT, 100) + b"{")
        said = read_until(connection, b"}}")
    assert said.startswith(b"HTTP/1.1 408")
    assert "within 0.3 seconds" in json.loads(said.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_reader_that_takes_nothing(reader: tuple[int, Reader]) -> None:
    port, application = reader
    with _connect(port) as connection:
        connection.sendall(head("/flood", 0))
        assert wait_until(lambda: application.ended == ["TimeoutError"])
        with contextlib.suppress(ConnectionError):
            while connection.recv(1 << 20):  # what was on its way, and then the end
                pass


def test_the_end_of_the_server_waits_for_nobody_for_ever(
    reader: tuple[int, Reader], capfd: pytest.CaptureFixture[str]
) -> None:
    port, application = reader
    with _connect(port) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(head("/drops", 0))
        connection.recv(1 << 20)
        application.end()
        while connection.recv(1 << 20):
            pass
    assert wait_until(lambda: application.ended == ["CancelledError"])
    assert wait_until(lambda: "cut off by the server's end" in "".join(capfd.readouterr()))
