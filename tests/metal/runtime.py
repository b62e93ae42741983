"""The compiled runtime, and the structures it is called with."""

import ctypes
import functools
from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_double,
    c_int32,
    c_uint32,
    c_uint64,
    c_void_p,
)

from tests.metal.toolchain import compile_runtime

SCHEDULES = ("natural", "reversed", "random", "lockstep")


class Error(Structure):
    """Error of runtime/launch.h."""

    _fields_ = (
        ("kind", c_int32),
        ("line", c_uint32),
        ("other_line", c_uint32),
        ("pc", c_uint64),
        ("other_pc", c_uint64),
        ("message", c_char * 1024),
    )


class Buffer(Structure):
    """Buffer of runtime/launch.h."""

    _fields_ = (
        ("data", c_void_p),
        ("bytes", c_uint64),
        ("element", c_uint32),
        ("output", c_uint32),
        ("offset", c_uint32),
        ("name", c_char_p),
        ("read_total", c_uint64),
        ("read_distinct", c_uint64),
        ("written_total", c_uint64),
        ("written_distinct", c_uint64),
        ("first_unwritten", c_uint64),
    )


class Launch(Structure):
    """Launch of runtime/launch.h."""

    _fields_ = (
        ("entry", c_void_p),
        ("buffers", POINTER(Buffer)),
        ("buffer_count", c_uint32),
        ("groups", c_uint32 * 3),
        ("threads", c_uint32),
        ("schedule", c_uint32),
        ("seed", c_uint64),
        ("checked", c_uint32),
        ("threadgroup_limit", c_uint32),
        ("timeout", c_double),
        ("threadgroup_bytes", c_uint64),
        ("error", Error),
    )


@functools.cache
def load_runtime() -> ctypes.CDLL:
    """Load the runtime, where the kernels find it, and the mathematical functions they call."""
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(compile_runtime()), mode=ctypes.RTLD_GLOBAL)
    library.metal_run.argtypes = [POINTER(Launch), c_void_p, c_void_p]
    library.metal_run.restype = ctypes.c_int
    return library
