"""What becomes of a parameter: it is kept, cast, packed by MLX or put on the grid it came from.

Shapes and types of what is written follow from the plan alone, so a file's header is written before
a weight is read; values are changed a strip of rows at a time, which no row can tell.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from gemma_mtp_mlx import grid
from gemma_mtp_mlx.weights import check_values

DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}
DTYPES |= {"U8": mx.uint8, "I32": mx.int32, "I64": mx.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
STRIP_BYTES = 1 << 20  # of a source at a time: what is made of it stays in a core's cache


class Output(NamedTuple):
    """A tensor to write. dtype: as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].size


@dataclass(frozen=True, slots=True)
class Change:
    """How values are changed.

    dtype: of what is written, or of the scales on a grid. params: of mx.quantize, None if the
    parameter is not packed. on_grid: whether it is packed on the q4_0 grid.
    """

    dtype: mx.Dtype
    params: dict[str, Any] | None = None
    on_grid: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A parameter on its way. rows: of the stored tensor, in the parameter's order."""

    name: str
    stored: str
    rows: tuple[range, ...]
    row_bytes: int
    change: Change
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.row_bytes * sum(map(len, self.rows))

    @property
    def written_bytes(self) -> int:
        """Bytes to write."""
        return sum(output.nbytes for output in self.outputs)

    def strips(self) -> Iterator[range]:
        """Yield the rows in strips of bounded size."""
        step = max(1, STRIP_BYTES // max(1, self.row_bytes))
        for rows in self.rows:
            for start in range(0, len(rows), step):
                yield rows[start : start + step]


@dataclass(frozen=True, slots=True)
class Error:
    """How far packed weights are from the source's.

    largest: difference of any weight. squares: sum of the squares of the differences; norm: of the
    weights themselves. equal: weights on a grid that are, rounded to the source's type, as there.
    """

    count: int = 0
    largest: float = 0.0
    squares: float = 0.0
    norm: float = 0.0
    equal: int = 0

    def __add__(self, other: "Error") -> "Error":
        return Error(
            self.count + other.count,
            max(self.largest, other.largest),
            self.squares + other.squares,
            self.norm + other.norm,
            self.equal + other.equal,
        )

    @property
    def rms(self) -> float:
        """Root mean square of the differences."""
        return math.sqrt(self.squares / self.count)

    @property
    def relative(self) -> float:
        """The same, relative to the weights' own."""
        return math.sqrt(self.squares / self.norm) if self.norm else 0.0


class Strip(NamedTuple):
    """Rows as they are written, an array for each output. error: None if they are not packed."""

    arrays: list[mx.array]
    error: Error | None


def outputs(name: str, shape: tuple[int, ...], change: Change) -> tuple[Output, ...]:
    """Return the tensors to write for a parameter of that shape."""
    params = change.params
    if params is None:
        return (Output(name, NAMES[change.dtype], shape),)
    *lead, width = shape
    path = name.removesuffix(".weight")
    groups = (*lead, width // params["group_size"])
    codes = Output(name, "U32", (*lead, width * params["bits"] // 32))
    if params["mode"] != "affine":
        return (codes, Output(f"{path}.scales", "U8", groups))
    dtype = NAMES[change.dtype]
    return codes, Output(f"{path}.scales", dtype, groups), Output(f"{path}.biases", dtype, groups)


def convert_rows(stored: str, value: mx.array, change: Change) -> Strip:
    """Return rows [N, K] of a stored tensor as they are written.

    Raises: ValueError naming the tensor for values that cannot be meant.
    """
    check_values(stored, value)
    params = change.params
    if params is None:
        kept = value.astype(change.dtype)
        mx.eval(kept)
        if kept.dtype != value.dtype:
            check_values(f"{stored}, as {NAMES[change.dtype]},", kept)
        return Strip([kept], None)
    if change.on_grid:
        fitted = grid.fit(value, change.dtype)
        packed = [fitted.codes, fitted.scales, fitted.biases]
        return Strip(packed, replace(_error(value, packed, params), equal=fitted.equal))
    packed = list(mx.quantize(value.astype(change.dtype), **params))
    return Strip(packed, _error(value, packed, params))


def _error(value: mx.array, packed: list[mx.array], params: dict[str, Any]) -> Error:
    """Compare in float32, as kernels decode: mx.dequantize rounds to the type of the scales."""
    codes, scales, *biases = packed
    if biases:
        scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
    decoded = mx.dequantize(
        codes, scales, biases[0] if biases else None, dtype=mx.float32, **params
    )
    exact = value.astype(mx.float32)
    mx.eval(packed, decoded, exact)
    weights = np.asarray(exact)
    differences = np.asarray(decoded) - weights
    return Error(
        count=differences.size,
        largest=float(max(differences.max(), -differences.min())),
        squares=_squares(differences),
        norm=_squares(weights),
    )


def _squares(values: npt.NDArray[np.float32]) -> float:
    """Sum the squares of rows: what is recorded must not tell how rows came together."""
    return float(np.vecdot(values, values).sum(dtype=np.float64))
