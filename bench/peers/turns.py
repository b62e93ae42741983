"""Workers and turns: contenders load one after the other, then run one at a time, in turn."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.peers.contenders import Contender

ROOT = Path(__file__).parents[2]
Run = dict[str, Any]


class Worker:
    """A contender's process. skipped: why it cannot take part, or None."""

    def __init__(self, contender: Contender, model: Path) -> None:
        self.contender = contender
        self.skipped: str | None = None
        self.versions: dict[str, str] = {}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed by close()
        command = [sys.executable, "-m", "bench.peers.worker", contender.name]
        self._process = subprocess.Popen(
            [*command, "--model", str(model)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            ready = self._read()
        except ValueError as error:
            ready = {"skipped": str(error)}
        self.skipped = ready.get("skipped")
        self.versions = ready.get("versions", {})

    def ways(self, batch: int) -> list[str]:
        """Return the ways in which it can run a batch of that size; none if it cannot."""
        return self._ask({"ways_for": batch})["ways"]

    def run(self, prompts: list[list[int]], max_tokens: int, way: str) -> Run:
        """Generate once. Raises ValueError with the contender's own words if it fails."""
        return self._ask({"prompts": prompts, "max_tokens": max_tokens, "way": way})

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _ask(self, question: dict[str, Any]) -> Run:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ValueError("its process has ended") from error
        answer = self._read()
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = (self._log.read().strip() or "no message").splitlines()[-1]
            raise ValueError(f"its process ended: {last}")
        return json.loads(line)


def take_turns(
    workers: list[Worker], prompts: list[list[int]], max_tokens: int, repeats: int
) -> tuple[dict[tuple[str, str], list[Run]], dict[str, str]]:
    """Run all contenders on the same prompts, `repeats` times in turn after one warm-up each.

    Every other repeat goes backwards. Returns the runs by (contender, way), and by contender why
    it has none.
    """
    turns, failed = [], {}
    for worker in workers:
        name = worker.contender.name
        ways = worker.ways(len(prompts))
        if not ways:
            failed[name] = f"does not run batches of {len(prompts)}"
        turns += [(worker, name, way) for way in ways]
    runs: dict[tuple[str, str], list[Run]] = {(name, way): [] for _, name, way in turns}
    for repeat in range(repeats + 1):
        for worker, name, way in turns if repeat % 2 else reversed(turns):
            if name in failed:
                continue
            try:
                run = worker.run(prompts, max_tokens if repeat else min(32, max_tokens), way)
            except ValueError as error:
                failed[name] = str(error)
                continue
            if repeat:
                runs[name, way].append(run)
    return {key: done for key, done in runs.items() if key[0] not in failed}, failed
