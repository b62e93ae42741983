"""Acceptance keeps the longest prefix on which draft and target agree."""

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.acceptance import accept


def test_accept_counts_the_common_prefix() -> None:
    rng = np.random.RandomState(0)
    drafts, choices = rng.randint(0, 2, (64, 6)), rng.randint(0, 2, (64, 7))
    expected = [
        next((i for i in range(6) if d[i] != c[i]), 6) for d, c in zip(drafts, choices, strict=True)
    ]
    assert len(set(expected)) > 4
    assert accept(mx.array(drafts), mx.array(choices)).tolist() == expected


def test_nothing_drafted_is_nothing_accepted() -> None:
    assert accept(mx.zeros((3, 0), mx.int32), mx.zeros((3, 1), mx.int32)).tolist() == [0, 0, 0]
