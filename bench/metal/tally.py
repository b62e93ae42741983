"""How many kernels a GPU launches for a traced graph (tracing.py).

Every primitive counts what its eval_gpu encodes:

- 0: views. Reshapes, too, unless elements have to be moved for them (strides.py): then 1.
- 1: elementwise operations, matmuls, gathers, norms, RoPE, custom kernels, fused attention; and 1
  for every operand that the kernel cannot read as it lies ("copy").
- Concatenation: 1 per part. Padding: 2. A GEMM that splits its sums, the reduction of a long
  column, attention over many keys: 2. Sorting more than 2,048 entries: as many as its merges take.
- Updates (slices, scatters): 1, and 1 for a copy of the old array if somebody else uses it too.
  Caches are inputs used once: they are updated in place.

Host values that are uploaded are no launches; a scalar converted on the device is one.
Source: mlx/backend/gpu/primitives.cpp, slicing.cpp and mlx/backend/metal/*.cpp at 846d176.
"""

from collections import Counter
from collections.abc import Callable
from math import ceil, log2, prod
from typing import NamedTuple

from bench.metal import strides
from bench.metal.strides import Layout, fresh
from bench.metal.tracing import COMPILED, Graph, Node
from gemma_mtp_mlx import dispatch
from gemma_mtp_mlx.dispatch import Gpu, Heads, Weights

ELEMENTWISE = """
    Abs Add AsType BitwiseAnd BitwiseBinary BitwiseInvert BitwiseOr BitwiseXor Ceil Cos Divide Equal
    Erf Exp Expm1 Floor FloorDivide Greater GreaterEqual LeftShift Less LessEqual Log Log1p
    LogicalAnd LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Remainder
    RightShift Round Rsqrt Select Sigmoid Sign Sin Sqrt Square Subtract Tanh
"""
SINGLE = "Arange ArgReduce Full Gather GatherAxis GatherMM LogSumExp RandomBits Scan"


class Cost(NamedTuple):
    """What a primitive is worth: launches of its own, copies of operands, its results' layouts."""

    launches: int
    copies: int
    results: list[Layout]


class Call(NamedTuple):
    """One primitive with what its rule needs to know.

    shape: of its (first) result; owned: whether its first operand's buffer is nobody else's.
    """

    node: Node
    operands: list[Layout]
    shape: strides.Shape
    owned: bool
    chip: Gpu


Rule = Callable[[Call], Cost]


def launches(graph: Graph, chip: Gpu) -> "Counter[str]":
    """Count a GPU's launches by the name of what is launched."""
    found: Counter[str] = Counter()
    lies = {name: fresh(shape) for name, shape in graph.given.items()}
    uses = Counter([*graph.left, *(name for node in graph.nodes for name in node.operands)])
    views: set[str] = set()
    for node in graph.nodes:
        name, number = node.name, 1
        if name.startswith(COMPILED):
            name, number = COMPILED.strip(), int(name.removeprefix(COMPILED))
        named = node.arguments and str(node.arguments[0]).startswith("custom_kernel_")
        rule = RULES.get(name, custom if named else None)
        if rule is None:
            raise ValueError(f"no rule says how many launches {name} takes")
        operands = [lies[operand] for operand in node.operands]
        owned = bool(operands) and uses[node.operands[0]] == 1 and node.operands[0] not in views
        shape = next(iter(node.results.values()))
        cost = rule(Call(node, operands, shape, owned, chip))
        found[name] += cost.launches * number
        found["copy"] += cost.copies
        lies.update(zip(node.results, cost.results, strict=True))
        if not cost.launches and not cost.copies:
            views.update(node.results)
    return +found


def view(lay: Callable[[Call], Layout]) -> Rule:
    """Return the rule of an operation that only looks at its operand in another way."""
    return lambda call: Cost(0, 0, [lay(call)])


def _squeezed(call: Call) -> Layout:
    x, axes = call.operands[0], call.node.arguments[0]
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    return strides.transpose(x, kept)


def _expanded(call: Call) -> Layout:
    x = call.operands[0]
    steps = list(x.strides)
    for axis in call.node.arguments[0]:
        steps.insert(axis, 1)
    return Layout(call.shape, tuple(steps), x.extent)


def depends(call: Call) -> Cost:
    """The first operands themselves, once the others are there."""
    return Cost(0, 0, call.operands[: len(call.node.results)])


def split(call: Call) -> Cost:
    """Views of one array's parts."""
    shapes, x = call.node.results.values(), call.operands[0]
    return Cost(0, 0, [strides.cut(x, shape, (1,) * len(shape)) for shape in shapes])


def reshape(call: Call) -> Cost:
    """A view, or a copy where there is none of that shape."""
    there = strides.reshape(call.operands[0], call.shape)
    return Cost(0, there is None, [there or fresh(call.shape)])


def contiguous(call: Call) -> Cost:
    """A copy, unless there is nothing to do."""
    return Cost(0, not call.operands[0].row_contiguous, [fresh(call.shape)])


def elementwise(call: Call) -> Cost:
    """One launch, whatever lies where."""
    return Cost(1, 0, [strides.elementwise(call.operands, call.shape)])


def single(call: Call) -> Cost:
    """One launch, whatever lies where, into new arrays."""
    return Cost(1, 0, [fresh(shape) for shape in call.node.results.values()])


def concatenate(call: Call) -> Cost:
    """One launch per part. Source: metal/slicing.cpp 14-40."""
    return Cost(sum(x.size > 0 for x in call.operands), 0, [fresh(call.shape)])


def pad(call: Call) -> Cost:
    """Fill, then paste. Source: gpu/slicing.cpp 19-46."""
    return Cost(2, 0, [fresh(call.shape)])


def update(call: Call) -> Cost:
    """Slice updates and scatters. Source: metal/indexing.cpp 232-260, 522-545, 733-768."""
    old = call.operands[0]
    copied = not call.owned or old.extent < old.size
    return Cost(1, copied, [fresh(call.shape)])


def sort(call: Call) -> Cost:
    """One block, or blocks, merges in pairs (partition, merge) and a copy. metal/sort.cpp."""
    axis = call.node.arguments[-1]
    blocks = ceil(call.shape[axis] / 2048)
    return Cost(1 if blocks == 1 else 2 + 2 * ceil(log2(blocks)), 0, [fresh(call.shape)])


def reduce(call: Call) -> Cost:
    """Rows take one launch, long columns two. Source: metal/reduce.cpp 937-1040."""
    x, axes = call.operands[0], call.node.arguments[1]
    if x.size == prod(call.shape):
        return Cost(1, 0, [fresh(call.shape)])
    copied = not x.row_contiguous
    column = max(axes) < len(x.shape) - 1 and prod(x.shape[max(axes) + 1 :]) > 1
    length = x.size // prod(call.shape)
    long = length > 256 if column else prod(call.shape) == 1 and x.size > 4096
    return Cost(1 + long, copied, [fresh(call.shape)])


def softmax(call: Call) -> Cost:
    """Needs rows without gaps. Source: metal/softmax.cpp 26-47."""
    x = call.operands[0]
    lies = x.contiguous and x.strides[-1] == 1
    return Cost(1, not lies, [x if lies else fresh(call.shape)])


def rms_norm(call: Call) -> Cost:
    """Needs rows without gaps, close together. Source: metal/normalization.cpp 27-49."""
    x = call.operands[0]
    lies = x.contiguous and x.strides[-1] == 1
    if lies and len(x.shape) > 1:
        lies = x.strides[-2] in (0, x.shape[-1]) or x.shape[-2] == 1
    return Cost(1, not lies, [x if lies else fresh(call.shape)])


def rope(call: Call) -> Cost:
    """Reads rows, one batch anyhow, or heads and positions swapped. Source: metal/rope.cpp."""
    x = call.operands[0]
    b, heads, length, d = (1,) * (4 - len(x.shape)) + x.shape
    swapped = x.strides[-4:] == (length * heads * d, d, heads * d, 1)
    lies = x.row_contiguous or b == 1 or swapped
    return Cost(1, not lies, [fresh(call.shape)])


def partial_rope(call: Call) -> Cost:
    """Copies all, then turns a part of it. Source: metal/rope.cpp 41-48."""
    return Cost(1, 1, [fresh(call.shape)])


def attention(call: Call) -> Cost:
    """One or two launches, and copies of what lies badly. Source: dispatch.attention."""
    q, k, v, *masks = call.operands
    (b, h, _, d), (g, keys) = q.shape, k.shape[1:3]
    one = 1 if b == 1 else 0  # an axis that may be swapped with the positions
    swapped = (b == 1 or h == 1) and q.strides[3] == 1 and q.strides[one] == d
    copies = int(not (q.row_contiguous or (swapped and q.strides[2] == d * q.shape[one])))
    for x in (k, v):
        together = b == 1 or g == 1 or x.strides[0] == x.strides[1] * g
        copies += x.strides[-1] != 1 or not together
    for m in masks:
        copies += not (m.row_contiguous or b == 1 or h == 1 or m.strides[0] == m.strides[1] * h)
    two = dispatch.is_two_pass(call.chip, Heads(h, g, d), keys)
    return Cost(1 + two, copies, [fresh(call.shape)])


def quantized_matmul(call: Call) -> Cost:
    """As dispatch.quantized_matmul says. Source: metal/quantized.cpp 1782-1805."""
    x, w = call.operands[:2]
    group, bits = call.node.arguments[:2]
    copied = not strides.rows_lie_together(x)
    weights = Weights(w.shape[0], x.shape[-1], bits, group)
    rows = x.size // x.shape[-1] if copied or x.row_contiguous else x.shape[-2]
    number = dispatch.quantized_matmul(call.chip, weights, rows).launches
    return Cost(number, copied, [fresh(call.shape)])


def gather_qmm(call: Call) -> Cost:
    """One launch. Source: metal/quantized.cpp 1877-1960."""
    copies = sum(not strides.rows_lie_together(x) for x in call.operands[:-2])
    return Cost(1, copies, [fresh(call.shape)])


def matmul(call: Call) -> Cost:
    """A GEMV, or a GEMM that may split its sums. Source: metal/matmul.cpp 895-975, 1451-1590."""
    a, b = call.operands[:2]
    m, n, k = a.shape[-2], b.shape[-1], a.shape[-1]
    copies = (not _readable(a, vector=m == 1)) + (not _readable(b, vector=n == 1))
    batch = prod(call.shape[:-2])
    if a.row_contiguous and not any(b.strides[:-2]):
        m, batch = m * batch, 1
    wide = call.chip.generation >= 15 and b.strides[-2] == 1 and m <= 15
    splits = batch == 1 and min(m, n) > 1 and not wide and dispatch.splits_sums(call.chip, m, n, k)
    return Cost(1 + splits, copies, [fresh(call.shape)])


def _readable(x: Layout, *, vector: bool) -> bool:
    (rows, columns), (down, across) = x.shape[-2:], x.strides[-2:]
    if across == 1 and (not vector or down == columns):
        return True
    return down == 1 and (not vector or across == rows)


def custom(call: Call) -> Cost:
    """One launch, and copies unless the kernel follows strides. metal/custom_kernel.cpp."""
    ensures = call.node.arguments[9]
    copies = sum(not x.row_contiguous for x in call.operands) if ensures else 0
    return Cost(1, copies, [fresh(shape) for shape in call.node.results.values()])


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(SINGLE.split(), single),
    **dict.fromkeys(("ArgPartition", "ArgSort", "Partition", "Sort"), sort),
    **dict.fromkeys(("Flatten", "Reshape", "Unflatten"), reshape),
    **dict.fromkeys(("Scatter", "ScatterAxis", "SliceUpdate"), update),
    **dict.fromkeys(
        ("Broadcast", "BroadcastAxes"),
        view(lambda call: strides.broadcast(call.operands[0], call.shape)),
    ),
    **dict.fromkeys(("Copy", "StopGradient", "View"), view(lambda call: call.operands[0])),
    "Concatenate": concatenate,
    "Depends": depends,
    "ExpandDims": view(_expanded),
    "GatherQMM": gather_qmm,
    "Matmul": matmul,
    "NumberOfElements": view(lambda call: fresh(call.shape)),
    "Pad": pad,
    "QuantizedMatmul": quantized_matmul,
    "Reduce": reduce,
    "Slice": view(lambda call: strides.cut(call.operands[0], call.shape, call.node.arguments[2])),
    "Softmax": softmax,
    "Split": split,
    "Squeeze": view(_squeezed),
    "Transpose": view(lambda call: strides.transpose(call.operands[0], call.node.arguments[0])),
    "attention": attention,
    "compiled": elementwise,
    "contiguous": contiguous,
    "partial rope": partial_rope,
    "rms_norm": rms_norm,
    "rope": rope,
}
