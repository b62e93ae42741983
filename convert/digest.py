"""SHA-256 of files: of what is converted while it is converted, of what was written."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

_BLOCK = 1 << 22


def sha256(file: Path, stop: Event | None = None) -> str:
    """Return a file's SHA-256 in hexadecimal; of its beginning if stop is set on the way."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while not (stop and stop.is_set()) and (block := stream.read(_BLOCK)):
            digest.update(block)
    return digest.hexdigest()


class Digests:
    """Digests of files, computed in a thread beside other work, in the order of the files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._stop = Event()
        self._pool = ThreadPoolExecutor(1)
        self._found: dict[Path, Future[str]] = {
            file: self._pool.submit(sha256, file, self._stop) for file in files
        }

    def of(self, file: Path) -> str:
        """Return a file's digest, waiting for it."""
        return self._found[file].result()

    def close(self) -> None:
        """End the thread, whether it is done or not."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
