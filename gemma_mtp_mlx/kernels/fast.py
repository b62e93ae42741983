"""Fast mode: MLX's own kernels where they are known to win, ours elsewhere.

There a token's bits may depend on how many are computed with it, so a text is the same only up to
numerical ties.
"""

import re

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.kernels.arithmetic import OWN, STOCK, Arithmetic
from gemma_mtp_mlx.kernels.weights import packing

# Positions from which on MLX's matmuls win, by generation of GPU (17 is M5). On its tensor units,
# reached from 13 positions on, 16 cost about what one does. Sources: MLX's
# backend/metal/quantized.cpp, get_qmv_batch_limit; Rapid-MLX 0.16 for the cost. Nothing published
# has them win on M1 to M4.
STOCK_FROM = {17: 13}

_GENERATION = re.compile(r"applegpu_g(\d+)")


def fast(architecture: str) -> Arithmetic:
    """Return fast mode's operations on a GPU by the name of its architecture, applegpu_g16s."""
    found = _GENERATION.match(architecture)
    limit = STOCK_FROM.get(int(found[1])) if found else None

    def stock_wins(x: mx.array, *modules: nn.Module) -> bool:
        many = limit is not None and x.size // x.shape[-1] >= limit
        return many or not all(has_kernel(module) for module in modules)

    def project(x: mx.array, *layers: nn.Module) -> list[mx.array]:
        return (STOCK if stock_wins(x, *layers) else OWN).project(x, *layers)

    def gated(x: mx.array, gate: nn.Module, up: nn.Module) -> mx.array:
        return (STOCK if stock_wins(x, gate, up) else OWN).gated(x, gate, up)

    def gated_by(x: mx.array, gate: nn.Module, values: mx.array) -> mx.array:
        return (STOCK if stock_wins(x, gate) else OWN).gated_by(x, gate, values)

    return Arithmetic(project, gated, gated_by, _experts)


def has_kernel(module: nn.Module) -> bool:
    """Return whether a layer's weights have a kernel of our own."""
    try:
        packing(module)
    except ValueError:
        return False
    return True


def _experts(x: mx.array, chosen: mx.array, weights: mx.array, *layers: nn.Module) -> mx.array:
    arithmetic = OWN if all(has_kernel(layer) for layer in layers) else STOCK
    return arithmetic.experts(x, chosen, weights, *layers)
