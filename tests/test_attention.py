"""Attention over cache and block equals attention over a plain list of keys and values."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.attention import Kind, Rows, block_view, cache_view, read_block

G, H, D, RING, WINDOW = 2, 4, 16, 48, 20
LENGTHS = [1, 31, 32, 70, 1500]
CAPACITY = 2048


def _history(rng: np.random.RandomState, length: int) -> np.ndarray:
    return rng.standard_normal((G, length, D)).astype(np.float32)


def _expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, last: int, window: int | None):
    """q: [H, D]; k, v: [G, S, D]: softmax attention over positions (last - window, last]."""
    first = 0 if window is None else max(last - window + 1, 0)
    k, v = (np.repeat(x[:, first : last + 1], H // G, axis=0).astype(np.float64) for x in (k, v))
    scores = np.einsum("hd,hsd->hs", q.astype(np.float64), k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hs,hsd->hd", weights / weights.sum(-1, keepdims=True), v)


def _storage(past: list[np.ndarray], ring: int | None, rng: np.random.RandomState) -> np.ndarray:
    """Store each row's committed positions; everything else is noise that must not be seen."""
    size = ring or CAPACITY
    stored = rng.standard_normal((G, len(past) * size, D)).astype(np.float32) * 50
    for row, values in enumerate(past):
        for position in range(values.shape[1]):
            stored[:, row * size + position % size] = values[:, position]
    return stored


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_block_attention_equals_attention_over_a_list(window: int | None, length: int) -> None:
    rng = np.random.RandomState(length)
    ring = None if window is None else RING
    past_k, past_v = ([_history(rng, n) for n in LENGTHS] for _ in range(2))
    new_k, new_v = (
        rng.standard_normal((len(LENGTHS), G, length, D)).astype(np.float32) for _ in "kv"
    )
    q = rng.standard_normal((len(LENGTHS), H, length, D)).astype(np.float32)
    starts = [row * CAPACITY for row in range(len(LENGTHS))]
    rows = Rows(
        mx.array(LENGTHS),
        mx.array(starts),
        mx.arange(len(LENGTHS)),
        tuple(zip(starts, [n + 7 for n in LENGTHS], strict=True)),
    )
    storage = mx.array(np.concatenate([_storage(p, ring, rng) for p in (past_k, past_v)]))
    view = block_view(rows, length, Kind(window, ring, *storage.shape[:2]))
    source = read_block(storage, mx.array(np.concatenate([new_k, new_v], axis=1)), view)
    out = np.array(source.attend(mx.array(q)))
    for row, n in enumerate(LENGTHS):
        k = np.concatenate([past_k[row], new_k[row]], axis=1)
        v = np.concatenate([past_v[row], new_v[row]], axis=1)
        for i in range(length):
            expected = _expected(q[row, :, i], k, v, n + i, window)
            np.testing.assert_allclose(out[row, :, i], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, WINDOW + 1])
def test_cache_attention_sees_the_last_committed_positions(window: int | None) -> None:
    rng = np.random.RandomState(0)
    ring = None if window is None else RING
    past_k, past_v = ([_history(rng, n) for n in LENGTHS] for _ in range(2))
    q = rng.standard_normal((len(LENGTHS), H, 1, D)).astype(np.float32)
    starts = [row * CAPACITY for row in range(len(LENGTHS))]
    rows = Rows(
        mx.array(LENGTHS),
        mx.array(starts),
        mx.arange(len(LENGTHS)),
        tuple(zip(starts, LENGTHS, strict=True)),
    )
    storage = mx.array(np.concatenate([_storage(p, ring, rng) for p in (past_k, past_v)]))
    out = np.array(
        read_block(storage, None, cache_view(rows, Kind(window, ring, *storage.shape[:2]))).attend(
            mx.array(q)
        )
    )
    for row, n in enumerate(LENGTHS):
        expected = _expected(q[row, :, 0], past_k[row], past_v[row], n - 1, window)
        np.testing.assert_allclose(out[row, :, 0], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_query_does_not_depend_on_what_is_committed_or_on_who_else_is_there(
    window: int | None, dtype: mx.Dtype
) -> None:
    """The same positions, committed to different extents, give the same bits."""
    rng = np.random.RandomState(1)
    ring = None if window is None else RING
    total = 1100
    keys, values = (_history(rng, total) for _ in range(2))
    q = mx.array(rng.standard_normal((1, H, 16, D)).astype(np.float32)).astype(dtype)

    def attend(length: int, bound: int, copies: int) -> mx.array:
        """The last positions' queries, `length` of them new, in a batch of equal rows."""
        done = total - length
        starts = [row * CAPACITY for row in range(copies)]
        rows = Rows(
            mx.full((copies,), done, mx.int32),
            mx.array(starts),
            mx.arange(copies),
            tuple((start, done + bound) for start in starts),
        )
        stored = [_storage([x[:, :done]] * copies, ring, rng) for x in (keys, values)]
        storage = mx.array(np.concatenate(stored)).astype(dtype)
        new = np.concatenate([x[:, done:] for x in (keys, values)])
        block = mx.array(np.stack([new] * copies)).astype(dtype)
        source = read_block(
            storage, block, block_view(rows, length, Kind(window, ring, *storage.shape[:2]))
        )
        return source.attend(mx.concatenate([q[:, :, -length:]] * copies))[-1, :, -1]

    alone = attend(1, 0, 1)
    for length, bound, copies in [(1, 16, 3), (2, 0, 1), (5, 5, 2), (16, 16, 1), (16, 3, 4)]:
        assert mx.array_equal(alone, attend(length, bound, copies))
