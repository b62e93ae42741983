"""Executes the launches of kernels on this CPU."""

import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx import device
from gemma_mtp_mlx.kernels.kernel import SIMDGROUP, Constant, Kernel, Output
from tests.metal.compiled import Compiled, Compiler
from tests.metal.errors import KINDS, MetalError
from tests.metal.memory import Memory, constants, inputs_in_memory, new_output, to_mlx
from tests.metal.places import describe
from tests.metal.runtime import SCHEDULES, Buffer, Launch, load_runtime

MAX_THREADS = 256  # of a threadgroup: what every GPU's pipelines have
THREADGROUP_BYTES = 32 << 10

_compiler = Compiler()
_launch = Kernel.launch


class Traffic(NamedTuple):
    """Bytes of one buffer that a launch touches; total: once for each access."""

    read: int
    read_total: int
    written: int
    written_total: int


@dataclass(frozen=True)
class Record:
    """What one launch did."""

    kernel: str
    template: Mapping[str, Constant]
    groups: tuple[int, int, int]
    threads: int  # per threadgroup
    threadgroup_bytes: int
    traffic: Mapping[str, Traffic]  # by buffer; empty in fast mode

    @property
    def read(self) -> int:
        """Distinct bytes, of all buffers."""
        return sum(traffic.read for traffic in self.traffic.values())

    @property
    def written(self) -> int:
        """Distinct bytes, of all buffers."""
        return sum(traffic.written for traffic in self.traffic.values())


@dataclass
class Executor:
    """Executes launches, one after another.

    mode: "checked", or "fast" to compute only; schedule: of SCHEDULES, the order in which threads
    run between barriers, and threadgroups; seed: of "random"; timeout: of one launch, in seconds.
    """

    mode: str = "checked"
    schedule: str = "natural"
    seed: int = 1
    timeout: float = 60.0
    launches: list[Record] = field(default_factory=list)

    def launch(
        self,
        kernel: Kernel,
        inputs: Sequence[mx.array],
        groups: tuple[int, int, int],
        outputs: Sequence[Output],
        template: Mapping[str, Constant],
    ) -> list[mx.array]:
        """Do what kernel.launch does, here and now.

        Raises: MetalError.
        """
        # The seam's own launch, of a kernel under which MLX's is replaced.
        stand_in = copy.copy(kernel)
        stand_in._kernel = functools.partial(self._call, kernel)
        try:
            return _launch(stand_in, inputs, groups, outputs, template)
        finally:
            kernel.threads = stand_in.threads  # fewer after a refusal

    def _call(self, kernel: Kernel, *, inputs: list[mx.array], **call: Any) -> list[mx.array]:
        """Stand in for a kernel of mx.fast.metal_kernel."""
        checked = self.mode == "checked"
        _check_threads(kernel.name, *call["threadgroup"])
        compiled = _compiler(kernel.name, kernel._kernel, inputs, call, checked=checked)
        dtypes = call["output_dtypes"]
        results = [
            new_output(tuple(shape), dtype, fill=checked)
            for shape, dtype in zip(call["output_shapes"], dtypes, strict=True)
        ]
        arrays = inputs_in_memory(inputs, row_contiguous=kernel.row_contiguous)
        named = dict(zip(kernel.inputs, arrays, strict=True))
        outputs = dict(zip(kernel.outputs, results, strict=True))
        memories = {
            parameter.name: named.get(parameter.name)
            or outputs.get(parameter.name)
            or _fact(parameter.name, named)
            for parameter in compiled.signature.buffers
        }
        self._run(compiled, memories, outputs, call)
        return [to_mlx(result, dtype) for result, dtype in zip(results, dtypes, strict=True)]

    def _run(
        self,
        compiled: Compiled,
        memories: Mapping[str, Memory],
        outputs: Mapping[str, Memory],
        call: Mapping[str, Any],
    ) -> None:
        """Run a launch, check and record it."""
        checked = self.mode == "checked"
        buffers = (Buffer * len(memories))(
            *(_buffer(name, memory, name in outputs) for name, memory in memories.items())
        )
        threads, (width, height, depth) = call["threadgroup"][0], call["grid"]
        groups = (width // threads, height, depth)
        launch = Launch(
            entry=compiled.entry,
            buffers=buffers,
            buffer_count=len(buffers),
            groups=groups,
            threads=threads,
            schedule=SCHEDULES.index(self.schedule),
            seed=self.seed,
            checked=checked,
            threadgroup_limit=THREADGROUP_BYTES,
            timeout=self.timeout,
        )
        if load_runtime().metal_run(launch, compiled.base, compiled.end):
            raise _error(compiled, launch)
        if checked:
            _check_written(compiled.name, buffers)
        traffic = {buffer.name.decode(): _traffic(buffer) for buffer in buffers if checked}
        self.launches.append(
            Record(
                compiled.name,
                dict(call["template"]),
                groups,
                threads,
                launch.threadgroup_bytes,
                traffic,
            )
        )


def _check_threads(kernel: str, threads: int, *others: int) -> None:
    if threads > MAX_THREADS or threads % SIMDGROUP or math.prod(others) != 1:
        raise MetalError(
            kernel,
            "threads",
            f"{(threads, *others)} in a threadgroup, not (n, 1, 1) with n at most {MAX_THREADS} "
            f"and a multiple of {SIMDGROUP}",
            [],
        )


def _fact(name: str, inputs: Mapping[str, Memory]) -> Memory:
    """Return an input's shape, strides or number of dimensions, which the text names."""
    of, _, fact = name.rpartition("_")
    array = inputs[of]
    if fact == "shape":
        return constants(array.shape, np.int32)
    if fact == "strides":
        return constants(array.strides, np.int64)
    return constants((len(array.shape),), np.int32)


def _buffer(name: str, memory: Memory, output: bool) -> Buffer:
    return Buffer(
        data=memory.address,
        bytes=memory.bytes,
        element=memory.element,
        output=output,
        offset=memory.offset,
        name=name.encode(),
    )


def _traffic(buffer: Buffer) -> Traffic:
    return Traffic(
        buffer.read_distinct, buffer.read_total, buffer.written_distinct, buffer.written_total
    )


def _error(compiled: Compiled, launch: Launch) -> MetalError:
    error = launch.error
    lines = [compiled.line(pc) for pc in (error.pc, error.other_pc) if pc]
    places = [describe(compiled.text, line) for line in (error.line, *lines) if line]
    return MetalError(compiled.name, KINDS[error.kind], error.message.decode(), places)


def _check_written(kernel: str, buffers: Sequence[Buffer]) -> None:
    for buffer in buffers:
        if buffer.output and buffer.written_distinct < buffer.bytes:
            count = (buffer.bytes - buffer.written_distinct) // buffer.element
            first = buffer.first_unwritten // buffer.element
            message = f"{count} elements of {buffer.name.decode()}, [{first}] is the first"
            raise MetalError(kernel, "unwritten output", message, [])


@contextmanager
def executing(**options: Any) -> Iterator[Executor]:
    """Execute every launch in this block here, and let gemma_mtp_mlx take this for a GPU.

    options: of Executor.
    """
    executor = Executor(**options)

    def launch(kernel: Kernel, *args: Any, **keywords: Any) -> list[mx.array]:
        return executor.launch(kernel, *args, **keywords)

    def on_gpu() -> bool:
        return True

    def fused(function: device.Elementwise) -> device.Elementwise:
        return function  # mx.compile is still that of a CPU

    real_on_gpu, real_fused = device.on_gpu, device.fused
    Kernel.launch = launch  # type: ignore[method-assign]
    _replace(real_on_gpu, on_gpu)
    _replace(real_fused, fused)
    try:
        yield executor
    finally:
        Kernel.launch = _launch  # type: ignore[method-assign]
        _replace(on_gpu, real_on_gpu)
        _replace(fused, real_fused)


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """In every module that has imported it, also those that did so in the meantime."""
    name = old.__name__
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "gemma_mtp_mlx" and vars(module).get(name) is old:
            setattr(module, name, new)
