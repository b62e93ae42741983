"""What a conversion has finished, kept beside it, so that a killed one goes on from there."""

import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gemma_mtp_mlx.checkpoint import read_json
from gemma_mtp_mlx.convert.digest import sha256

_FILE, _LOCK = "journal.json", "lock"


class Journal:
    """The folder that becomes OUT when it is complete, and what in it is finished.

    done: what was noted of each finished shard, by its path in the folder, "sha256" among it.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Take the folder, anew unless it was begun for the same key: files, plan and version.

        Raises: ValueError if another process has it.
        """
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link to another folder; remove it")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / _LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another conversion is writing {folder}; wait for it, or choose another folder"
            ) from error
        self._key = key
        self.done = self._resume()
        self._remove_unfinished()
        self._save()

    def note(self, shard: str, facts: dict[str, Any]) -> None:
        """Remember a finished shard."""
        self.done[shard] = facts
        self._save()

    def finish(self, out: Path) -> None:
        """Give the folder OUT's name, without what only a conversion under way needs."""
        for name in (_FILE, _LOCK):
            (self.folder / name).unlink()
        if out.is_dir():
            out.rmdir()
        self.folder.rename(out)
        self._lock.release()

    def close(self, *, keep: bool) -> None:
        """Let go of the folder; keep: whether finished shards are kept for another time."""
        if not (keep and self.done):
            shutil.rmtree(self.folder)
        self._lock.release()

    def _resume(self) -> dict[str, dict[str, Any]]:
        """Return what is noted for the same key and still there as it was written."""
        journal = self.folder / _FILE
        if not journal.is_file():
            return {}
        try:
            noted = read_json(journal)
            if noted["key"] != self._key:
                return {}
            return {
                name: facts
                for name, facts in noted["shards"].items()
                if (file := self.folder / name).is_file() and sha256(file) == facts["sha256"]
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _remove_unfinished(self) -> None:
        kept = {self.folder / name for name in (*self.done, _LOCK)}
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()

    def _save(self) -> None:
        scratch = self.folder / f"{_FILE}.new"
        scratch.write_text(json.dumps({"key": self._key, "shards": self.done}))
        scratch.rename(self.folder / _FILE)
