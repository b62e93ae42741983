"""The language model head: tokens drawn from hidden states, or the logits they are drawn from.

Logits of a whole vocabulary are written for nobody who does not ask for them: a launch leaves each
threadgroup's best token per position, a second one finds the best of those. A position's token and
logits have the same bits whatever is computed with it, and token_head draws what draw_tokens draws
from head_logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.device import fused, on_gpu
from gemma_mtp_mlx.kernels.draw_tokens import best_of_choices, draw_tokens_reference
from gemma_mtp_mlx.kernels.kernel import SIMDGROUP, Kernel, Output
from gemma_mtp_mlx.kernels.weights import few, packing, weight_arrays
from gemma_mtp_mlx.sampling import Sampling

TILE = 8  # weight rows, or positions, of one matrix operation
GROUPS = 2048  # threadgroups at most that leave a choice; more tiles than that are gone through

_HEAD = ["x", "codes", "scales", "biases", "cap"]
_CHOOSE = [*_HEAD, "temperature", "seed", "positions"]

CHOOSE_ROWS = Kernel(
    "choose_rows",
    _CHOOSE,
    ["best", "ids"],
    """
    threadgroup float best_scores[THREADS / 32 * COLUMNS];
    threadgroup uint best_ids[THREADS / 32 * COLUMNS];
    choose_rows<THREADS / 32, ROWS, COLUMNS>(
        x, weights<FORMAT, BITS, GROUP, RUN>(codes, scales, biases, codes_shape[0], x_shape[1]),
        cap, draws(temperature, seed, positions, positions_shape[1], codes_shape[0]),
        best, ids, best_scores, best_ids, threadgroup_position_in_grid.x, threadgroups_per_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
    ["token_head"],
    threads=128,
)
CHOOSE_TILES = Kernel(
    "choose_tiles",
    _CHOOSE,
    ["best", "ids"],
    """
    threadgroup float chains[CHAINS * TILES * COLUMN_TILES * 64];
    choose_tiles<THREADS / 32, TILES, COLUMN_TILES>(
        x, x_shape[0],
        weights<FORMAT, BITS, GROUP, RUN>(codes, scales, biases, codes_shape[0], x_shape[1]),
        cap, draws(temperature, seed, positions, positions_shape[1], codes_shape[0]),
        best, ids, chains, threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
        threadgroups_per_grid.y, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
    ["token_head"],
)
LOGITS_ROWS = Kernel(
    "logits_rows",
    _HEAD,
    ["logits"],
    """
    logits_rows<ROWS, COLUMNS>(
        x, weights<FORMAT, BITS, GROUP, RUN>(codes, scales, biases, codes_shape[0], x_shape[1]),
        cap, logits,
        threadgroup_position_in_grid.x * (THREADS / 32) + simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """,
    ["token_head"],
    threads=64,
)
LOGITS_TILES = Kernel(
    "logits_tiles",
    _HEAD,
    ["logits"],
    """
    threadgroup float chains[CHAINS * TILES * COLUMN_TILES * 64];
    logits_tiles<THREADS / 32, TILES, COLUMN_TILES>(
        x, x_shape[0],
        weights<FORMAT, BITS, GROUP, RUN>(codes, scales, biases, codes_shape[0], x_shape[1]),
        cap, logits, threadgroup_position_in_grid.y, threadgroup_position_in_grid.x, chains,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
    ["token_head"],
)


class _Plan(NamedTuple):
    """How a head is taken to pieces. few: by the kernels of a few rows, else by those of tiles;
    pieces: of the vocabulary, what a simdgroup or a threadgroup does at a time; blocks: of rows."""

    few: bool
    pieces: int
    blocks: int
    constants: dict[str, int]


def head_logits(hidden: mx.array, head: nn.Module, cap: float | None) -> mx.array:
    """Return the logits [..., V] float32 of hidden states [..., E], rounded to their dtype, capped.

    head: the nn.Embedding or nn.QuantizedEmbedding it is tied to; cap: of the softcap, or None.
    Raises: ValueError for weights that have no kernel.
    """
    return (head_logits_metal if on_gpu() else head_logits_reference)(hidden, head, cap)


def head_logits_reference(hidden: mx.array, head: nn.Module, cap: float | None) -> mx.array:
    """Define head_logits."""
    logits = head.as_linear(hidden).astype(hidden.dtype).astype(mx.float32)
    return logits if cap is None else _softcap(logits, cap)


@fused
def _softcap(logits: mx.array, cap: float) -> mx.array:
    return mx.tanh(logits / cap) * cap


def head_logits_metal(hidden: mx.array, head: nn.Module, cap: float | None) -> mx.array:
    """Launch head_logits."""
    x = hidden.reshape(-1, hidden.shape[-1])
    size, plan = head.weight.shape[0], _plan(x, head)
    if plan.few:
        simdgroups = LOGITS_ROWS.threads // SIMDGROUP
        kernel, groups = LOGITS_ROWS, (-(-plan.pieces // simdgroups), 1, 1)
    else:
        kernel, groups = LOGITS_TILES, (plan.blocks, plan.pieces, 1)
    outputs = [Output((len(x), size), mx.float32)]
    (logits,) = kernel.launch(_inputs(x, head, cap), groups, outputs, plan.constants)
    return logits.reshape(*hidden.shape[:-1], size)


def token_head(
    hidden: mx.array, head: nn.Module, cap: float | None, sampling: Sampling, positions: mx.array
) -> mx.array:
    """Draw one token per position, from logits that are not written.

    hidden: [B, L, E]; head, cap: as head_logits; positions: [B, L] int32. Top-k, top-p and min-p of
    `sampling` are not looked at. Returns: [B, L] int32, the lowest id among equals.
    Raises: ValueError for weights that have no kernel.
    """
    choose = token_head_metal if on_gpu() else token_head_reference
    return choose(hidden, head, cap, sampling, positions)


def token_head_reference(
    hidden: mx.array, head: nn.Module, cap: float | None, sampling: Sampling, positions: mx.array
) -> mx.array:
    """Define token_head."""
    return draw_tokens_reference(head_logits_reference(hidden, head, cap), sampling, positions)


def token_head_metal(
    hidden: mx.array, head: nn.Module, cap: float | None, sampling: Sampling, positions: mx.array
) -> mx.array:
    """Launch token_head: two launches."""
    assert positions.shape == hidden.shape[:2], (positions.shape, hidden.shape)
    x = hidden.reshape(-1, hidden.shape[-1])
    plan = _plan(x, head)
    if plan.few:
        simdgroups = CHOOSE_ROWS.threads // SIMDGROUP
        count = min(-(-plan.pieces // simdgroups), GROUPS)
        kernel, groups = CHOOSE_ROWS, (count, 1, 1)
    else:
        count = min(plan.pieces, GROUPS)
        kernel, groups = CHOOSE_TILES, (plan.blocks, count, 1)
    scores, ids = kernel.launch(
        [*_inputs(x, head, cap), sampling.temperature, sampling.seed, positions.astype(mx.int32)],
        groups,
        [Output((len(x), count), mx.float32), Output((len(x), count), mx.uint32)],
        plan.constants,
    )
    return best_of_choices(scores, ids).reshape(positions.shape)


def _inputs(x: mx.array, head: nn.Module, cap: float | None) -> Sequence[mx.array]:
    return [x, *weight_arrays(head), mx.array(cap or 0.0, mx.float32)]


def _plan(x: mx.array, head: nn.Module) -> _Plan:
    """How verify_matmul would take x [M, E] times the head to pieces, if all heads are tall."""
    count, width = x.shape
    found = packing(head)
    if count <= few(found):
        rows = max(1, min(4, 16 // found.bits))
        pieces, blocks, constants = 4 * rows, 1, {"ROWS": rows, "COLUMNS": count}
    else:
        tiles, column_tiles = 4, 1 if count <= TILE else 2
        pieces, blocks = TILE * tiles, -(-count // (TILE * column_tiles))
        constants = {"TILES": tiles, "COLUMN_TILES": column_tiles}
    return _Plan(
        count <= few(found),
        -(-head.weight.shape[0] // pieces),
        blocks,
        {**found.template(width), **constants},
    )
