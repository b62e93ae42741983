"""A safetensors file, written as its tensors come: the header first, nothing held back.

Source: github.com/huggingface/safetensors, "Format".
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.convert.packing import Output


class ShardFile:
    """Takes the values of its tensors in their order, in pieces of any size."""

    def __init__(self, path: Path, tensors: Sequence[Output]) -> None:
        header = {"__metadata__": {"format": "mlx"}} | _entries(tensors)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.nbytes = 8 + len(text) + sum(tensor.nbytes for tensor in tensors)
        self._digest = hashlib.sha256()
        self._written = 0
        self._file = path.open("wb", buffering=0)
        self._write(len(text).to_bytes(8, "little") + text)

    def write(self, array: mx.array) -> None:
        """Append values. array: evaluated."""
        plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        self._write(np.ascontiguousarray(plain).reshape(-1).view(np.uint8).data)

    def finish(self) -> str:
        """Bring the file to the disk and return its SHA-256."""
        assert self._written == self.nbytes
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        view = memoryview(data)
        while view:  # a write to a file without a buffer may be short
            view = view[self._file.write(view) :]
        self._written += len(data)

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _entries(tensors: Sequence[Output]) -> dict[str, dict[str, object]]:
    entries: dict[str, dict[str, object]] = {}
    end = 0
    for name, dtype, shape in tensors:
        first, end = end, end + Output(name, dtype, shape).nbytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, end]}
    return entries
