"""Graphs as a GPU would get them, traced on a machine without one. Nothing is evaluated.

`mx.export_function` reports a function's graph as it is built: MLX's own primitives with shapes and
arguments. Weights and caches are inputs without values (`empty`), so real sizes take no memory.
Where building a graph depends on the device, `like_a_gpu` puts a stand-in, a custom kernel with a
name in brackets, which exporting accepts anywhere:

- `mx.fast.rms_norm`, `rope` and `scaled_dot_product_attention`, `mx.dequantize` and `mx.contiguous`
  unfold on a CPU or cannot be exported. Attention that a GPU does not fuse either (dispatch.py)
  unfolds in both places, and does so here.
- Functions fused by `mx.compile` are traced through. A stand-in says how many launches the call is
  worth, which is known when the same call is made again without being traced.
- A launch of one of our kernels becomes a stand-in of its own name.
- `mx.default_device()` says GPU, for code that asks. What asks when it is imported has to be
  imported inside. `mx.eval` does nothing.

The exporter merges equal operations on equal operands, which evaluation would repeat.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache as cached
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx

from bench.metal.strides import Shape
from gemma_mtp_mlx.dispatch import Heads, is_fused
from gemma_mtp_mlx.kernels.kernel import Constant, Kernel, Output

OWNERS = ("mlx.", "mlx_lm.", "gemma_mtp_mlx.")  # whose compiled functions are looked for
COMPILED = "compiled "
FREE = {"Broadcast", "ExpandDims", "Reshape", "Squeeze", "Transpose"}  # beside fused kernels

Fused = Callable[..., mx.array]
CompiledCall = tuple[Fused, list[Any]]  # and its arguments, of arrays what they are like


class Node(NamedTuple):
    """One primitive: its name, arguments, operands by name, results by name and shape.

    name: of a stand-in, what it stands for.
    """

    name: str
    arguments: list[Any]
    operands: tuple[str, ...]
    results: dict[str, Shape]


class Graph(NamedTuple):
    """A traced function: the shapes it is given (constants among them), nodes, and what leaves."""

    given: dict[str, Shape]
    nodes: list[Node]
    left: list[str]


def empty(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Return an array to trace with: it has a shape and a dtype and takes no memory."""
    return mx.broadcast_to(mx.array(0, dtype), tuple(shape))


def trace(function: Callable[..., Sequence[mx.array]], *given: mx.array) -> Graph:
    """Trace a function of arrays that returns a list of arrays."""
    parts: list[dict[str, Any]] = []
    with like_a_gpu() as compiled:
        mx.export_function(parts.append, function, *given)
    worth = [_fused_kernels(*call) for call in compiled]
    graph = Graph({}, [], [])
    for part in parts:
        if part["type"] == "inputs":
            graph.given.update({name: shape for name, shape, _ in part["inputs"]})
        elif part["type"] == "constants":
            graph.given.update({name: value.shape for name, value in part["constants"]})
        elif part["type"] == "outputs":
            graph.left.extend(name for name, _, _ in part["outputs"])
        elif part["type"] == "primitive":
            graph.nodes.append(_node(part, worth))
    return graph


def _node(part: dict[str, Any], worth: list[int]) -> Node:
    name = part["name"]
    if name == "CustomKernel":
        name = part["arguments"][0].split("[")[1].split("]")[0]
    if name.startswith(COMPILED):
        name = f"{COMPILED}{worth[int(name.removeprefix(COMPILED))]}"
    operands = tuple(name for name, _, _ in part["inputs"])
    return Node(name, part["arguments"], operands, {n: shape for n, shape, _ in part["outputs"]})


@contextmanager
def like_a_gpu() -> Iterator[list[CompiledCall]]:
    """Build graphs as on a GPU. Yields the calls of compiled functions that were stood in for."""
    calls: list[CompiledCall] = []
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (mx, "default_device", lambda: mx.Device(mx.gpu)),
            (mx, "eval", lambda *arrays: None),
            (mx, "contiguous", lambda x, allow_col_major=False: _stand_in("contiguous", x)),
            (mx, "dequantize", _dequantize),
            (mx.fast, "rms_norm", _rms_norm),
            (mx.fast, "rope", _rope),
            (mx.fast, "scaled_dot_product_attention", _attention),
            (Kernel, "launch", _launch),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        for module in [m for name, m in sys.modules.items() if name.startswith(OWNERS)]:
            for name, value in list(vars(module).items()):
                if type(value).__name__ == "_gc_func":  # what mx.compile returns
                    stack.enter_context(patch.object(module, name, _compiled(value, calls)))
        yield calls


@cached
def _kernel(name: str, inputs: int, outputs: int, row_contiguous: bool) -> Any:
    return mx.fast.metal_kernel(
        name=f"[{name}]",
        input_names=[f"in{i}" for i in range(inputs)],
        output_names=[f"out{i}" for i in range(outputs)],
        source="",
        ensure_row_contiguous=row_contiguous,
    )


def _stand_ins(
    name: str, inputs: Sequence[mx.array], outputs: Sequence[Output], *, row_contiguous: bool
) -> list[mx.array]:
    kernel = _kernel(name, len(inputs), len(outputs), row_contiguous)
    results = kernel(
        inputs=list(inputs),
        output_shapes=[output.shape for output in outputs],
        output_dtypes=[output.dtype for output in outputs],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
    )
    return list(results)


def _stand_in(name: str, x: mx.array, *others: mx.array) -> mx.array:
    """Stand in for an operation whose result is like x."""
    like = [Output(x.shape, x.dtype)]
    return _stand_ins(name, [x, *others], like, row_contiguous=False)[0]


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    return _stand_in("rms_norm", x, *([] if weight is None else [weight]))


def _rope(
    x: mx.array, dims: int, *, offset: int | mx.array, freqs: mx.array | None = None, **_: Any
) -> mx.array:
    others = [] if freqs is None else [freqs]
    name = "rope" if dims == x.shape[-1] else "partial rope"
    return _stand_in(name, x, mx.array(offset), *others)


_unfold_attention = mx.fast.scaled_dot_product_attention


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, mask: mx.array | str | None = None, **rest: Any
) -> mx.array:
    array = None if isinstance(mask, str) else mask
    heads, (length, keys) = Heads(q.shape[1], k.shape[1], q.shape[3]), (q.shape[2], k.shape[2])
    if not is_fused(heads, length, keys, mask=array is not None):
        return _unfold_attention(q, k, v, mask=mask, **rest)
    whole = [] if array is None else [mx.broadcast_to(array, (*q.shape[:3], keys))]
    return _stand_in("attention", q, k, v, *whole)


def _dequantize(
    w: mx.array, scales: mx.array, biases: mx.array | None = None, *, bits: int = 4, **_: Any
) -> mx.array:
    others = [] if biases is None else [biases]
    shape = (*w.shape[:-1], w.shape[-1] * 32 // bits)
    result = [Output(shape, scales.dtype)]
    return _stand_ins("dequantize", [w, scales, *others], result, row_contiguous=True)[0]


def _launch(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    groups: tuple[int, int, int],
    outputs: Sequence[Output],
    template: dict[str, Constant],
) -> list[mx.array]:
    return _stand_ins(kernel.name, inputs, outputs, row_contiguous=kernel.row_contiguous)


def _compiled(function: Fused, calls: list[CompiledCall]) -> Fused:
    def stand_in(*args: Any) -> mx.array:
        result = function(*args)  # traced through, and used for nothing but its shape
        like = [Output(result.shape, result.dtype)]
        name = f"{COMPILED}{len(calls)}"
        calls.append((function, [Output(a.shape, a.dtype) if _is_array(a) else a for a in args]))
        return _stand_ins(name, [a for a in args if _is_array(a)], like, row_contiguous=False)[0]

    return stand_in


def _is_array(value: Any) -> bool:
    return isinstance(value, mx.array)


def _fused_kernels(function: Fused, args: list[Any]) -> int:
    """Count what the graph of a compiled call launches."""
    result = function(*(empty(*a) if isinstance(a, Output) else a for a in args))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), result)
        lines = file.read_text().splitlines()
    names = [line.split('label ="')[1].split('"')[0] for line in lines if 'label ="' in line]
    return sum(name not in FREE for name in names)
