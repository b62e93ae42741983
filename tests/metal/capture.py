"""The text of a kernel, as MLX makes it from a call."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

_OPENING, _CLOSING = "```\n", "\n```"


def kernel_text(
    kernel: Callable[..., Any], inputs: Sequence[mx.array], call: Mapping[str, Any]
) -> str:
    """Return the text that MLX would hand to Metal's compiler for a call, but for MLX's own
    preamble: that is what the shim stands for.

    kernel: of mx.fast.metal_kernel; call: the other arguments of the call. A kernel cannot be
    evaluated without a GPU, but an export only traces it, and MLX prints the text meanwhile.
    """

    def trace(*arrays: mx.array) -> list[mx.array]:
        return list(kernel(inputs=list(arrays), verbose=True, **call))

    examples = [mx.zeros(x.shape, x.dtype) for x in inputs]  # never evaluated
    with tempfile.TemporaryFile() as printed:
        with _stdout_in(printed.fileno()), tempfile.TemporaryDirectory() as folder:
            mx.export_function(str(Path(folder) / "kernel.mlxfn"), trace, *examples)
        printed.seek(0)
        text = printed.read().decode()
    start, end = text.index(_OPENING) + len(_OPENING), text.rindex(_CLOSING)
    return text[start:end]


@contextmanager
def _stdout_in(file: int) -> Iterator[None]:
    """Send what C++ prints to a file: MLX does not write to sys.stdout."""
    sys.stdout.flush()
    before = os.dup(1)
    os.dup2(file, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)
