"""The gated activation of Gemma's feed-forward layers. In a kernel it is geglu.metal."""

import math

import mlx.core as mx

from gemma_mtp_mlx.device import fused


@fused
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up with the tanh form of gelu, computed in float32."""
    g = gate.astype(mx.float32)
    inner = g * (math.sqrt(2 / math.pi) + math.sqrt(2 / math.pi) * 0.044715 * (g * g))
    return (g * (0.5 + 0.5 * mx.tanh(inner))).astype(gate.dtype) * up
