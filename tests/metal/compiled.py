"""Kernels as code of this machine."""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.metal import rules
from tests.metal.capture import kernel_text
from tests.metal.errors import MetalError
from tests.metal.line_table import line_at, memory_size, read_rows
from tests.metal.places import describe
from tests.metal.runtime import load_runtime
from tests.metal.signature import Signature, parse_signature
from tests.metal.toolchain import CompileError, compile_kernel
from tests.metal.translate import program


@dataclass(frozen=True)
class Compiled:
    """A kernel for one template, and inputs and outputs of some dtypes."""

    name: str
    text: str
    signature: Signature
    path: Path
    library: ctypes.CDLL

    @functools.cached_property
    def entry(self) -> int:
        return ctypes.cast(self.library.metal_entry, ctypes.c_void_p).value or 0

    @functools.cached_property
    def base(self) -> int:
        # dlopen's handle is a struct link_map, which begins with the address of the library.
        return ctypes.c_uint64.from_address(self.library._handle).value

    @functools.cached_property
    def end(self) -> int:
        return self.base + memory_size(self.path)

    def line(self, return_address: int) -> int:
        """Return the line of a call in the text; the call is before where it returns to."""
        address = return_address - self.base - 1
        return line_at(read_rows(self.path), address, "kernel") or 0


class Compiler:
    """Compiles kernels, each once."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Compiled] = {}

    def __call__(
        self,
        name: str,
        kernel: Callable[..., Any],
        inputs: Sequence[mx.array],
        call: Mapping[str, Any],
        *,
        checked: bool,
    ) -> Compiled:
        """Return what a call of a kernel of mx.fast.metal_kernel executes.

        call: its arguments apart from inputs; checked: with the checks.
        Raises: MetalError for what a compiler sees.
        """
        # What the text depends on. MLX passes inputs of fewer than 8 elements as constants.
        key = (
            kernel,
            checked,
            tuple(call["template"]),
            tuple((x.dtype, x.ndim, x.size < 8) for x in inputs),
            tuple(call["output_dtypes"]),
        )
        if key not in self._compiled:
            text = kernel_text(kernel, inputs, call)
            self._compiled[key] = _compile(name, text, checked)
        return self._compiled[key]


def _compile(name: str, text: str, checked: bool) -> Compiled:
    load_runtime()
    signature = parse_signature(text)
    source = program(text, signature, unroll=not checked)
    refused = ""
    with ThreadPoolExecutor(1) as other:
        finding = other.submit(rules.check, text, signature) if checked else None
        try:
            path = compile_kernel(source, checked=checked)
        except CompileError as error:
            refused = str(error)
        found = finding.result() if finding else []
    if found and (not refused or found[0].kind == rules.NOT_METAL):
        line, kind, message = found[0]
        raise MetalError(name, kind, message, [describe(text, line)])
    if refused:
        raise MetalError(name, "compile", refused, [])
    return Compiled(name, text, signature, path, ctypes.CDLL(str(path)))
