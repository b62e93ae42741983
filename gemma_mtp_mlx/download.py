"""Download a repository of the Hugging Face hub into its cache: checked, and resumed.

huggingface_hub downloads to a file of a random name, which it deletes on an error and leaves behind
when it is killed, and it compares sizes only. So files are fetched here, each to one name that the
next attempt goes on with, and become blobs of the cache when they have the hash the hub announces.
config.json is linked last: a snapshot that has one has the rest.
Sources: huggingface_hub 2.4 file_download.py, _download_to_tmp_and_move; its issue 4196; the layout
of the cache is in its guide "Understand caching".
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm

from gemma_mtp_mlx.checkpoint import INDEX, read_json
from gemma_mtp_mlx.hub_errors import NO_ROOM, explained, no_room, refused

Choose = Callable[[Sequence[str]], list[str]]
T = TypeVar("T")

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PAUSES = (1.0, 2.0, 4.0)  # seconds before another attempt, if the hub fails


class File(NamedTuple):
    """A file of a repository. digest: SHA-256 of large files, git's SHA-1 of the others."""

    path: str
    size: int
    digest: str


Tell = Callable[[File, int], None]  # a file, and how many of its bytes are there


def untold(file: File, there: int) -> None:
    """Tell nobody how a download goes on."""


def download(repository: str, revision: str, choose: Choose, tell: Tell = untold) -> Path:
    """Return the folder of a repository's snapshot in the cache, after fetching what it lacks.

    revision: a branch, tag or commit. choose: picks what is needed from the names of all files.
    tell: is told of each file that is fetched as it grows; what it raises ends the download, and
    what has arrived is kept. If the hub cannot be reached, a snapshot in the cache will do, unless
    it is incomplete.
    Raises: ValueError saying what was looked for, why it is not there and what to do.
    """
    there = snapshot_folder(repository, revision)
    cached = there is not None and not missing_files(there)
    with explained(repository, revision, cached=cached):
        try:
            commit, files = _listing(repository, revision)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if there is None or not cached or refused(error):
                raise
            return there
        wanted = set(choose([file.path for file in files]))
        home = repository_folder(repository)
        folder = home / "snapshots" / commit
        files = [file for file in files if file.path in wanted]
        lacking = [file for file in files if not _has(folder / file.path, file.size)]
        _fetch(repository, commit, lacking, tell)
        for file in sorted(lacking, key=lambda file: file.path == "config.json"):
            _link(home / "blobs" / file.digest, folder / file.path)
        _name(home, revision, commit)
    return folder


def repository_folder(repository: str) -> Path:
    """Return the cache's folder for a repository, which need not be there."""
    return Path(constants.HF_HUB_CACHE) / "--".join(["models", *repository.split("/")])


def snapshot_folder(repository: str, revision: str) -> Path | None:
    """Return the folder of a snapshot in the cache, complete or not, None if there is none."""
    home = repository_folder(repository)
    ref = home / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    folder = home / "snapshots" / commit
    return folder if folder.is_dir() else None


def remove_damaged(folder: Path, before: float) -> list[str]:
    """Remove a snapshot's files that do not have their hash any more, and return which.

    before: a time; files that arrived later were compared then.
    """
    removed = []
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if not _HASH.fullmatch(blob.name) or not blob.is_file() or blob.stat().st_mtime >= before:
            continue
        if _digest(blob, blob.name) != blob.name:
            _discard(path)
            removed.append(path.name)
    return removed


def missing_files(folder: Path) -> list[str]:
    """Return what a model's folder lacks to be loaded, as far as the folder itself tells."""
    missing = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.exists()}
    if any(folder.glob("*.gguf")):
        return sorted(missing)
    if not (folder / "config.json").exists():
        missing.add("config.json")
    if (folder / INDEX).exists():
        try:
            shards = set(read_json(folder / INDEX).get("weight_map", {}).values())
        except ValueError:
            return sorted({*missing, INDEX})
        missing |= {name for name in shards if not (folder / name).exists()}
    elif not any(folder.glob("model*.safetensors")):
        missing.add("model.safetensors")
    return sorted(missing)


def readable(size: int) -> str:
    """Return a size in bytes as text."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _has(path: Path, size: int) -> bool:
    """Return whether a file is there; one of another size is removed."""
    if path.exists() and path.stat().st_size != size:
        _discard(path)
    return path.exists()


def _discard(link: Path) -> None:
    """Remove a file of a snapshot, and the blob that it is."""
    blob = link.resolve()
    link.unlink()
    blob.unlink(missing_ok=True)


def _listing(repository: str, revision: str) -> tuple[str, list[File]]:
    """Return the commit that the revision is now, and its files."""
    info = _patiently(
        lambda: HfApi().model_info(
            repository,
            revision=revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        ),
        HfHubHTTPError,  # not for want of a network: the cache may do
    )
    return info.sha, [
        File(file.rfilename, file.size, file.blob_id if file.lfs is None else file.lfs.sha256)
        for file in info.siblings
    ]


def _patiently(call: Callable[[], T], passing: type[Exception]) -> T:
    """Return what call returns, tried again when it raises an error that may pass."""
    for pause in _PAUSES:
        try:
            return call()
        except passing as error:
            if refused(error):
                raise
        time.sleep(pause)
    return call()


def _fetch(repository: str, commit: str, files: Sequence[File], tell: Tell) -> None:
    """Make each file a blob of the cache."""
    home = repository_folder(repository)
    blobs, locks = home / "blobs", home.parent / ".locks" / home.name
    parts = {file.digest: (file, _part(blobs, file)) for file in files}
    parts = {digest: part for digest, part in parts.items() if not (blobs / digest).exists()}
    there = sum(part.stat().st_size for _, part in parts.values() if part.exists())
    total = sum(file.size for file, _ in parts.values())
    _check_room(repository, total - there)
    if not parts:
        return
    blobs.mkdir(parents=True, exist_ok=True)
    locks.mkdir(parents=True, exist_ok=True)
    bar = tqdm(desc=repository, total=total, initial=there, unit="B", unit_scale=True, disable=None)
    with bar:
        for digest, (file, part) in parts.items():
            with WeakFileLock(locks / f"{digest}.lock"):
                if (blobs / digest).exists():
                    continue
                url = hf_hub_url(repository, file.path, revision=commit)
                try:
                    _fetch_file(url, file, part, _Meter(bar, file, part, tell))
                except OSError as error:
                    if error.errno in NO_ROOM:
                        rest = readable(total - int(bar.n))
                        raise no_room(repository, f"lacks {rest} and the disk is full") from error
                    raise
                if _digest(part, digest) != digest:
                    part.unlink()
                    raise ValueError(
                        f"{file.path} of {repository} arrived with another hash than the hub "
                        "announces and was deleted; run the same again, over another network if "
                        "that does not help"
                    )
                part.rename(blobs / digest)


def _part(blobs: Path, file: File) -> Path:
    """Return where a file is written to until it is whole."""
    part = blobs / f"{file.digest}.incomplete"
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    return part


class _Meter:
    """Counts the bytes of one file, on a repository's bar and for who wants to be told."""

    def __init__(self, bar: tqdm, file: File, part: Path, tell: Tell) -> None:
        self._bar, self._file, self._tell = bar, file, tell
        self._there = part.stat().st_size if part.exists() else 0
        self.update(0)

    def update(self, count: int) -> None:
        """Count bytes that have arrived, or that have to be fetched again."""
        self._there += count
        self._bar.update(count)
        self._tell(self._file, self._there)


def _fetch_file(url: str, file: File, part: Path, meter: _Meter) -> None:
    """Write what a file lacks."""
    with part.open("ab") as stream:
        _patiently(
            lambda: http_get(
                url,
                stream,
                resume_size=stream.tell(),
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                expected_size=file.size,
                displayed_filename=file.path,
                tqdm_class=lambda **_: nullcontext(meter),
            ),
            HTTPError,
        )


def _digest(path: Path, like: str) -> str:
    """Return a file's hash, of the same kind as another."""
    with path.open("rb") as stream:
        if len(like) == 2 * hashlib.sha256().digest_size:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        content = stream.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _link(blob: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(os.path.relpath(blob, link.parent))
    except FileExistsError:
        if not link.exists():
            link.unlink()
            _link(blob, link)
    except OSError:  # a disk without symbolic links
        blob.replace(link)


def _name(home: Path, revision: str, commit: str) -> None:
    """Record in the cache which commit a branch or tag is."""
    ref = home / "refs" / revision
    if revision == commit or (ref.is_file() and ref.read_text() == commit):
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    new = ref.with_name(f".{ref.name}.{os.getpid()}")
    new.write_text(commit)
    new.replace(ref)


def _check_room(repository: str, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE).absolute()
    place = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        what = f"needs {readable(needed)} and {readable(free)} are free"
        raise no_room(repository, what)
