"""A real server in a process of its own, on a port of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

START_S = 120.0


class ServerProcess:
    """A running server. url: where; log: what it writes to stderr."""

    def __init__(
        self,
        log: Path,
        *options: str,
        start: Sequence[str] = ("-m", "gemma_mtp_mlx", "serve"),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        argv = [sys.executable, "-P", *start, "--port", "0", *options]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                argv, stdout=subprocess.DEVNULL, stderr=file, env={**os.environ, **(env or {})}
            )
        deadline = time.monotonic() + START_S
        while "\nReady\n" not in self.said():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"the server did not start:\n{self.said()}")
            time.sleep(0.05)
        found = re.search(r" on (http://\S+):(\d+): ", self.said())
        assert found is not None
        self.url = f"{found[1]}:{found[2]}"
        self.port = int(found[2])

    def said(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def entries(self) -> list[dict[str, Any]]:
        """The lines of its log that are about requests."""
        lines = self.said().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def health(self) -> dict[str, Any]:
        """What /health says."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=30) as response:
            found: dict[str, Any] = json.load(response)
            return found

    def metrics(self) -> dict[str, float]:
        """The counters, by name and labels but the model's."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        found = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = re.sub(r'(?<=\{)model_name="[^"]*",?|,model_name="[^"]*"', "", name)
                found[name.replace("{}", "")] = float(value)
        return found

    def memory_bytes(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return 1024 * int(found[1])

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *exc: object) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.wait(60)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop and return its exit code."""
        self.process.send_signal(how)
        return self.process.wait(60)
