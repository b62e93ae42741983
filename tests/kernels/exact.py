"""What a kernel of norms should compute, in float64, and how far from that it may be."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

EPS = 1e-6
DTYPES = [mx.bfloat16, mx.float16, mx.float32]


def exact(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


def draw(key: int, *shape: int, dtype: mx.Dtype = mx.bfloat16, scale: float = 1.0) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(key)) * scale).astype(dtype)


def check_errors(
    found: Sequence[mx.array], reference: Sequence[mx.array], truth: Sequence[np.ndarray]
) -> None:
    """Each as exact as the reference in the same dtype, to a factor of 2 and a float32's ulp."""
    for one, other, right in zip(found, reference, truth, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        error, allowed = (np.abs(exact(x) - right).max() for x in (one, other))
        largest = np.abs(right).max()
        if one.dtype == mx.float32:  # a wrong reference would allow anything
            assert allowed <= (right.shape[-1] + 16) * 2**-24 * largest
        assert error <= 2 * allowed + 2**-23 * largest
