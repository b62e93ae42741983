"""Linear layers over the few positions of a pass, one launch for layers that share their input.

A position's results have the same bits whatever other positions are computed with it.
"""

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.geglu import geglu
from gemma_mtp_mlx.kernels.kernel import SIMDGROUP, Kernel, Output
from gemma_mtp_mlx.kernels.weights import Packing, few, packing, weight_arrays

TILE = 8  # weight rows, or positions, of one matrix operation
MOST = 3  # layers in a launch of project
# Weight rows in a launch, and how many rows a lane (how many tiles a threadgroup) then takes: more
# share what is read of x, fewer spread a small matrix over a large GPU. Results are the same.
SHARES = ((8192, 4), (2048, 2), (0, 1))


class Kernels(NamedTuple):
    """One operation for few positions and for more; `matrices` share a lane's or a tile's rows."""

    rows: Kernel
    tiles: Kernel
    matrices: int


_LAYERS = [
    ["codes0", "scales0", "biases0"],
    ["codes1", "scales1", "biases1"],
    ["codes2", "scales2", "biases2"],
]

PROJECT = Kernels(
    Kernel(
        "project_rows",
        ["x", *_LAYERS[0], *_LAYERS[1], *_LAYERS[2]],
        ["y"],
        """
    project_rows<ROWS, COLUMNS, COUNT>(
        x,
        weights<FORMAT, BITS, GROUP, RUN>(codes0, scales0, biases0, codes0_shape[0], x_shape[1]),
        weights<FORMAT, BITS, GROUP, RUN>(codes1, scales1, biases1, codes1_shape[0], x_shape[1]),
        weights<FORMAT, BITS, GROUP, RUN>(codes2, scales2, biases2, codes2_shape[0], x_shape[1]),
        y,
        threadgroup_position_in_grid.x * (THREADS / 32) + simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """,
        ["verify_matmul"],
        threads=64,
    ),
    Kernel(
        "project_tiles",
        ["x", *_LAYERS[0], *_LAYERS[1], *_LAYERS[2]],
        ["y"],
        """
    threadgroup float chains[CHAINS * TILES * COLUMN_TILES * 64];
    project_tiles<THREADS / 32, TILES, COLUMN_TILES, COUNT>(
        x,
        x_shape[0],
        weights<FORMAT, BITS, GROUP, RUN>(codes0, scales0, biases0, codes0_shape[0], x_shape[1]),
        weights<FORMAT, BITS, GROUP, RUN>(codes1, scales1, biases1, codes1_shape[0], x_shape[1]),
        weights<FORMAT, BITS, GROUP, RUN>(codes2, scales2, biases2, codes2_shape[0], x_shape[1]),
        y,
        threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.x,
        chains,
        simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """,
        ["verify_matmul"],
    ),
    1,
)

GATED = Kernels(
    Kernel(
        "gated_rows",
        ["x", *_LAYERS[0], *_LAYERS[1]],
        ["y"],
        """
    gated_rows<ROWS, COLUMNS>(
        x,
        weights<FORMAT, BITS, GROUP, RUN>(codes0, scales0, biases0, codes0_shape[0], x_shape[1]),
        weights<FORMAT, BITS, GROUP, RUN>(codes1, scales1, biases1, codes1_shape[0], x_shape[1]),
        y,
        threadgroup_position_in_grid.x * (THREADS / 32) + simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """,
        ["verify_matmul"],
        threads=64,
    ),
    Kernel(
        "gated_tiles",
        ["x", *_LAYERS[0], *_LAYERS[1]],
        ["y"],
        """
    threadgroup float chains[CHAINS * 2 * TILES * COLUMN_TILES * 64];
    gated_tiles<THREADS / 32, TILES, COLUMN_TILES>(
        x,
        x_shape[0],
        weights<FORMAT, BITS, GROUP, RUN>(codes0, scales0, biases0, codes0_shape[0], x_shape[1]),
        weights<FORMAT, BITS, GROUP, RUN>(codes1, scales1, biases1, codes1_shape[0], x_shape[1]),
        y,
        threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.x,
        chains,
        simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """,
        ["verify_matmul"],
    ),
    2,
)

GATED_BY = Kernels(
    Kernel(
        "gated_by_rows",
        ["x", *_LAYERS[0], "values"],
        ["y"],
        """
    gated_by_rows<ROWS, COLUMNS>(
        x,
        weights<FORMAT, BITS, GROUP, RUN>(codes0, scales0, biases0, codes0_shape[0], x_shape[1]),
        values,
        y,
        threadgroup_position_in_grid.x * (THREADS / 32) + simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """,
        ["verify_matmul"],
        threads=64,
    ),
    Kernel(
        "gated_by_tiles",
        ["x", *_LAYERS[0], "values"],
        ["y"],
        """
    threadgroup float chains[CHAINS * TILES * COLUMN_TILES * 64];
    gated_by_tiles<THREADS / 32, TILES, COLUMN_TILES>(
        x,
        x_shape[0],
        weights<FORMAT, BITS, GROUP, RUN>(codes0, scales0, biases0, codes0_shape[0], x_shape[1]),
        values,
        y,
        threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.x,
        chains,
        simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """,
        ["verify_matmul"],
    ),
    1,
)


def project(x: mx.array, *layers: nn.Module) -> list[mx.array]:
    """Return each layer's x W^T: nn.Linear or nn.QuantizedLinear without a bias.

    x: [..., K] in the model's dtype, which need not be the weights' or the scales'.
    Returns: [..., N] each, in x.dtype; sums in float32.
    Raises: ValueError for weights that have no kernel.
    """
    return (project_metal if on_gpu() else project_reference)(x, *layers)


def project_reference(x: mx.array, *layers: nn.Module) -> list[mx.array]:
    """Define project. MLX's results are wider than x where weights are of another dtype."""
    return [layer(x).astype(x.dtype) for layer in layers]


def project_metal(x: mx.array, *layers: nn.Module) -> list[mx.array]:
    """Launch project, once for as many neighbours as have the same format."""
    results: list[mx.array] = []
    for stored, same in groupby(layers, packing):
        alike = list(same)
        for i in range(0, len(alike), MOST):
            results += _projected(x, stored, alike[i : i + MOST])
    return results


def _projected(x: mx.array, stored: Packing, layers: Sequence[nn.Module]) -> list[mx.array]:
    arrays = [array for layer in layers for array in weight_arrays(layer)]
    heights = tuple(len(codes) for codes in arrays[::3])
    unused = arrays[:3] * (MOST - len(layers))
    y = _launch(PROJECT, x, stored, heights, [*arrays, *unused])
    # Results lie one behind the other: each is a contiguous view.
    *lead, width = x.shape
    count = x.size // width
    ends = [count * end for end in accumulate(heights)]
    parts = mx.split(y, ends[:-1]) if len(ends) > 1 else [y]
    return [part.reshape(*lead, height) for part, height in zip(parts, heights, strict=True)]


def gated(x: mx.array, gate: nn.Module, up: nn.Module) -> mx.array:
    """Return gelu(gate(x)) * up(x), rounded as geglu rounds: the inner part of an MLP.

    x: [..., K] in the model's dtype; gate and up: alike in shape and format.
    Returns: [..., N] in x.dtype. Raises: ValueError for weights that have no kernel.
    """
    return (gated_metal if on_gpu() else gated_reference)(x, gate, up)


def gated_reference(x: mx.array, gate: nn.Module, up: nn.Module) -> mx.array:
    """Define gated."""
    return geglu(*project_reference(x, gate, up))


def gated_metal(x: mx.array, gate: nn.Module, up: nn.Module) -> mx.array:
    """Launch gated; where gate and up differ in format, up and then gated_by."""
    stored = packing(gate)
    if packing(up) != stored:
        return gated_by_metal(x, gate, project_metal(x, up)[0])
    arrays = [*weight_arrays(gate), *weight_arrays(up)]
    height = len(arrays[0])
    assert len(arrays[3]) == height
    y = _launch(GATED, x, stored, (height, height), arrays)
    return y.reshape(*x.shape[:-1], height)


def gated_by(x: mx.array, gate: nn.Module, values: mx.array) -> mx.array:
    """Return gelu(gate(x)) * values, rounded as geglu rounds: a per-layer input's gate.

    x: [..., K], values: [..., N], both in the model's dtype.
    Returns: [..., N] in x.dtype. Raises: ValueError for weights that have no kernel.
    """
    return (gated_by_metal if on_gpu() else gated_by_reference)(x, gate, values)


def gated_by_reference(x: mx.array, gate: nn.Module, values: mx.array) -> mx.array:
    """Define gated_by."""
    return geglu(*project_reference(x, gate), values)


def gated_by_metal(x: mx.array, gate: nn.Module, values: mx.array) -> mx.array:
    """Launch gated_by."""
    stored, arrays = packing(gate), weight_arrays(gate)
    height = len(arrays[0])
    assert values.dtype == x.dtype and values.size * x.shape[-1] == height * x.size
    return _launch(GATED_BY, x, stored, (height,), [*arrays, values]).reshape(values.shape)


def _launch(
    kernels: Kernels,
    x: mx.array,
    stored: Packing,
    heights: tuple[int, ...],
    operands: Sequence[mx.array],
) -> mx.array:
    """Launch one of the two over all positions and all weight rows. Returns y, flat."""
    width = x.shape[-1]
    x = x.reshape(-1, width)
    count = len(x)
    assert count and operands[0].shape[1] * operands[0].itemsize * 8 == width * stored.bits
    share = next(share for least, share in SHARES if sum(heights) >= least)
    template = {**stored.template(width), "COUNT": len(heights)}
    heights = heights[:: kernels.matrices]
    output = Output((count * sum(heights),), x.dtype)
    if count <= few(stored):
        # A lane also holds its rows' codes: fewer rows where weights are wide.
        rows = max(1, min(share, 16 // stored.bits) // kernels.matrices)
        template |= {"ROWS": rows, "COLUMNS": count}
        simdgroups = _tiles(heights, 4 * rows)
        kernel = kernels.rows
        groups = (-(-simdgroups * SIMDGROUP // kernel.threads), 1, 1)
    else:
        tiles, columns = max(1, share // kernels.matrices), 1 if count <= TILE else 2
        template |= {"TILES": tiles, "COLUMN_TILES": columns}
        kernel = kernels.tiles
        groups = (-(-count // (TILE * columns)), _tiles(heights, TILE * tiles), 1)
    return kernel.launch([x, *operands], groups, [output], template)[0]


def _tiles(heights: Sequence[int], tall: int) -> int:
    return sum(-(-height // tall) for height in heights)
