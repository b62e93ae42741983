"""Many requests from a file, results to a file: checking, resuming, running, writing.

A request is a line of JSON (lines.py), and so is a result. A result is written in one piece when
it is there, so that a run can be ended in any way and taken up where it was: what the output holds
is not run again. Lines are numbered from 0 here and from 1, as editors do, in what a user reads.
"""

import fcntl
import heapq
import itertools
import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.lines import Line, named
from gemma_mtp_mlx.prompts import Prompts
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.sampling import SamplingParams, derived_seed
from gemma_mtp_mlx.session import Chunk, Session

BEGINNING = b'{"index": '  # of every line that is written
SYNC_S = 5.0  # most results of so many seconds are lost with the power


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to be generated. positions: most that it can have in the cache."""

    index: int
    choice: int
    id: str | int | float | None
    params: SamplingParams
    digest: str
    tokens: "array[int]"
    positions: int


@dataclass(frozen=True, slots=True)
class Found:
    """What an output holds already.

    done, failed: (index, choice) of all results and of those that are errors; size: bytes of whole
    lines; torn: bytes of an unfinished line behind them; model: fingerprint of the target.
    """

    done: frozenset[tuple[int, int]] = frozenset()
    failed: frozenset[tuple[int, int]] = frozenset()
    size: int = 0
    torn: int = 0
    model: str = ""


def read_output(file: Path, lines: Sequence[Line], name: str) -> Found:
    """Read what there is of an output; nothing is changed. name: of the prompts file.

    Raises: ValueError if it is not these requests' output.
    """
    if not file.exists():
        if not file.parent.is_dir():
            raise ValueError(f"there is no folder {file.parent}; make it, or choose another")
        return Found()
    if not file.is_file():
        raise ValueError(f"{file} is not a file; results are kept in one, to be resumed")
    digests = {line.index: line.digest for line in lines}
    done, failed, models, size, torn = set(), set(), set(), 0, 0
    with file.open("rb") as source:
        for number, data in enumerate(source, 1):
            if not data.endswith(b"\n") and (
                data[:10] == BEGINNING[: len(data)] or not data.strip(b"\0")
            ):
                torn = len(data)  # what a crash leaves: the start of one of ours, or zeros
                break
            place = f"{file}, line {number}"
            result = _result(data, place)
            key = (result["index"], result["choice"])
            if digests.get(key[0]) != result["request"]:
                raise ValueError(
                    f"{place}: this was made from another request than line {key[0] + 1} of {name} "
                    "is now, or with another --max-tokens; choose another --output, or delete it"
                )
            done.add(key)
            if "error" in result:
                failed.add(key)
            models.add(result["model"])
            size += len(data)
    return Found(frozenset(done), frozenset(failed), size, torn, " and ".join(sorted(models)))


def prepare(lines: Iterable[Line], found: Found, prompts: Prompts, name: str) -> list[Job]:
    """Turn what is left to do into jobs, checked against the model.

    Raises: ValueError naming file and line for what the model cannot do. A grammar is compiled
    once, however many requests have it.
    """
    jobs = []
    sound: set[str] = set()
    for line in lines:
        left = [c for c in range(line.choices) if (line.index, c) not in found.done]
        if not left:
            continue
        with named(name, line.index):
            params = line.params
            tokens = prompts.encode(
                line.prompt, system=line.system, template=line.template, thinking=params.thinking
            )
            rules = repr((params.json_schema, params.regex, params.grammar))
            free = replace(params, json_schema=None, regex=None, grammar=None)
            request = prompts.request(tokens, free if rules in sound else params)
            sound.add(rules)
        ids = array("I", tokens)
        for choice in left:
            own = params
            if params.seed is not None:
                own = replace(params, seed=derived_seed(params.seed, choice))
            jobs.append(Job(line.index, choice, line.id, own, line.digest, ids, request.positions))
    return jobs


def positions(jobs: Iterable[Job | Request], rows: int) -> int:
    """Return the cache positions that suffice for so many of these at a time."""
    return sum(heapq.nlargest(rows, (seat_size(job.positions) for job in jobs)))


def check_fit(session: Session, jobs: Sequence[Job], name: str) -> None:
    """Raise ValueError naming file and line if the largest job can never fit into the memory."""
    largest = max(jobs, key=lambda job: job.positions)
    with named(name, largest.index):
        request = session.prompts.request(list(largest.tokens), largest.params)
        session.engine.seating.check(request)


def run(session: Session, jobs: Iterable[Job], most: int) -> Iterator[list[tuple[Job, Chunk]]]:
    """Run jobs, `most` of them submitted at a time. Yields what each step brought, maybe nothing.

    A job that fails ends with its error in the last chunk's result, and the others go on.
    """
    waiting = enumerate(jobs)
    running: dict[int, Job] = {}
    while True:
        for number, job in itertools.islice(waiting, most - len(running)):
            session.submit(list(job.tokens), job.params, number)
            running[number] = job
        if not running:
            return
        pieces = [(running[chunk.index], chunk) for chunk in session.step()]
        for number in [chunk.index for _, chunk in pieces if chunk.result is not None]:
            del running[number]
        yield pieces


class Output:
    """The file results go to. It holds whole lines only, whatever happens; one run writes to it.

    model: fingerprint of the target.
    Raises: ValueError if another run writes to it, or it has another model's results.
    """

    def __init__(self, file: Path, found: Found, model: str) -> None:
        if found.model not in ("", model):
            raise ValueError(
                f"{file} has results of another model; choose another --output, or delete this one"
            )
        self.file = file
        self._model = model
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = found.size
        self._synced = time.monotonic()
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._descriptor).st_size != found.size + found.torn:
                raise BlockingIOError
        except BlockingIOError:
            os.close(self._descriptor)
            raise ValueError(f"another run is writing to {file}; wait for it, or end it") from None
        os.ftruncate(self._descriptor, found.size)

    def write(self, job: Job, content: Mapping[str, Any]) -> None:
        """Append a job's line."""
        head: dict[str, Any] = {"index": job.index, "choice": job.choice}
        if job.id is not None:
            head["id"] = job.id
        head |= {"request": job.digest, "model": self._model}
        data = json.dumps({**head, **content}).encode() + b"\n"
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except BaseException as error:  # a full disk, Ctrl-C: no part of a line stays
            os.ftruncate(self._descriptor, self._size)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.file)) from error
            raise
        self._size += len(data)
        if time.monotonic() - self._synced > SYNC_S:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Make sure that everything is on the disk."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def _result(data: bytes, place: str) -> dict[str, Any]:
    """Read a line of an output. Raises: ValueError if it is not one."""
    try:
        found = json.loads(data)
        keys = [found[key] for key in ("index", "choice", "request", "model")]
    except (ValueError, KeyError, TypeError):
        keys = []
    if [type(key) for key in keys] != [int, int, str, str]:
        raise ValueError(
            f"{place}: not a result of this command, so the file is left alone; choose another "
            "--output, or remove that line if the file is one"
        )
    return found
