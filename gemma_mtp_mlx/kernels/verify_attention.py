"""Attention of a block's queries over a ragged batch's committed keys and values, and the block.

Rows of any lengths in one launch: each reads, in place, what it can see and nothing else, and no
mask is made. What is long is cut into parts of a fixed number of positions that work side by side;
a second launch joins them.
"""

from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from gemma_mtp_mlx.attention import Kind, Rows, block_view, cache_view, read_block
from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.kernel import SIMDGROUP, Constant, Kernel, Output

# Positions of a part, multiples of a tile: few enough that one row alone keeps many threadgroups
# busy, many enough that writing and reading its float32 sums is little beside its keys and values.
# A sliding layer has no more than a window of them.
SLIDING_PART = 256
FULL_PART = 512
MOST_TILES = 4  # of 8 rows of queries, per threadgroup
MOST_SUMS = 32  # 8x8 matrices that a simdgroup sums in its registers: 64 of a thread's 128

_INPUTS = ["queries", "keys", "values", "block_keys", "block_values", "lengths", "homes"]

ATTEND = Kernel(
    "verify_attention",
    _INPUTS,
    ["out"],
    """
    typedef Attention<T, D, TILES, WINDOW, RING, THREADS> A;
    threadgroup vec<T, A::PER> staged[A::STAGED];
    threadgroup float scores[A::BUFFERS * A::SCORES];
    threadgroup float2 stats[A::ROWS];
    const int row = threadgroup_position_in_grid.y;
    attend_whole<A>(
        Inputs<T>{{queries, queries_strides}, {keys, keys_strides}, {values, values_strides},
                  {block_keys, block_keys_strides}, {block_values, block_values_strides},
                  queries_shape[1], queries_shape[2], keys_shape[0]},
        Head{row, int(threadgroup_position_in_grid.z), homes[row * homes_strides[0]],
             seen_by<WINDOW, BEHIND>(lengths[row * lengths_strides[0]], queries_shape[2])},
        threadgroup_position_in_grid.x,
        Place<vec<T, A::PER>>{staged, scores, stats, simdgroup_index_in_threadgroup,
                              thread_index_in_simdgroup},
        out);
    """,
    ["verify_attention"],
    row_contiguous=False,
)

ATTEND_PARTS = Kernel(
    "verify_attention_parts",
    [*_INPUTS, "offsets"],
    ["weighted", "peaks", "totals"],
    """
    typedef Attention<T, D, TILES, WINDOW, RING, THREADS> A;
    threadgroup vec<T, A::PER> staged[A::STAGED];
    threadgroup float scores[A::BUFFERS * A::SCORES];
    threadgroup float2 stats[A::ROWS];
    const int part = threadgroup_position_in_grid.y, row = row_of(offsets, part);
    attend_part<A, PART>(
        Inputs<T>{{queries, queries_strides}, {keys, keys_strides}, {values, values_strides},
                  {block_keys, block_keys_strides}, {block_values, block_values_strides},
                  queries_shape[1], queries_shape[2], keys_shape[0]},
        Head{row, int(threadgroup_position_in_grid.z), homes[row * homes_strides[0]],
             seen_by<WINDOW, BEHIND>(lengths[row * lengths_strides[0]], queries_shape[2])},
        threadgroup_position_in_grid.x,
        Place<vec<T, A::PER>>{staged, scores, stats, simdgroup_index_in_threadgroup,
                              thread_index_in_simdgroup},
        part, part - offsets[row], weighted, peaks, totals);
    """,
    ["verify_attention"],
    row_contiguous=False,
)

JOIN_PARTS = Kernel(
    "verify_attention_join",
    ["weighted", "peaks", "totals", "offsets"],
    ["out"],
    """
    const int query = threadgroup_position_in_grid.x, row = threadgroup_position_in_grid.y;
    const int queries = threadgroups_per_grid.x;
    join_parts<D, THREADS>(
        weighted, peaks, totals, offsets[row], offsets[row + 1], queries, query,
        out + long(row * queries + query) * D, thread_index_in_threadgroup);
    """,
    ["verify_attention"],
)


class KernelSource(NamedTuple):
    """What one layer's queries read in a verify or draft pass on a GPU."""

    storage: mx.array
    block: mx.array | None
    rows: Rows
    kind: Kind

    def attend(self, queries: mx.array) -> mx.array:
        """Attend. queries: [B, H, L, D]. Returns the same shape."""
        return verify_attention_metal(queries, *self)


def part_offsets(rows: Rows, length: int, window: int | None) -> list[int]:
    """Return how many parts lie before each row's, and at the end how many there are.

    length: how far beyond a row's bound positions may be seen.
    """
    size = FULL_PART if window is None else SLIDING_PART
    counts = [max(-(-(bound + length) // size), 1) for _, bound in rows.spans]
    if window is not None:  # from anywhere in a part
        most = (window + max(length, 1) + size - 3) // size + 1
        counts = [min(count, most) for count in counts]
    return list(accumulate(counts, initial=0))


def row_tiles(queries: int, d: int, threads: int) -> int:
    """Return of how many tiles of 8 rows a threadgroup takes so many queries."""
    blocks = d // (16 if d % 32 else 32)
    sums = -(-blocks // (threads // SIMDGROUP)) * (2 if d % 32 else 4)
    most = min(MOST_TILES, max(MOST_SUMS // sums, 1))
    tiles = -(-queries // 8)
    return -(-tiles // -(-tiles // most))


def verify_attention(
    queries: mx.array, storage: mx.array, block: mx.array | None, rows: Rows, kind: Kind
) -> mx.array:
    """Attend L new positions over each row's committed positions and over the block itself.

    queries: [B, H, L, D]; storage: [2G, N, D], a full layer's pool or a sliding layer's rings;
    block: the keys and values [B, 2G, L, D] of the L positions, or None for a drafter's query
    (L = 1), which sees the last `window` committed positions, or all.
    Returns: [B, H, L, D] in queries.dtype; softmax and sums in float32.
    Error: <= 2 x that of the reference in queries.dtype.
    """
    path = verify_attention_metal if on_gpu() else verify_attention_reference
    return path(queries, storage, block, rows, kind)


def verify_attention_reference(
    queries: mx.array, storage: mx.array, block: mx.array | None, rows: Rows, kind: Kind
) -> mx.array:
    """The definition, in MLX's own operations."""
    length = queries.shape[2]
    view = cache_view(rows, kind) if block is None else block_view(rows, length, kind)
    return read_block(storage, block, view).attend(queries)


def verify_attention_metal(
    queries: mx.array, storage: mx.array, block: mx.array | None, rows: Rows, kind: Kind
) -> mx.array:
    """The same in one launch, or in two where a row may have several parts.

    Any of the arrays may be a view, as long as its last dimension is contiguous.
    Raises: ValueError if D is not a multiple of 16.
    """
    b, h, length, d = queries.shape
    g, window, ring = len(storage) // 2, kind.window, kind.ring
    if d % 16:
        raise ValueError(f"queries {queries.shape}: head_dim must be a multiple of 16")
    # Without a block nothing lies behind what is committed: queries stand in for it.
    new = [queries, queries] if block is None else [block[:, :g], block[:, g:]]
    entries = [storage[:g], storage[g:], *new]
    assert all((x.dtype, x.shape[-1]) == (queries.dtype, d) for x in entries)
    assert (window is None) == (ring is None) and h % g == 0, (window, ring, h, g)
    assert length == 1 if block is None else block.shape == (b, 2 * g, length, d)
    shared = h // g * length  # queries that read the same keys and values
    tiles = row_tiles(shared, d, ATTEND.threads)
    inputs = [queries, *entries, rows.lengths, rows.starts if window is None else rows.slots]
    groups = -(-shared // (8 * tiles))
    offsets = part_offsets(rows, length - (block is None), window)
    template: dict[str, Constant] = {
        "T": queries.dtype,
        "D": d,
        "TILES": tiles,
        "WINDOW": window or 0,
        "RING": ring or 0,
        "BEHIND": int(block is None),
    }
    if offsets[-1] == b:
        (out,) = ATTEND.launch(
            inputs, (groups, b, g), [Output(queries.shape, queries.dtype)], template
        )
        return out
    before = mx.array(offsets)
    shape = (offsets[-1], h, length)
    weighted, peaks, totals = ATTEND_PARTS.launch(
        [*inputs, before],
        (groups, offsets[-1], g),
        [Output((*shape, d), mx.float32), Output(shape, mx.float32), Output(shape, mx.float32)],
        {**template, "PART": FULL_PART if window is None else SLIDING_PART},
    )
    (out,) = JOIN_PARTS.launch(
        [weighted, peaks, totals, before],
        (h * length, b, 1),
        [Output(queries.shape, queries.dtype)],
        {"D": d},
    )
    return out
