"""MLX's arrays as memory that a kernel reads and writes."""

import ctypes
import functools
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

ALIGNMENT = 16  # of the largest vectors, in bytes
_STRIDED = 0x18  # PyBUF_STRIDES

# numpy has no bfloat16.
_NUMPY = {
    mx.bool_: np.dtype(np.bool_),
    mx.int8: np.dtype(np.int8),
    mx.uint8: np.dtype(np.uint8),
    mx.int16: np.dtype(np.int16),
    mx.uint16: np.dtype(np.uint16),
    mx.int32: np.dtype(np.int32),
    mx.uint32: np.dtype(np.uint32),
    mx.int64: np.dtype(np.int64),
    mx.uint64: np.dtype(np.uint64),
    mx.float16: np.dtype(np.float16),
    mx.bfloat16: np.dtype(np.uint16),
    mx.float32: np.dtype(np.float32),
}


class Memory(NamedTuple):
    """Memory of a buffer."""

    owner: Any  # keeps it alive
    address: int
    bytes: int
    element: int  # bytes
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()  # of elements
    offset: int = 0  # bytes from where a GPU's vectors may be


class _PyBuffer(ctypes.Structure):
    """Py_buffer of Python's C interface: numpy cannot look at a bfloat16 array."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def inputs_in_memory(arrays: list[mx.array], *, row_contiguous: bool) -> list[Memory]:
    """Evaluate inputs, and copy those that are not contiguous if they have to be."""
    mx.eval(arrays)
    memories = [_in_memory(x) for x in arrays]
    if not row_contiguous:
        return memories
    return [
        memory if _is_contiguous(memory) else _copy(x)
        for x, memory in zip(arrays, memories, strict=True)
    ]


def _copy(array: mx.array) -> Memory:
    array = mx.contiguous(array)
    mx.eval(array)
    return _in_memory(array)


def _in_memory(array: mx.array) -> Memory:
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(
        ctypes.py_object(array), ctypes.byref(view), ctypes.c_int(_STRIDED)
    )
    size = view.itemsize
    strides = tuple(stride // size for stride in view.strides[: view.ndim])
    address = view.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    if min(strides, default=0) < 0:
        raise NotImplementedError("a kernel's input of negative strides")
    extent = 1 + sum((n - 1) * stride for n, stride in zip(array.shape, strides, strict=True))
    offset = (address - _start()) % ALIGNMENT  # a slice may start anywhere
    return Memory(
        array, address, extent * size if array.size else 0, size, array.shape, strides, offset
    )


@functools.cache
def _start() -> int:
    """Return where MLX's arrays start: bytes from a multiple of ALIGNMENT. On a GPU that is 0."""
    array = mx.zeros(1024)
    mx.eval(array)
    return np.array(array, copy=False).ctypes.data % ALIGNMENT


def _is_contiguous(memory: Memory) -> bool:
    expected = 1
    for n, stride in zip(reversed(memory.shape), reversed(memory.strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def new_output(shape: tuple[int, ...], dtype: mx.Dtype, *, fill: bool) -> Memory:
    """Return undefined memory; fill: with NaN."""
    array = np.empty(shape, _NUMPY[dtype])
    if fill:
        array.reshape(-1).view(np.uint8).fill(0xFF)
    return Memory(array, array.ctypes.data, array.nbytes, array.itemsize, shape)


def to_mlx(memory: Memory, dtype: mx.Dtype) -> mx.array:
    """Return a copy of an output as an array of MLX."""
    array = mx.array(memory.owner)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def constants(values: tuple[int, ...], dtype: type[np.generic]) -> Memory:
    """Return a small array: a shape, strides."""
    array = np.array(values, dtype)
    return Memory(array, array.ctypes.data, array.nbytes, array.itemsize)
