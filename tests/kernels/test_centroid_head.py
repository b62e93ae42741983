"""The centroid head: which clusters are chosen, what is drawn among their tokens."""

from itertools import product
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.centroid_head import (
    CHOOSE_IN_CLUSTER,
    CentroidHead,
    centroid_candidates,
    centroid_head_metal,
    centroid_head_reference,
)
from gemma_mtp_mlx.kernels.draw_tokens import draw_tokens_metal
from gemma_mtp_mlx.kernels.kernel import Kernel, Output
from gemma_mtp_mlx.kernels.token_head import head_logits_metal, head_logits_reference
from gemma_mtp_mlx.sampling import Sampling, SamplingParams, batch_sampling, gumbel
from tests.kernels.exact import DTYPES, exact
from tests.metal.executor import Executor

ULP = 2.0**-23

CHOSEN = Kernel(
    "chosen_centroids",
    ["scores"],
    ["chosen"],
    """
    threadgroup uint memory[2 * (THREADS / 32) + 1];
    const uint rank = threadgroup_position_in_grid.x;
    const uint centroid = chosen_centroid<THREADS / 32, CENTROIDS, COUNT, T>(
        scores, rank, memory, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    if (thread_index_in_threadgroup == 0) {
        chosen[rank] = centroid;
    }
    """,
    ["centroid_head"],
)


class Form(NamedTuple):
    """How weights are stored; bits: 0 for plain ones. model: of hidden states, if not dtype."""

    bits: int
    dtype: mx.Dtype
    model: mx.Dtype | None = None


class Size(NamedTuple):
    """Of a head."""

    vocab: int
    width: int
    centroids: int
    top_k: int


FOUR, EIGHT = Form(4, mx.bfloat16), Form(8, mx.float16)
PLAIN, SINGLE = Form(0, mx.bfloat16), Form(0, mx.float32)
OTHER = Form(4, mx.float16, mx.bfloat16)
GEMMA, TINY = Size(16_384, 256, 2048, 32), Size(128, 64, 16, 4)
HEADS = [*product([FOUR, EIGHT, PLAIN, SINGLE], [GEMMA, TINY]), (OTHER, TINY)]


def _quantised(layer: nn.Module, form: Form) -> nn.Module:
    layer.weight = layer.weight.astype(form.dtype)
    return layer.to_quantized(64, form.bits) if form.bits else layer


def _head(form: Form, size: Size) -> CentroidHead:
    mx.random.seed(size.vocab)
    centroids = nn.Linear(size.width, size.centroids, bias=False)
    centroids.weight = mx.random.normal(centroids.weight.shape) * (2 / size.width**0.5)
    tokens = nn.Embedding(size.vocab, size.width)
    tokens.weight = mx.random.normal(tokens.weight.shape) * (4 / size.width**0.5)
    ordering = mx.random.permutation(size.vocab).astype(mx.int32)
    return CentroidHead(_quantised(centroids, form), ordering, _quantised(tokens, form), size.top_k)


def _hidden(form: Form, size: Size, rows: int) -> mx.array:
    drawn = mx.random.normal((rows, size.width), key=mx.random.key(rows))
    return drawn.astype(form.model or form.dtype)


def _sampling(count: int, first: int = 0) -> Sampling:
    """Greedy, sampled and colder rows in turn; filters that nothing here may look at."""
    rows = range(first, first + count)
    params = [SamplingParams(temperature=(0, 1, 0.5)[row % 3], top_k=1) for row in rows]
    return batch_sampling(params, [2**32 - 1 - 77 * row for row in rows])


def _positions(rows: int) -> mx.array:
    return mx.arange(rows) * 65_521 + 1


def _weight(layer: nn.Module) -> np.ndarray:
    if "scales" not in layer:
        return exact(layer.weight)
    scales, biases = (x.astype(mx.float32) for x in (layer.scales, layer.biases))
    return exact(mx.dequantize(layer.weight, scales, biases, layer.group_size, layer.bits))


def _best(scores: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def _ids(tokens: mx.array) -> list[int]:
    return [int(token) for token in np.array(tokens)]


def _chosen(scores: mx.array, count: int) -> list[int]:
    (chosen,) = CHOSEN.launch(
        [scores.astype(mx.float32)],
        (count, 1, 1),
        [Output((count,), mx.uint32)],
        {"T": scores.dtype, "CENTROIDS": scores.size, "COUNT": count},
    )
    return _ids(chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [64, 128, 256])
def test_the_best_centroids_are_chosen(
    metal: Executor, monkeypatch: pytest.MonkeyPatch, threads: int, dtype: mx.Dtype
) -> None:
    monkeypatch.setattr(CHOSEN, "threads", threads)
    for size, count in [(2048, 32), (16, 4), (72, 71)]:
        scores = mx.random.normal((size,), key=mx.random.key(size)).astype(dtype)
        for some in (scores, -mx.abs(scores), scores * 1e-3):
            assert _chosen(some, count) == _best(exact(some), count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_equal_centroids_are_chosen(metal: Executor, dtype: mx.Dtype) -> None:
    size, count = 2048, 32
    place = mx.arange(size)
    zeros = mx.where(place % 3 == 0, -0.0, 0.0)
    for scores in (
        zeros,
        mx.where(place > 2000, 1.0, zeros),
        mx.where(place % 100 == 99, 2.5, mx.where(place % 2 == 1, 0.5, -mx.inf)),
        mx.full((size,), -mx.inf),
        mx.where(place < 2020, -mx.inf, -place.astype(mx.float32)),
    ):
        scores = scores.astype(dtype)
        assert _chosen(scores, count) == _best(exact(scores), count)


@pytest.mark.parametrize("form, size", HEADS, ids=str)
def test_draws_what_is_drawn_from_the_chosen_tokens_logits(
    metal: Executor, form: Form, size: Size
) -> None:
    """Bit for bit as the whole vocabulary's logits with the others at -inf."""
    rows = 3
    head, h = _head(form, size), _hidden(form, size, rows)
    sampling, positions = _sampling(rows), _positions(rows)
    tokens = centroid_head_metal(h, head, sampling, positions)
    assert tokens.dtype == mx.int32 and tokens.shape == (rows,)
    scores = exact(head_logits_metal(h, head.centroids, None))
    clusters = np.array(head.ordering).reshape(size.centroids, -1)
    excluded = np.full((rows, 1, size.vocab), -np.inf, np.float32)
    for row in range(rows):
        excluded[row, 0, clusters[_best(scores[row], size.top_k)]] = 0
    logits = head_logits_metal(h[:, None], head.tokens, None) + mx.array(excluded)
    assert mx.array_equal(tokens[:, None], draw_tokens_metal(logits, sampling, positions[:, None]))


def test_candidates_have_the_logits_of_the_whole_head() -> None:
    """Rounded to the dtype of hidden states, whatever the scales' is; so are centroids' scores."""
    head, h = _head(OTHER, TINY), _hidden(OTHER, TINY, 3)
    logits, ids = centroid_candidates(h, head)
    whole = head_logits_reference(h, head.tokens, None)
    assert mx.array_equal(logits.astype(mx.bfloat16).astype(mx.float32), logits)
    apart = np.abs(exact(logits) - exact(mx.take_along_axis(whole, ids, axis=-1)))
    assert (apart <= 2**-7 * np.abs(exact(logits))).all()  # sums in two orders, each rounded
    scores = exact(head.centroids(h).astype(mx.bfloat16))
    clusters = np.array(head.ordering).reshape(16, -1)
    for row in range(3):
        assert _ids(ids[row]) == sorted(clusters[_best(scores[row], 4)].reshape(-1).tolist())


def test_centroids_scores_are_rounded_to_the_dtype_of_hidden_states(metal: Executor) -> None:
    """Higher by less than that leaves them equal, whatever the centroids' dtype."""
    head, h = _head(Form(0, mx.float32), TINY), mx.ones((1, TINY.width), mx.bfloat16)
    higher = 1 + mx.arange(TINY.centroids)[:, None] * 2**-13
    head.centroids.weight = mx.broadcast_to(higher / TINY.width, head.centroids.weight.shape)
    first = np.array(head.ordering).reshape(TINY.centroids, -1)[: TINY.top_k].reshape(-1)
    assert _ids(centroid_candidates(h, head)[1][0]) == sorted(first.tolist())
    (token,) = _ids(centroid_head_metal(h, head, _sampling(1), _positions(1)))
    logits = head_logits_metal(h, head.tokens, None)[0]
    assert token == first[np.argmax(exact(logits)[first])]


class Scores(NamedTuple):
    """What is exactly so, and by how much numbers in a dtype may be off. [B, C]; [B, V]; [B]."""

    centroids: np.ndarray
    tokens: np.ndarray
    centroid_error: float
    token_error: np.ndarray

    def sure_choice(self, row: int, head: CentroidHead) -> int | None:
        """The row's token if what is off by less than an error cannot change it, else None."""
        centroids, scores = self.centroids[row], self.tokens[row]
        clusters = np.array(head.ordering).reshape(len(centroids), -1)
        least = -np.sort(-centroids)[head.top_k - 1]
        sure = centroids > least + 2 * self.centroid_error
        possible = clusters[centroids >= least - 2 * self.centroid_error].reshape(-1)
        first, second = possible[np.argsort(-scores[possible])[:2]]
        clear = scores[first] - scores[second] > 2 * self.token_error[row]
        return int(first) if clear and first in clusters[sure] else None


def _off(found: mx.array, truth: np.ndarray) -> float:
    return float(np.abs(exact(found) - truth).max())


@pytest.mark.parametrize("form, size", HEADS, ids=str)
def test_draws_as_the_definition_where_rounding_does_not_matter(
    metal: Executor, form: Form, size: Size
) -> None:
    rows = 8
    head, h = _head(form, size), _hidden(form, size, rows)
    sampling, positions = _sampling(rows), _positions(rows)
    centroids, logits = (exact(h) @ _weight(layer).T for layer in (head.centroids, head.tokens))
    noise = gumbel(sampling, positions[:, None], size.vocab)
    assert noise is not None
    warm = exact(sampling.temperature)
    divisor = np.where(warm > 0, warm, 1)
    scores = logits / divisor[:, None] + np.where(warm > 0, 1, 0)[:, None] * exact(noise)[:, 0]
    rounding = (4.5 + 4 * np.abs(scores).max()) * ULP  # of a noise and of the sum
    metal_off = [
        _off(head_logits_metal(h, head.centroids, None), centroids),
        _off(head_logits_metal(h, head.tokens, None), logits),
    ]
    mlx_off = [
        _off(head.centroids(h).astype(h.dtype), centroids),
        _off(head_logits_reference(h, head.tokens, None), logits),
    ]
    for choose, (centroid_error, logit_error), least in (
        (centroid_head_metal, metal_off, rows / 2),
        (centroid_head_reference, mlx_off, 1),
    ):
        exactly = Scores(centroids, scores, centroid_error, logit_error / divisor + rounding)
        sure = [exactly.sure_choice(row, head) for row in range(rows)]
        assert sum(token is not None for token in sure) >= least
        found = _ids(choose(h, head, sampling, positions))
        for token, one in zip(sure, found, strict=True):
            assert token in (None, one)


@pytest.mark.parametrize("form", [FOUR, PLAIN], ids=str)
def test_rows_do_not_see_each_other(metal: Executor, form: Form) -> None:
    rows = 5
    head, h = _head(form, GEMMA), _hidden(form, GEMMA, rows)
    positions = _positions(rows)

    def run(begin: int, end: int) -> list[int]:
        at, sampling = slice(begin, end), _sampling(end - begin, begin)
        return _ids(centroid_head_metal(h[at], head, sampling, positions[at]))

    together = run(0, rows)
    assert [token for row in range(rows) for token in run(row, row + 1)] == together
    assert run(1, 4) == together[1:4]


def test_the_lowest_of_equals(metal: Executor) -> None:
    """Tokens of equal weights, in one cluster and in several."""
    head, h = _head(PLAIN, TINY), _hidden(PLAIN, TINY, 1)
    assert isinstance(head.tokens, nn.Embedding)
    clusters = np.array(head.ordering).reshape(16, -1)
    best = _best(exact(head.centroids(h))[0], 4)
    plain = head.tokens.weight
    for equal in (clusters[best[0], [5, 0]], clusters[best, 1], clusters[best].reshape(-1)):
        head.tokens.weight = mx.array(plain)
        head.tokens.weight[mx.array(equal)] = h[0]
        arguments = h, head, _sampling(1), _positions(1)
        assert _ids(centroid_head_metal(*arguments)) == [equal.min()]
        assert _ids(centroid_head_reference(*arguments)) == [equal.min()]


@pytest.mark.parametrize("threads", [64, 128])
def test_other_threadgroups(metal: Executor, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    head, h = _head(FOUR, GEMMA), _hidden(FOUR, GEMMA, 3)
    arguments = h, head, _sampling(3), _positions(3)
    expected = centroid_head_metal(*arguments)
    monkeypatch.setattr(CHOOSE_IN_CLUSTER, "threads", threads)
    for schedule in ("natural", "reversed", "random"):
        metal.schedule = schedule
        assert mx.array_equal(centroid_head_metal(*arguments), expected)


def test_only_the_chosen_tokens_are_read(metal: Executor) -> None:
    rows, size = 2, Size(8192, 256, 64, 4)
    head, h = _head(FOUR, size), _hidden(FOUR, size, rows)
    centroid_head_metal(h, head, _sampling(rows), _positions(rows))
    score, choose, _ = metal.launches
    assert score.traffic["codes"].read_total == head.centroids.weight.nbytes
    chosen = rows * size.top_k / size.centroids
    assert choose.traffic["codes"].read_total == head.tokens.weight.nbytes * chosen
    assert choose.traffic["ordering"].read <= head.ordering.nbytes * chosen


def test_a_whole_vocabulary(metal: Executor) -> None:
    metal.mode = "fast"
    head, h = _head(FOUR, Size(262_144, 64, 2048, 32)), _hidden(FOUR, TINY, 3)
    arguments = h, head, _sampling(3), _positions(3)
    together = _ids(centroid_head_metal(*arguments))
    logits = exact(head_logits_metal(h[:1], head.tokens, None))[0]
    best = _best(exact(head_logits_metal(h[:1], head.centroids, None))[0], 32)
    ids = np.sort(np.array(head.ordering).reshape(2048, -1)[best].reshape(-1))
    assert together[0] == ids[np.argmax(logits[ids])]  # the first row is greedy


def test_tokens_without_a_kernel_are_named(metal: Executor) -> None:
    head = _head(PLAIN, TINY)._replace(tokens=nn.Embedding(132, 64))
    head = head._replace(ordering=mx.zeros((132,), mx.int32), centroids=nn.Linear(64, 12, False))
    with pytest.raises(ValueError, match="132 x 64"):
        centroid_head_metal(mx.zeros((1, 64)), head, _sampling(1), _positions(1))
