"""A server's process on loopback: started, ready, asked, ended whatever happens, its last words.

Its output goes to a file that is read only when it fails. It has a process group of its own: a
Ctrl-C ends the measurement, and the measurement ends the server.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from types import TracebackType

from bench.peers.turns import ROOT
from bench.serving.client import HOST, ask

START_S = 300  # a large model on a cold disk
STOP_S = 20


class Server:
    """A context manager around one process. command: what follows the Python interpreter."""

    def __init__(self, command: list[str], port: int, ready: str = "/health") -> None:
        self.port = port
        self._ready = ready
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it, kindly first."""
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()

    async def started(self) -> None:
        """Wait until it answers. Raises: ValueError with its last words if it does not."""
        until = time.monotonic() + START_S
        while self.alive and time.monotonic() < until:
            with suppress(OSError, ConnectionError):
                async with ask(self.port, self._ready) as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(0.1)
        state = f"was not ready in {START_S} s" if self.alive else "ended before it was ready"
        raise ValueError(f"{state}: {self.last_words()}")

    async def served_name(self) -> str:
        """Return the name of the first model that it lists."""
        async with ask(self.port, "/v1/models") as reply:
            return json.loads(await reply.read())["data"][0]["id"]

    def last_words(self) -> str:
        """Return the last line of its output."""
        self._log.seek(0)
        return (self._log.read().strip() or "no message").splitlines()[-1].strip()


def heed_sigterm() -> None:
    """Let a kill end a measurement as Ctrl-C does, so that its server ends with it."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])
