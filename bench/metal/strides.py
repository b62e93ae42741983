"""Where a GPU array's elements lie: what decides which operations are views and which copy.

MLX shares buffers between arrays; an operation that cannot read its operand as it lies copies it
first, which is one more launch. The rules are those of mlx/backend/common (common.cpp, slicing.cpp,
utils.h) at 846d176.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """A shape, the step of each axis in elements, and how many elements the buffer part has."""

    shape: Shape
    strides: Shape
    extent: int

    @property
    def size(self) -> int:
        """Elements of the array; more than `extent` where it is broadcast."""
        return prod(self.shape)

    @property
    def row_contiguous(self) -> bool:
        """Whether elements lie in the order of the axes, without gaps or repeats."""
        rows = zip(self.shape, self.strides, row_strides(self.shape), strict=True)
        return self.extent == self.size and all(n == 1 or s == own for n, s, own in rows)

    @property
    def contiguous(self) -> bool:
        """Whether there are no gaps: transposed or broadcast counts as none."""
        kept = (n for n, s in zip(self.shape, self.strides, strict=True) if s > 0)
        return prod(kept) == self.extent


def row_strides(shape: Sequence[int]) -> Shape:
    """Return the steps of a row-contiguous array."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def fresh(shape: Sequence[int]) -> Layout:
    """Return the layout of a new array."""
    return Layout(tuple(shape), row_strides(shape), prod(shape))


def broadcast(x: Layout, shape: Sequence[int]) -> Layout:
    """Repeat an array without copying it."""
    missing = len(shape) - len(x.shape)
    own = zip(x.shape, x.strides, shape[missing:], strict=True)
    steps = [0 if n == 1 and wide != 1 else s for n, s, wide in own]
    return Layout(tuple(shape), (0,) * missing + tuple(steps), x.extent)


def transpose(x: Layout, axes: Sequence[int]) -> Layout:
    """Reorder axes."""
    return Layout(
        tuple(x.shape[axis] for axis in axes), tuple(x.strides[axis] for axis in axes), x.extent
    )


def cut(x: Layout, shape: Sequence[int], steps: Sequence[int]) -> Layout:
    """Take every steps-th element of each axis, `shape` of them."""
    strides = tuple(s * step for s, step in zip(x.strides, steps, strict=True))
    reach = sum(abs(s) * (n - 1) for n, s in zip(shape, strides, strict=True))
    return Layout(tuple(shape), strides, reach + 1)


def reshape(x: Layout, shape: Sequence[int]) -> Layout | None:
    """Give an array another shape; None if it has to be copied for that."""
    if x.row_contiguous:
        return fresh(shape)
    if not x.shape:
        return Layout(tuple(shape), (0,) * len(shape), x.extent)
    sizes, steps = (list(part) for part in _collapsed(x))
    strides: list[int] = []
    at = 0
    for n in shape:
        if at < len(sizes) and sizes[at] % n == 0:
            sizes[at] //= n
            strides.append(sizes[at] * steps[at])
            at += sizes[at] == 1
        elif n == 1:
            strides.append(strides[-1])
        else:
            return None
    return Layout(tuple(shape), tuple(strides), x.extent)


def _collapsed(x: Layout) -> tuple[list[int], list[int]]:
    """Join neighbouring axes that lie one behind the other."""
    sizes, steps = [x.shape[0]], [x.strides[0]]
    for n, step in zip(x.shape[1:], x.strides[1:], strict=True):
        if n == 1:
            continue
        if step * n == steps[-1]:
            sizes[-1] *= n
            steps[-1] = step
        else:
            sizes.append(n)
            steps.append(step)
    return sizes, steps


def elementwise(operands: Sequence[Layout], shape: Sequence[int]) -> Layout:
    """Return the layout of an elementwise result: that of a single operand, else rows."""
    whole = [x for x in operands if x.extent > 1]
    if not whole:
        return broadcast(Layout((), (), 1), shape)
    return whole[0] if len(whole) == 1 and whole[0].contiguous else fresh(shape)


def rows_lie_together(x: Layout) -> bool:
    """Whether the last two axes are a matrix without gaps. Source: metal/quantized.cpp 66-85."""
    if len(x.shape) < 2:
        return x.strides[0] == 1
    return x.strides[-2] == x.shape[-1] and x.strides[-1] == 1
