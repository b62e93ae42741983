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
from huggingface_hub import hf_hub_url
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from gemma_mtp_mlx.checkpoint import (
    INDEX,
    LARGEST_HEADER,
    LARGEST_JSON,
    Stored,
    indexed_files,
    parse_json,
    read_header,
)
from gemma_mtp_mlx.hub_errors import explained

_WEIGHTS = "model.safetensors"
_FIRST_BYTES = 1 << 16  # asked for before it is known how long a header is
_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")
_TIMEOUT_S = 30.0


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

    def __init__(self, repository: str, revision: str = "main", folder: str = "") -> None:
        self._repository, self._revision, self._folder = repository, revision, folder
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
        return _fetch(self._repository, self._revision, f"{self._folder}{name}", most, part=part)


def exists(repository: str, revision: str, name: str) -> bool:
    """Whether a repository on the hub has a file of that name."""
    return _fetch(repository, revision, name, 1, part=True) is not None


def _fetch(repository: str, revision: str, name: str, most: int, *, part: bool) -> _Answer | None:
    """Return the first bytes of a file, at most so many; None if there is no such file.

    part: whether more bytes than those are expected to be there; if not, they are an error.
    """
    with explained(repository, revision, cached=False):
        try:
            return _get(repository, revision, name, most, part=part)
        except EntryNotFoundError:
            return None


def _get(repository: str, revision: str, name: str, most: int, *, part: bool) -> _Answer:
    headers = build_hf_headers()
    headers |= {"Range": f"bytes=0-{most - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(repository, name, revision=revision)
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
