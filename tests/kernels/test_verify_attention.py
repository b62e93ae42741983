"""Attention in place: its values, and queries that do not depend on how they are computed."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.attention import Rows
from gemma_mtp_mlx.cache import MAX_BLOCK
from gemma_mtp_mlx.kernels.verify_attention import (
    ATTEND,
    ATTEND_PARTS,
    FULL_PART,
    JOIN_PARTS,
    SLIDING_PART,
    part_offsets,
    row_tiles,
    verify_attention,
    verify_attention_metal,
    verify_attention_reference,
)
from tests.kernels.attention_calls import Layer, Row, Texts, make_call, make_texts, truth_of
from tests.kernels.exact import DTYPES, exact
from tests.metal.executor import Executor

# The tiny families, the built-in pair.
SMALL = [
    Layer(4, 1, 16, 16),
    Layer(8, 4, 16, 16),
    Layer(4, 2, 32, None),
    Layer(4, 1, 48, 300),
    Layer(4, 1, 96, None),
]
# E2B, E4B, 12B, 26B, 31B, with a smaller window; and numbers of positions that make 1 to 4 row
# tiles, and several threadgroups of them.
MODELS = [
    (Layer(8, 1, 256, 96), 2),
    (Layer(8, 1, 512, None), 4),
    (Layer(8, 2, 256, 96), 8),
    (Layer(8, 2, 512, None), 5),
    (Layer(16, 8, 256, 96), 1),
    (Layer(16, 1, 512, None), 2),
    (Layer(16, 8, 256, 96), 16),
    (Layer(16, 2, 512, None), 3),
    (Layer(32, 16, 256, 96), 4),
    (Layer(32, 4, 512, None), 1),
]


def _check_error(
    layer: Layer, dtype: mx.Dtype, lengths: list[int], length: int, drafts: bool = False
) -> None:
    rows = [Row(text, n) for text, n in enumerate(lengths)]
    texts = make_texts(layer, len(rows), max(lengths) + length, dtype)
    found = verify_attention_metal(*make_call(layer, texts, rows, length, drafts=drafts))
    call = make_call(layer, texts, rows, length, drafts=drafts, unseen=0.0)
    truth = truth_of(layer, texts, rows, length, drafts)
    error, allowed = (
        np.abs(exact(x) - truth).max() for x in (found, verify_attention_reference(*call))
    )
    assert (found.shape, found.dtype) == (call.queries.shape, dtype)
    assert error <= 2 * allowed + 2**-23 * np.abs(truth).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", SMALL)
def test_small(metal: Executor, layer: Layer, dtype: mx.Dtype) -> None:
    _check_error(layer, dtype, [0, 1, 130, 600], 5)
    _check_error(layer, dtype, [1, 40, 600], 1, drafts=True)


@pytest.mark.parametrize("layer,length", MODELS)
def test_models(metal: Executor, layer: Layer, length: int) -> None:
    _check_error(layer, mx.bfloat16, [0, 150], length)


@pytest.mark.parametrize("layer", [Layer(4, 2, 32, None), Layer(8, 1, 512, None)])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_only_the_result_is_rounded(metal: Executor, layer: Layer, dtype: mx.Dtype) -> None:
    texts = make_texts(layer, 1, 90, dtype)
    wide = Texts(*(x.astype(mx.float32) for x in texts))
    found, exactly = (
        verify_attention_metal(*make_call(layer, x, [Row(0, 80)], 4)) for x in (texts, wide)
    )
    assert mx.array_equal(found, exactly.astype(dtype))


# Positions at which something begins or ends: strips, tiles, windows and parts. And the passes in
# which they are asked: how many positions are new, which of them.
EDGES = {
    Layer(4, 2, 32, None): (mx.float32, [0, 7, 60, 63, 64, 511, 512, 1030]),
    Layer(8, 4, 16, 16): (mx.bfloat16, [0, 14, 15, 16, 60, 255, 256, 300]),
    Layer(4, 1, 48, 300): (mx.float16, [1, 60, 255, 299, 300, 301, 600, 900]),
    Layer(16, 8, 256, 96): (mx.bfloat16, [3, 96, 252]),
    Layer(8, 1, 512, None): (mx.bfloat16, [3, 60, 130]),
}
PASSES = [(1, 0), (2, 0), (2, 1), (5, 3), (8, 7), (16, 0), (16, 9), (16, 15)]


@pytest.mark.parametrize("layer", EDGES)
def test_a_query_is_the_same_however_it_is_computed(metal: Executor, layer: Layer) -> None:
    """Alone, or among others of its row and other rows, wherever the committed part ends."""
    dtype, edges = EDGES[layer]
    texts = make_texts(layer, len(edges), max(edges) + MAX_BLOCK, dtype)
    alone = [
        verify_attention_metal(*make_call(layer, texts, [Row(n, edge)], 1))[0, :, 0]
        for n, edge in enumerate(edges)
    ]
    spares = itertools.cycle([0, 7, 600])
    for length, j in PASSES if layer.d < 256 else PASSES[::3]:
        places = [min(j, edge) for edge in edges]
        rows = [Row(n, edge - at) for n, (edge, at) in enumerate(zip(edges, places, strict=True))]
        for batch in ([*range(len(rows))], [2, 0, 1], [1]):
            call = make_call(layer, texts, [rows[n] for n in batch], length, spare=next(spares))
            found = verify_attention_metal(*call)
            for row, n in zip(found, batch, strict=True):
                assert mx.array_equal(row[:, places[n]], alone[n]), (length, j, n)


@pytest.mark.parametrize("window", [None, 16, 300])
def test_a_drafter_sees_what_a_block_of_the_last_position_sees(
    metal: Executor, window: int | None
) -> None:
    layer = Layer(4, 2, 32, window)
    lengths = [1, 2, 17, 257, 700]
    texts = make_texts(layer, len(lengths), max(lengths), mx.bfloat16)
    draft = make_call(layer, texts, [Row(n, m) for n, m in enumerate(lengths)], 1, drafts=True)
    wider = layer._replace(window=window and window + 1)
    block = make_call(wider, texts, [Row(n, m - 1) for n, m in enumerate(lengths)], 1)
    assert draft.kind.window == block.kind.window
    assert mx.array_equal(verify_attention_metal(*draft), verify_attention_metal(*block))


@pytest.mark.parametrize(
    "layer,threads",
    [
        (Layer(4, 1, 96, 300), 64),
        (Layer(4, 1, 96, 300), 96),
        (Layer(8, 1, 512, None), 64),
        (Layer(8, 1, 512, None), 128),
    ],
)
def test_other_threadgroups(
    metal: Executor, monkeypatch: pytest.MonkeyPatch, layer: Layer, threads: int
) -> None:
    rows = [Row(0, 70), Row(1, 3)]
    call = make_call(layer, make_texts(layer, 2, 75, mx.bfloat16), rows, 4, spare=500)
    expected = verify_attention_metal(*call)
    for kernel in (ATTEND, ATTEND_PARTS, JOIN_PARTS):
        monkeypatch.setattr(kernel, "threads", threads)
    assert mx.array_equal(verify_attention_metal(*call), expected)


@pytest.mark.parametrize(
    "layer,length",
    [
        (Layer(8, 1, 256, 512), 4),
        (Layer(8, 1, 512, None), 4),
        (Layer(8, 2, 256, 512), 8),
        (Layer(16, 1, 512, None), 2),
        (Layer(16, 8, 256, 1024), 1),
    ],
)
def test_keys_and_values_are_read_once(metal: Executor, layer: Layer, length: int) -> None:
    """All and only what is seen, for up to 32 queries that share it; nothing is copied."""
    lengths = [530] if layer.kv_heads > 2 else [530, 70]
    rows = [Row(n, m) for n, m in enumerate(lengths)]
    texts = make_texts(layer, len(rows), max(lengths) + length, mx.bfloat16)
    verify_attention_metal(*make_call(layer, texts, rows, length))
    attend = next(x for x in metal.launches if x.kernel == ATTEND_PARTS.name)
    entry = layer.kv_heads * layer.d * mx.bfloat16.size
    seen = sum(min(m, (layer.window or m + 1) - 1) for m in lengths)
    for stored, fresh in [("keys", "block_keys"), ("values", "block_values")]:
        cache, block = attend.traffic[stored], attend.traffic[fresh]
        assert (cache.read, block.read) == (seen * entry, len(rows) * length * entry)
        assert cache.read_total + block.read_total <= 1.1 * (cache.read + block.read)


def test_views_are_read_in_place(metal: Executor) -> None:
    layer = Layer(8, 2, 32, None)
    call = make_call(layer, make_texts(layer, 2, 80, mx.float16), [Row(0, 70), Row(1, 20)], 5)
    where = call.rows

    def transposed(x: mx.array) -> mx.array:
        return mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)

    def second_half(x: mx.array, axis: int) -> mx.array:
        return mx.split(mx.concatenate([x + 1, x], axis), 2, axis)[1]

    def strided(x: mx.array) -> mx.array:
        return mx.contiguous(mx.stack([x, x + 1], axis=1))[:, 0]

    views = call._replace(
        queries=transposed(call.queries),
        storage=second_half(call.storage, 1),
        block=transposed(call.block),
        rows=where._replace(lengths=strided(where.lengths), starts=strided(where.starts)),
    )
    assert mx.array_equal(verify_attention_metal(*views), verify_attention_metal(*call))
    assert not ATTEND.row_contiguous and not ATTEND_PARTS.row_contiguous  # or MLX would copy


def test_an_empty_row_of_a_drafter_reads_nothing(metal: Executor) -> None:
    """It has no answer; the others have theirs."""
    layer = Layer(4, 2, 32, 16)
    texts = make_texts(layer, 2, 40, mx.float16)
    call = make_call(layer, texts, [Row(0, 1), Row(1, 40)], 1, drafts=True)
    empty = call.rows._replace(lengths=mx.array([0, 40]))
    found = verify_attention_metal(*call._replace(rows=empty))
    assert mx.isnan(found[0]).all()
    assert mx.array_equal(found[1], verify_attention_metal(*call)[1])
    assert all(x.traffic["keys"].read == 2 * 17 * 32 * 2 for x in metal.launches[:1])


def test_chosen_on_a_gpu(metal: Executor) -> None:
    layer = Layer(4, 2, 32, 16)
    verify_attention(*make_call(layer, make_texts(layer, 1, 20, mx.float16), [Row(0, 9)], 2))
    assert [x.kernel for x in metal.launches] == [ATTEND.name]


def test_head_dim_of_no_whole_blocks(metal: Executor) -> None:
    layer = Layer(4, 2, 24, None)
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 24\): head_dim must be a multiple of 16"):
        verify_attention_metal(
            *make_call(layer, make_texts(layer, 1, 20, mx.float16), [Row(0, 9)], 2)
        )


@pytest.mark.parametrize("window", [1, 16, 256, 257, 300, 1024])
@pytest.mark.parametrize("length", [1, 2, 16])
def test_rows_have_as_many_parts_as_they_can_touch(window: int, length: int) -> None:
    committed = range(3 * (window + SLIDING_PART))
    most = max(
        (n + length - 1) // SLIDING_PART - max(n + 1 - window, 0) // SLIDING_PART + 1
        for n in committed
    )
    spans = tuple((0, n) for n in (0, 0, len(committed)))
    nothing = mx.zeros(3, mx.int32)
    rows = Rows(nothing, nothing, nothing, spans)
    assert part_offsets(rows, length, window) == [0, 1, 2, 2 + most]
    full = part_offsets(rows, length, None)
    assert full == [0, 1, 2, 2 + (len(committed) + length - 1) // FULL_PART + 1]


def test_row_tiles() -> None:
    """All queries have a place, no threadgroup is empty, and sums fit registers."""
    for d in (16, 48, 96, 256, 512):
        for threads in (64, 128, 256):
            for queries in range(1, 257):
                tiles = row_tiles(queries, d, threads)
                groups = -(-queries // (8 * tiles))
                assert (groups - 1) * 8 * tiles < queries <= groups * 8 * tiles
                assert tiles == 1 or (tiles <= 4 and tiles * d * 8 <= 64 * threads)
    assert row_tiles(32, 512, 256) == 4 and row_tiles(40, 512, 256) == 3
