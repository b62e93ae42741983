"""Shards written as their parameters are read: strips of rows through every core, in order.

Values are changed on the CPU, whatever else there is, so that the bytes are the same on every
machine. Memory holds a few strips, and the scales of one parameter: they lie behind all its codes.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Barrier, Lock
from typing import NamedTuple

import mlx.core as mx

from gemma_mtp_mlx.checkpoint import Checkpoint
from gemma_mtp_mlx.convert.packing import Error, Part, Strip, convert_rows
from gemma_mtp_mlx.convert.shard import ShardFile

WORKERS = min(9, 1 + (os.cpu_count() or 1))  # one waits for what MLX computes
_local = threading.local()


@cache
def _workers() -> ThreadPoolExecutor:
    """Return the threads that convert strips, each with an MLX stream, which is a thread too.

    A stream belongs to the thread that opens it and is never closed, so threads and streams are
    made once, and all of them before any work, as MLX is not asked to do both at a time.
    """
    pool, all_there, one_at_a_time = ThreadPoolExecutor(WORKERS), Barrier(WORKERS), Lock()

    def open_stream() -> None:
        with one_at_a_time:
            _local.stream = mx.new_stream(mx.cpu)
        all_there.wait()

    wait([pool.submit(open_stream) for _ in range(WORKERS)])
    return pool


class Written(NamedTuple):
    """A finished file: its SHA-256, and the error of each parameter that was packed."""

    sha256: str
    errors: dict[str, Error]


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to write. name: its path in the folder."""

    name: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.written_bytes for part in self.parts)


def shards(folder: str, parts: Iterable[Part], most_bytes: int) -> list[Shard]:
    """Divide parameters, in order, into files of at most so many bytes, or of one parameter."""
    files: list[list[Part]] = [[]]
    held = 0
    for part in parts:
        if held and held + part.written_bytes > most_bytes:
            files.append([])
            held = 0
        files[-1].append(part)
        held += part.written_bytes
    count = len(files)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    return [Shard(f"{folder}{name}", tuple(file)) for name, file in zip(names, files, strict=True)]


def write_shard(
    shard: Shard, checkpoint: Checkpoint, file: Path, on_bytes: Callable[[int], None]
) -> Written:
    """Write a shard; an unfinished file is removed.

    on_bytes: told how many bytes of the source were read, as they are.
    Raises: ValueError naming a tensor whose values cannot be meant; OSError.
    """
    work = ((part, rows) for part in shard.parts for rows in part.strips())
    errors: dict[str, Error] = {}
    tensors = [output for part in shard.parts for output in part.outputs]
    unfinished = file.with_suffix(".unfinished")
    try:
        ahead = closing(_ahead(checkpoint, work))
        with ahead as strips, ShardFile(unfinished, tensors) as out:
            behind: list[list[mx.array]] = []
            current = shard.parts[0]
            for part, rows, strip in strips:
                if part is not current:
                    _write_all(out, behind)
                    current, behind = part, []
                first, *rest = strip.arrays
                out.write(first)
                behind = behind or [[] for _ in rest]
                for arrays, array in zip(behind, rest, strict=True):
                    arrays.append(array)
                if strip.error is not None:
                    errors[part.name] = errors.get(part.name, Error()) + strip.error
                on_bytes(part.row_bytes * len(rows))
            _write_all(out, behind)
            digest = out.finish()
        unfinished.rename(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return Written(digest, errors)


def _write_all(out: ShardFile, behind: list[list[mx.array]]) -> None:
    for arrays in behind:
        for array in arrays:
            out.write(array)


def _ahead(
    checkpoint: Checkpoint, work: Iterator[tuple[Part, range]]
) -> Generator[tuple[Part, range, Strip], None, None]:
    """Yield strips in the order of the work, two for each thread under way at most."""
    pool = _workers()
    waiting: deque[tuple[Part, range, Future[Strip]]] = deque()
    try:
        for part, rows in work:
            if len(waiting) == 2 * WORKERS:
                done, its_rows, strip = waiting.popleft()
                yield done, its_rows, strip.result()
            waiting.append((part, rows, pool.submit(_strip, checkpoint, part, rows)))
        while waiting:
            done, its_rows, strip = waiting.popleft()
            yield done, its_rows, strip.result()
    finally:
        for _, _, strip in waiting:
            strip.cancel()
        wait([strip for _, _, strip in waiting])


def _strip(checkpoint: Checkpoint, part: Part, rows: range) -> Strip:
    """Read and convert rows, on a stream of this thread's own."""
    with mx.stream(_local.stream):
        value = checkpoint.rows(part.stored, rows.start, rows.stop)
        return convert_rows(part.stored, value, part.change)
