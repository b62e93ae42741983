"""Find a model: a folder on disk, a repository on the Hugging Face hub, or the built-in pair."""

import re
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from gemma_mtp_mlx import catalogue
from gemma_mtp_mlx.checkpoint import read_json
from gemma_mtp_mlx.download import (
    Tell,
    download,
    missing_files,
    remove_damaged,
    snapshot_folder,
    untold,
)

_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*?)(?:/([\w.-]+\.gguf))?(?:@([\w][\w./-]*))?")
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([^/]+)$")
_BUILTIN = Path(__file__).parent / "builtin"
_CONVERTED = "conversion.json"


def resolve(name: str, tell: Tell = untold) -> Path:
    """Return the folder of a model that can be loaded, downloaded once if it is on the hub.

    name: a folder, "owner/name" or "owner/name@revision" on the hub, or a short name, "gemma4:26b".
    tell: is told how a download goes on; see `download`.
    Raises: ValueError saying what was looked for, why it is not there and what to do.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{path} has no config.json; give the folder of a model")
    if path.exists() and path.suffix == ".gguf":
        raise _not_converted(str(path))
    if path.exists():
        raise ValueError(f"{path} is a file; give the folder with config.json and safetensors")
    repository, file, revision = _parse(name)
    if file is not None:
        raise _not_converted(name)

    def choose(files: Sequence[str]) -> list[str]:
        if "config.json" in files and any(file.endswith(".safetensors") for file in files):
            return _model_files(files)
        if any(file.endswith(".gguf") for file in files):
            raise _not_converted(name)
        raise ValueError(
            f"the repository {repository} has no config.json with safetensors; give a model's"
        )

    folder = download(repository, revision, choose, tell)
    if not (folder / "config.json").is_file():
        raise _not_converted(name)
    return folder


def resolve_source(name: str, tell: Tell = untold) -> Path:
    """Return what can be converted: the folder of a model, or a GGUF file.

    name: as for `resolve`, a GGUF file on disk, or "owner/name/FILE.gguf" on the hub. Of a
    repository of GGUF files the model is taken if there is one, projectors and drafters aside.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.exists():
        return resolve(name, tell)
    repository, file, revision = _parse(name)

    def choose(files: Sequence[str]) -> list[str]:
        if file is not None and file not in files:
            raise ValueError(f"the repository {repository} has no file {file}")
        if file is None and any(other.endswith(".safetensors") for other in files):
            return _model_files(files)
        return [file or _only_gguf(repository, files)]

    folder = download(repository, revision, choose, tell)
    if file is None and (folder / "config.json").is_file():
        return folder
    return folder / (file or _only_gguf(repository, [path.name for path in folder.iterdir()]))


def cached(name: str) -> Path | None:
    """Return where the hub's cache holds a model, None if it does not hold it all.

    Raises: ValueError for what is no name on the hub.
    """
    folder = snapshot_folder(*split_name(name))
    return None if folder is None or missing_files(folder) else folder


def pull(name: str, *, drafter: bool = True, tell: Tell = untold) -> list[Path]:
    """Download a model and, if it has one, its drafter; return their folders, or a GGUF file.

    What was there before is compared with its hashes too, and fetched again if it is damaged.
    """
    began = time.time()
    target = resolve_source(name, tell)
    found = drafter_for(target, tell) if drafter else None
    return [_sound(path, began, tell) for path in (target, found) if path is not None]


def _sound(path: Path, began: float, tell: Tell) -> Path:
    """Return a model after fetching again what of it was damaged before the time given."""
    folder = path if path.is_dir() else path.parent
    origin = repository_of(folder)
    if origin is None or not remove_damaged(folder, began):
        return path
    repository, commit = origin
    file = "" if path == folder else f"/{path.name}"
    return resolve_source(f"{repository}{file}@{commit}", tell)


def drafter_name(target: Path) -> str | None:
    """Return the folder or the repository of a target's drafter, None if none is known.

    target: its folder, or a GGUF file. The drafter is looked for in the target's folder, beside it
    as FOLDER-assistant, and on the hub if the target is from there: as a snapshot in the cache, or
    converted, which conversion.json tells.
    """
    folder = target if target.is_dir() else target.parent
    for near in (folder / "drafter", folder.with_name(f"{folder.name}-assistant")):
        if (near / "config.json").is_file():
            return str(near)
    origin = _origin(folder)
    return None if origin is None else catalogue.drafter_repository(origin)


def drafter_for(target: Path, tell: Tell = untold) -> Path | None:
    """Return the folder of a target's drafter, downloaded if it is on the hub; see above."""
    name = drafter_name(target)
    return None if name is None else resolve(name, tell)


def repository_of(folder: Path) -> tuple[str, str] | None:
    """Return the repository and revision of a snapshot in the hub's cache, by its path."""
    found = _SNAPSHOT.search(folder.absolute().as_posix())
    return None if found is None else (found[1].replace("--", "/"), found[2])


def known_as(folder: Path) -> str:
    """Return what a model is called: its repository, what it was made from, or its folder."""
    return _origin(folder) or folder.resolve().name


def builtin() -> Path:
    """Return the built-in target's folder; its drafter lies in it."""
    whole = (_BUILTIN / "config.json", _BUILTIN / "drafter" / "config.json")
    if not all(file.is_file() for file in whole):
        raise ValueError(
            f"the built-in model is missing from {_BUILTIN}; reinstall mlx-gemma-mtp, "
            "or give a model"
        )
    return _BUILTIN


def split_name(name: str) -> tuple[str, str]:
    """Return the repository and revision that a name on the hub means, a short name's included."""
    repository, _, revision = _parse(name)
    return repository, revision


def _parse(name: str) -> tuple[str, str | None, str]:
    """Return the repository, the GGUF file if one is named, and the revision."""
    short, _, revision = name.partition("@")
    if short.lower().startswith(catalogue.SHORT):
        return catalogue.repository(short), None, revision or "main"
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"there is no folder {Path(name).expanduser()}; give a model folder, a hub repository "
            f"(owner/name) or a short name ({catalogue.SHORT}26b)"
        )
    return found[1], found[2], found[3] or "main"


def _model_files(files: Sequence[str]) -> list[str]:
    return [file for file in files if any(fnmatch(file, pattern) for pattern in _FILES)]


def _only_gguf(repository: str, files: Sequence[str]) -> str:
    models = [
        file
        for file in sorted(files)
        if file.endswith(".gguf") and "mmproj" not in file and not file.startswith("mtp-")
    ]
    if not models:
        raise ValueError(f"the repository {repository} has no model; give one with safetensors")
    if len(models) > 1:
        raise ValueError(
            f"the repository {repository} has several models; name one: "
            + ", ".join(f"{repository}/{file}" for file in models)
        )
    return models[0]


def _not_converted(name: str) -> ValueError:
    return ValueError(
        f"{name} is GGUF, which MLX models cannot read as it is; convert it: "
        f"mlx-gemma-mtp convert --hf-path {name} --mlx-path FOLDER"
    )


def _origin(folder: Path) -> str | None:
    """Return the repository that a target is from, or what it was made from, if that is known."""
    converted = folder / _CONVERTED
    if converted.is_file():
        source = read_json(converted).get("source")
        name = str(source.get("name", "")) if isinstance(source, dict) else ""
        if name.lower().startswith(catalogue.SHORT):
            return split_name(name)[0]
        snapshot = repository_of(Path(name))
        file = _NAME.fullmatch(name)
        return snapshot[0] if snapshot else file[1] if file else name
    snapshot = repository_of(folder)
    return None if snapshot is None else snapshot[0]
