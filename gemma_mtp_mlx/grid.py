"""The q4_0 grid that Google's QAT checkpoints were trained for, found again in their weights.

Thirty-two neighbours share a scale d; a weight is d * (code - 8), code 0 to 15. MLX's affine format
says the same with scale d and bias -8d, both exact, so a weight comes back as it was trained, where
mx.quantize would choose another grid and round. Published weights are products rounded to bfloat16,
from which d is found as what all thirty-two allow: the largest is k * d for one of eight k, the
others follow, and every weight that is not zero bounds d from both sides.
Source: github.com/ggml-org/ggml, block_q4_0.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

GROUP, BITS, ZERO = 32, 4, 8
ON_GRID = 0.9  # share of equal weights: more is training's doing, chance gives some hundredths

_WORTH = 1e-3  # more equal weights that are worth scales of another type than the rest of a model

Floats = npt.NDArray[np.float32]
# Of a type's significand: half a unit in the last place, relative to the power of two below.
_HALF_UNIT = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11, mx.float32: 2.0**-24}


class Fitted(NamedTuple):
    """Weights on a grid: codes [N, K/8] uint32, scales [N, K/32]; equal: how many came back."""

    codes: mx.array
    scales: mx.array
    equal: int

    @property
    def biases(self) -> mx.array:
        """What MLX adds to scale * code, [N, K/32]."""
        return self.scales * -ZERO


def fit(weights: mx.array, dtype: mx.Dtype) -> Fitted:
    """Return weights [N, K], K a multiple of 32, on the nearest grid with scales of a dtype.

    A weight is equal if scale * code + bias, rounded to the type of the weights, is the weight.
    """
    rows, width = weights.shape
    source = weights.dtype
    groups = np.asarray(weights.astype(mx.float32)).reshape(-1, GROUP)
    largest = _largest(groups)
    best = np.zeros(len(groups), np.float32)
    equal = np.zeros(len(groups), np.int64)
    apart = np.full(len(groups), np.inf, np.float32)
    left = np.arange(len(groups))
    for k in range(ZERO, 0, -1):  # llama.cpp gives the largest -8; training may give it less
        tried = groups[left]
        scales = _rounded(_allowed(tried, largest[left] / np.float32(-k), source), dtype)
        differences = _rounded(scales[:, None] * _steps(tried, scales), source) - tried
        found = (differences == 0).sum(axis=1)
        # Not by what is equal: a grid twice as wide may have more of it, and lose the rest.
        sums = np.abs(differences).sum(axis=1)
        nearer = left[better := sums < apart[left]]
        best[nearer], equal[nearer], apart[nearer] = scales[better], found[better], sums[better]
        left = left[found < GROUP]
        if not left.size:
            break
    steps = _steps(groups, best).astype(np.int8) + ZERO
    return Fitted(
        _packed(steps.astype(np.uint8).reshape(rows, width)),
        mx.array(best.reshape(rows, width // GROUP)).astype(dtype),
        int(equal.sum()),
    )


def scale_dtype(weights: mx.array, usual: mx.Dtype) -> tuple[mx.Dtype, float]:
    """Return the type for the scales of a weight and how much of [N, K] is then equal, 0 to 1.

    The usual one, of all that is not packed, unless float16, as q4_0 has, brings back more.
    """
    share = fit(weights, usual).equal / weights.size
    if usual == mx.bfloat16 and share < 1 - _WORTH:
        half = fit(weights, mx.float16).equal / weights.size
        if half > share + _WORTH:
            return mx.float16, half
    return usual, share


def _largest(groups: Floats) -> Floats:
    """The value of greatest magnitude of each group, its sign kept."""
    where = np.abs(groups).argmax(axis=1)
    return np.take_along_axis(groups, where[:, None], axis=1)[:, 0]


def _steps(groups: Floats, scales: Floats) -> Floats:
    """The multiples of the scale nearest to each weight, -8 to 7; of a scale of 0, 0."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(groups * inverse[:, None]), -ZERO, ZERO - 1)


def _allowed(groups: Floats, scales: Floats, source: mx.Dtype) -> Floats:
    """Return the middle of what a group's weights, rounded to their type, allow its scale to be.

    Where they contradict each other, the scale stays as it is: it is not this grid.
    """
    steps = np.abs(_steps(groups, scales))
    sizes = np.abs(groups)
    significands, exponents = np.frexp(sizes)
    margins = np.ldexp(np.float32(_HALF_UNIT[source]), exponents - 1)
    below = margins * np.where(significands == 0.5, np.float32(0.5), np.float32(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(steps > 0, (sizes - below) / steps, 0).max(axis=1)
        high = np.where(steps > 0, (sizes + margins) / steps, np.inf).min(axis=1)
    middle = np.copysign((low + high) / 2, scales)
    return np.where((low <= high) & np.isfinite(high), middle, scales).astype(np.float32)


def _rounded(values: Floats, dtype: mx.Dtype) -> Floats:
    """Round to a type, to nearest even, and back."""
    return np.asarray(mx.array(values).astype(dtype).astype(mx.float32))


def _packed(codes: npt.NDArray[np.uint8]) -> mx.array:
    """Pack codes [N, K] of four bits as MLX does: eight to a word, the first lowest."""
    pairs = codes[:, 0::2] | codes[:, 1::2] << BITS
    return mx.array(np.ascontiguousarray(pairs).view("<u4"))
