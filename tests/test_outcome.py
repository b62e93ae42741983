"""A report brings to the host what a round decided, whatever other rows wanted to know."""

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.outcome import make_report, unpack

NOISE = mx.random.normal((1, 1, 4096), key=mx.random.key(3))
TIED = mx.minimum(mx.round(NOISE), 1)  # a handful of values, the best of them hundreds of times


def alternatives(top: int) -> tuple[tuple[int, float], ...]:
    report = make_report(TIED, mx.array([[2]]), mx.array([[0]]), top)
    ((_, _, ((_, found),)),) = unpack(np.array(report), 1, top)
    return found


def test_ties_do_not_depend_on_how_many_alternatives_another_row_wants() -> None:
    most = alternatives(20)
    assert list(most) == sorted(most, key=lambda found: (-found[1], found[0]))
    for top in (1, 2, 3, 5, 9, 15):
        assert alternatives(top) == most[:top]


def test_a_report_is_what_was_decided() -> None:
    logits = mx.random.normal((3, 4, 50), key=mx.random.key(1))
    choices, count = mx.argmax(logits, axis=-1), mx.array([[0], [3], [1]])
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    outcomes = unpack(np.array(make_report(logits, choices, count, 0)), 4, 0)
    for row, (tokens, accepted, found) in enumerate(outcomes):
        assert accepted == count[row].item()
        assert tokens == choices[row, : accepted + 1].tolist()
        wanted = [logprobs[row, place, token] for place, token in enumerate(tokens)]
        assert [logprob for logprob, _ in found] == wanted
