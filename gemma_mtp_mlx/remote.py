"""A repository on the Hugging Face hub, read without downloading it: its config and headers.

Of a weight file only the header is asked for, by its range, and what a server sends beyond that is
not read. It is checked exactly as a file's on disk (`checkpoint.read_header`). Nothing is kept in
the hub's cache, where half a repository would look like a whole one.
"""

import re
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from huggingface_hub import hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from gemma_mtp_mlx.checkpoint import (
    INDEX,
    LARGEST_HEADER,
    LARGEST_JSON,
    Stored,
    indexed_files,
    parse_json,
    read_header,
    read_json,
)

_WEIGHTS = "model.safetensors"
_FIRST_BYTES = 1 << 16  # asked for before it is known how long a header is
_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")
_TIMEOUT_S = 30.0
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class _Answer(NamedTuple):
    """The beginning of a file, and how many bytes all of it has."""

    data: bytes
    size: int


class RemoteCheckpoint:
    """A model in a repository, or in a folder of one: its config and what its headers say.

    Raises: ValueError saying what is not there, or not as it should be, and what to do.
    """

    dtype: str | None = None
    files: tuple[Path, ...] = ()  # none are here

    def __init__(self, repository: str, folder: str = "") -> None:
        self._repository, self._folder = repository, folder
        config = self._get("config.json", LARGEST_JSON)
        if config is None:
            raise ValueError(f"the repository {repository} has no {folder}config.json")
        self.config = parse_json(self._path("config.json"), config.data)
        self.tensors: dict[str, Stored] = {}
        for name in self._weight_files():
            for tensor, stored in self._header(name).items():
                if tensor in self.tensors:
                    first = self.tensors[tensor].file
                    raise ValueError(f"tensor {tensor} is stored twice, in {first} and {name}")
                self.tensors[tensor] = stored

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Refuse: nothing of a tensor is here."""
        raise ValueError(f"{self._repository} is not downloaded, so {name} cannot be read")

    def _path(self, name: str) -> Path:
        return Path(self._repository, self._folder, name)

    def _weight_files(self) -> list[str]:
        index = self._get(INDEX, LARGEST_JSON)
        if index is None:
            return [_WEIGHTS]
        path = self._path(INDEX)
        return indexed_files(path, parse_json(path, index.data))

    def _header(self, name: str) -> dict[str, Stored]:
        answer = self._get(name, _FIRST_BYTES, part=True)
        if answer is None:
            raise ValueError(f"the repository {self._repository} has no {self._folder}{name}")
        wanted = 8 + int.from_bytes(answer.data[:8], "little")
        if len(answer.data) < wanted <= min(answer.size, 8 + LARGEST_HEADER):
            longer = self._get(name, wanted, part=True)
            assert longer is not None
            answer = longer
        return read_header(self._path(name), BytesIO(answer.data), answer.size)

    def _get(self, name: str, most: int, *, part: bool = False) -> _Answer | None:
        return _fetch(self._repository, f"{self._folder}{name}", most, part=part)


def exists(repository: str, name: str) -> bool:
    """Whether a repository on the hub has a file of that name."""
    return _fetch(repository, name, 1, part=True) is not None


def _fetch(repository: str, name: str, most: int, *, part: bool) -> _Answer | None:
    """Return the first bytes of a file, at most so many; None if there is no such file.

    part: whether more bytes than those are expected to be there; if not, they are an error.
    """
    try:
        return _get(repository, name, most, part=part)
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise ValueError(
            f"{repository} asks you to accept its licence: do so at "
            f"https://huggingface.co/{repository}, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {repository} and no such repository on the hub; check "
            "the spelling, or run: hf auth login (if it is private)"
        ) from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"there is no folder {repository}, and looking at it on the hub failed: "
            f"{reason}; try again, or give a folder on disk"
        ) from error


def _get(repository: str, name: str, most: int, *, part: bool) -> _Answer:
    headers = build_hf_headers()
    headers |= {"Range": f"bytes=0-{most - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(repository, name)
    session: Any = get_session()
    data = bytearray()
    with session.stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        for piece in response.iter_bytes(_FIRST_BYTES):
            data += piece
            if len(data) >= most:
                break
        total = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
        length = total[1] if total else response.headers.get("Content-Length", str(len(data)))
    size = int(length) if length.isdecimal() else len(data)
    if size > most and not part:
        raise ValueError(f"{repository}/{name} has {size} bytes, too many for what it should hold")
    return _Answer(bytes(data[:most]), size)


def is_repository(name: str) -> bool:
    """Whether it is the name of a repository, and no folder's."""
    return _REPOSITORY.fullmatch(name) is not None and not Path(name).expanduser().exists()


def cached(repository: str) -> Path | None:
    """Return where the hub's cache holds a repository's model, None if it does not hold it all."""
    config = try_to_load_from_cache(repository, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    index = folder / INDEX
    names = indexed_files(index, read_json(index)) if index.is_file() else [_WEIGHTS]
    return folder if all((folder / name).is_file() for name in names) else None
