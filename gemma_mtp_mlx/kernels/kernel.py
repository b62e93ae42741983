"""A Metal kernel: its text, put together from .metal files, and its launches.

The files hold complete functions, and `#include` each other as files do; `source` is the call into
them that MLX makes the kernel's body. Building a kernel needs no GPU, launching one does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

FOLDER = Path(__file__).parent
SIMDGROUP = 32  # threads
_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)

limited: dict[str, int] = {}  # kernels that a device has given fewer threads, and how many

Constant = int | bool | mx.Dtype


class Output(NamedTuple):
    """Shape and dtype of one of a kernel's results."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


class Refused(RuntimeError):
    """A device did not launch a kernel with so many threads; the kernel has fewer from now on."""


class Kernel:
    """A Metal kernel of threadgroups of `threads` x 1 x 1 threads, a multiple of SIMDGROUP.

    Its first launch of a kind is evaluated at once, so that what a device refuses has a name.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        source: str,
        files: Sequence[str],
        *,
        threads: int = 256,
        row_contiguous: bool = True,
    ) -> None:
        """files: of this folder, without `.metal`; row_contiguous: whether inputs that are not
        get copied, else the source must follow their strides."""
        self.name = name
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.source, self.header = source, metal_text(files)
        self.threads = threads
        self.row_contiguous = row_contiguous
        self._launched: set[tuple[object, ...]] = set()
        built: Any = mx.fast.metal_kernel(
            name=name,
            input_names=list(inputs),
            output_names=list(outputs),
            source=source,
            header=self.header,
            ensure_row_contiguous=row_contiguous,
        )
        self._kernel: Callable[..., list[mx.array]] = built

    def launch(
        self,
        inputs: Sequence[mx.array],
        groups: tuple[int, int, int],
        outputs: Sequence[Output],
        template: Mapping[str, Constant],
    ) -> list[mx.array]:
        """Launch groups[0] x groups[1] x groups[2] threadgroups.

        template: the text's compile-time constants, to which THREADS is added.
        Raises: RuntimeError where there is no GPU, or if the device cannot launch it; Refused if it
        can with fewer threads: count the groups again.
        """
        x, y, z = groups
        results = self._kernel(
            inputs=list(inputs),
            output_shapes=[output.shape for output in outputs],
            output_dtypes=[output.dtype for output in outputs],
            grid=(x * self.threads, y, z),
            threadgroup=(self.threads, 1, 1),
            template=[("THREADS", self.threads), *template.items()],
        )
        kind = (self.threads, *template.items(), *(x.dtype for x in inputs))
        if kind not in self._launched:
            self._try(results)
            self._launched.add(kind)
        return list(results)

    def _try(self, results: Sequence[mx.array]) -> None:
        """Evaluate a launch. Raises: Refused or RuntimeError, naming the kernel."""
        try:
            mx.eval(results)
        except RuntimeError as error:
            if "threads per threadgroup" not in str(error) or self.threads <= SIMDGROUP:
                raise RuntimeError(f"the kernel {self.name} cannot be launched: {error}") from error
            refused, self.threads = self.threads, self.threads // 2 // SIMDGROUP * SIMDGROUP
            limited[self.name] = self.threads
            raise Refused(
                f"the kernel {self.name} cannot have {refused} threads on this GPU, and has "
                f"{self.threads} from now on: {error}"
            ) from error


def metal_text(files: Sequence[str]) -> str:
    """Return the text of files and of what they include, each once."""
    seen: set[str] = set()

    def read(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        return _INCLUDE.sub(lambda found: read(found[1]), (FOLDER / name).read_text())

    return "".join(read(f"{name}.metal") for name in files)
