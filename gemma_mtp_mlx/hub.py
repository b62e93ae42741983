"""Find a model: a folder on disk, a repository on the Hugging Face hub, or the built-in pair."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_BUILTIN = Path(__file__).parent / "builtin"


def resolve(name: str) -> Path:
    """Return the folder of a model. name: a folder, or "owner/name" on the hub, downloaded once.

    Raises: ValueError saying what was looked for, why it is not there and what to do.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{path} has no config.json; give the folder of a model")
    if path.exists():
        raise ValueError(f"{path} is a file; give the folder with config.json and safetensors")
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(
            f"there is no folder {path}; give a model folder or a hub repository (owner/name)"
        )
    return _download(name)


def resolve_source(name: str) -> Path:
    """Placeholder."""
    return resolve(name)


def known_as(folder: Path) -> str:
    """Placeholder."""
    return folder.resolve().name


def drafter_of_source(name: str) -> str | None:
    """Placeholder."""
    return None


def check_upload(repository: str) -> None:
    """Placeholder."""


def upload(folder: Path, repository: str) -> str:
    """Placeholder."""
    return ""


def repository_of(folder: Path) -> tuple[str, str] | None:
    """Placeholder."""
    return None


def drafter_for(folder: Path) -> Path | None:
    """Return the drafter that lies in a target's folder, if there is one."""
    drafter = folder / "drafter"
    return drafter if (drafter / "config.json").is_file() else None


def builtin() -> Path:
    """Return the built-in target's folder; its drafter lies in it."""
    if drafter_for(_BUILTIN) is None or not (_BUILTIN / "config.json").is_file():
        raise ValueError(
            f"the built-in model is missing from {_BUILTIN}; reinstall mlx-gemma-mtp, "
            "or give a model"
        )
    return _BUILTIN


def _download(repository: str) -> Path:
    try:
        folder = Path(snapshot_download(repository, allow_patterns=_FILES))
    except GatedRepoError as error:
        raise ValueError(
            f"{repository} asks you to accept its licence: do so at "
            f"https://huggingface.co/{repository}, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {repository} and no such repository on the hub; check the "
            "spelling, or run: hf auth login (if it is private)"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"there is no folder {repository}, and the hub cannot be reached to download it; "
            "connect to the network or give a folder on disk"
        ) from error
    except (HTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"downloading {repository} failed: {reason}; try again") from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"the repository {repository} has no config.json; give a model's")
    return folder
