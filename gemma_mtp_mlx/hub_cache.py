"""What the hub's cache holds of Gemma 4, and its removal.

The cache is read as it lies on disk: huggingface_hub's scan leaves out, with a warning, a
repository whose first download was interrupted, and that is just what a user looks for.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir

from gemma_mtp_mlx import catalogue
from gemma_mtp_mlx.checkpoint import read_json
from gemma_mtp_mlx.download import missing_files, readable, repository_folder
from gemma_mtp_mlx.hub import split_name

COMPLETE, INCOMPLETE, LEFTOVER = "complete", "incomplete", "leftover"


@dataclass(frozen=True, slots=True)
class Cached:
    """A snapshot in the cache, or what an interrupted download left there."""

    repository: str
    revision: str | None  # None: not part of a snapshot
    what: str  # target or drafter, QAT, GGUF
    size_bytes: int
    state: str
    last_used: datetime
    folder: Path


def cached_models() -> list[Cached]:
    """Return the Gemma 4 models in the cache, sorted by name."""
    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_dir():
        return []
    return [
        model
        for home in sorted(cache.glob("models--*--*"))
        for model in _models_of(home)
        if home.is_dir()
    ]


def find(name: str) -> list[Cached]:
    """Return what the cache holds of a repository.

    Raises: ValueError listing what is there if it holds nothing of it.
    """
    repository, _ = split_name(name)
    models = cached_models()
    found = [model for model in models if model.repository == repository]
    if not found:
        there = ", ".join(sorted({model.repository for model in models})) or "no Gemma 4 model"
        raise ValueError(f"{repository} is not in {constants.HF_HUB_CACHE}, which holds {there}")
    return found


def remove(repository: str) -> int:
    """Remove all that the cache holds of a repository and return how many bytes that freed."""
    home = repository_folder(repository)
    size = _size(home.rglob("*"))
    scanned = {repo.repo_id: repo for repo in scan_cache_dir().repos if repo.repo_type == "model"}
    if repository in scanned:
        commits = [revision.commit_hash for revision in scanned[repository].revisions]
        scan_cache_dir().delete_revisions(*commits).execute()
    if home.exists():  # not known to the scan, or not removed, of which it says nothing
        shutil.rmtree(home)
    shutil.rmtree(home.parent / ".locks" / home.name, ignore_errors=True)
    return size


def as_json(model: Cached) -> dict[str, object]:
    """Return what is known of a model, to be printed as JSON."""
    return {
        "repository": model.repository,
        "revision": model.revision,
        "what": model.what,
        "size_bytes": model.size_bytes,
        "state": model.state,
        "last_used": model.last_used.isoformat(timespec="seconds"),
        "folder": str(model.folder),
    }


def table(models: list[Cached]) -> list[str]:
    """Return lines with a model each, and one of headings."""
    rows = [("REPOSITORY", "REVISION", "WHAT", "SIZE", "STATE", "LAST USED")]
    rows += [
        (
            model.repository,
            (model.revision or "-")[:8],
            model.what,
            readable(model.size_bytes),
            model.state,
            model.last_used.astimezone().strftime("%Y-%m-%d %H:%M"),
        )
        for model in models
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _models_of(home: Path) -> Iterator[Cached]:
    """Yield a repository's snapshots, and as one more what belongs to none of them."""
    repository = home.name.removeprefix("models--").replace("--", "/")
    snapshots = [path for path in sorted(home.glob("snapshots/*")) if path.is_dir()]
    if catalogue.size_of(repository) is None and not any(map(_is_gemma, snapshots)):
        return
    used: set[Path] = set()
    states = []
    for folder in snapshots:
        files = {path.resolve() for path in folder.rglob("*") if path.is_file()}
        used |= files
        states.append(INCOMPLETE if missing_files(folder) else COMPLETE)
        yield Cached(
            repository,
            folder.name,
            _what(repository, folder),
            _size(iter(files)),
            states[-1],
            _last_used(files, folder),
            folder,
        )
    loose = {path.resolve() for path in home.glob("blobs/*")} - used
    if loose or not snapshots:
        state = LEFTOVER if COMPLETE in states else INCOMPLETE
        what = _what(repository, home)
        size = _size(iter(loose))
        yield Cached(repository, None, what, size, state, _last_used(loose, home), home)


def _is_gemma(folder: Path) -> bool:
    return _model_type(folder).startswith("gemma4")


def _model_type(folder: Path) -> str:
    try:
        return str(read_json(folder / "config.json").get("model_type", ""))
    except (OSError, ValueError):  # of another model, or not there: then its name has to tell
        return ""


def _what(repository: str, folder: Path) -> str:
    drafter = catalogue.is_drafter(repository) or _model_type(folder).endswith("assistant")
    words = ["drafter" if drafter else "target"]
    if catalogue.is_qat(repository):
        words.append("QAT")
    if any(folder.glob("*.gguf")):
        words.append("GGUF")
    return " ".join(words)


def _size(files: Iterator[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())


def _last_used(files: set[Path], folder: Path) -> datetime:
    """Return when one of the files was last read, as far as the disk keeps track of that."""
    times = [path.stat().st_atime for path in files] or [folder.stat().st_mtime]
    return datetime.fromtimestamp(max(times), UTC)
