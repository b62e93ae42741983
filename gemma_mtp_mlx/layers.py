"""The pieces a Gemma 4 decoder layer is made of; parameter names are mlx_lm's.

A layer attends through a reader (readers.py): it hands over its block's new keys and values and
gets back what its queries may read, so the same layer serves prefill, verify and draft passes.
Source: transformers Gemma4TextDecoderLayer and the classes it uses.
"""

import math
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from gemma_mtp_mlx.config import LayerConfig, ModelConfig
from gemma_mtp_mlx.device import fused, on_gpu
from gemma_mtp_mlx.readers import Turn, Turns, wavelengths


class Source(Protocol):
    """What one layer's queries read."""

    def attend(self, queries: mx.array) -> mx.array:
        """queries: [B, H, L, D]. Returns the same shape."""


class Reader(Protocol):
    """One pass over the cache: a VerifyReader, a PromptReader or a SharedKV of readers.py.

    positions: [B] int32, of the first token of each row; turns: how RoPE turns the tokens there.
    """

    positions: mx.array
    turns: Turns

    def source(self, layer: LayerConfig, block: mx.array | None) -> Source:
        """Return what the layer's queries read; block: its own new [B, 2G, L, D]."""


class Attention(nn.Module):
    """Attention without a scale: queries, keys and values are normed instead."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self._layer = layer
        self._eps = config.rms_norm_eps
        width, d, kv_width = config.hidden_size, layer.head_dim, layer.num_key_value_heads
        self.q_proj = nn.Linear(width, config.num_attention_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, width, bias=False)
        self.q_norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        if layer.owns_kv:
            self.k_proj = nn.Linear(width, kv_width * d, bias=False)
            self.k_norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
            if not layer.k_eq_v:
                self.v_proj = nn.Linear(width, kv_width * d, bias=False)

    def __call__(self, x: mx.array, reader: Reader) -> mx.array:
        """x: [B, L, E] -> [B, L, E]."""
        b, length, _ = x.shape
        queries, block = (self._heads if on_gpu() else self._joined_heads)(x, reader)
        out = reader.source(self._layer, block).attend(queries)
        return self.o_proj(out.swapaxes(1, 2).reshape(b, length, -1))

    def _heads(self, x: mx.array, reader: Reader) -> tuple[mx.array, mx.array | None]:
        """Queries [B, H, L, D], and the block if the layer owns one; a launch per norm and RoPE."""
        queries, *new = self._project(x)
        queries = self._rotate(self.q_norm(queries), reader.positions)
        if not new:
            return queries, None
        keys = self._rotate(self.k_norm(new[0]), reader.positions)
        values = mx.fast.rms_norm(new[-1], None, self._eps).swapaxes(1, 2)
        return queries, mx.concatenate([keys, values], axis=1)

    def _joined_heads(self, x: mx.array, reader: Reader) -> tuple[mx.array, mx.array | None]:
        """The same for a CPU, where a norm or a RoPE is a dozen operations: all heads at once."""
        parts = self._project(x)
        norms = [self.q_norm, self.k_norm] if self._layer.owns_kv else [self.q_norm]
        weights = mx.concatenate(
            [mx.broadcast_to(n.weight, p.shape[2:]) for n, p in zip(norms, parts, strict=False)]
        )
        normed = mx.fast.rms_norm(mx.concatenate(parts, axis=2), None, self._eps)
        turned = _turn(normed[:, :, : len(weights)] * weights, reader.turns.of(self._layer))
        if not self._layer.owns_kv:
            return turned.swapaxes(1, 2), None
        heads = mx.concatenate([turned, normed[:, :, len(weights) :]], axis=2).swapaxes(1, 2)
        count = parts[0].shape[2]
        return heads[:, :count], heads[:, count:]

    def _project(self, x: mx.array) -> list[mx.array]:
        """Raw queries, keys and values, [B, L, heads, D]; only queries if the layer shares K/V."""
        parts = [self.q_proj(x)]
        if self._layer.owns_kv:
            parts.append(self.k_proj(x))
            parts.append(parts[1] if self._layer.k_eq_v else self.v_proj(x))
        return [part.reshape(*x.shape[:2], -1, self._layer.head_dim) for part in parts]

    def _rotate(self, x: mx.array, positions: mx.array) -> mx.array:
        """RoPE of [B, L, heads, D], the first at positions [B]. Returns [B, heads, L, D]."""
        return mx.fast.rope(
            x.swapaxes(1, 2),
            self._layer.head_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=positions,
            freqs=wavelengths(self._layer),
        )


def _turn(x: mx.array, turn: Turn) -> mx.array:
    """RoPE of [B, L, heads, D], computed in float32."""
    halves = x.astype(mx.float32).reshape(*x.shape[:-1], 2, -1)
    turned = halves * turn.cos + halves[..., ::-1, :] * turn.sin
    return turned.reshape(x.shape).astype(x.dtype)


@fused
def _geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up with the tanh form of gelu, computed in float32."""
    g = gate.astype(mx.float32)
    inner = g * (math.sqrt(2 / math.pi) + math.sqrt(2 / math.pi) * 0.044715 * (g * g))
    return (g * (0.5 + 0.5 * mx.tanh(inner))).astype(gate.dtype) * up


class MLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., E] -> [..., E]."""
        return self.down_proj(_geglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Choose experts: softmax over all, the top k renormalised, each scaled by its own factor."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._k = config.top_k_experts
        self._eps = config.rms_norm_eps
        self._root = config.hidden_size**-0.5
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x: [..., E] -> expert numbers and weights, [..., k] each."""
        x = mx.fast.rms_norm(x, self.scale * self._root, self._eps)
        scores = self.proj(x)
        chosen = mx.argpartition(-scores, self._k - 1, axis=-1)[..., : self._k]
        # Renormalised softmax over the chosen is softmax over all, divided by the chosen's sum.
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1, precise=True)
        return chosen, weights * self.per_expert_scale[chosen]


class SwitchGLU(nn.Module):
    """One gated feed-forward per expert; weights [experts, out, in]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate_proj = SwitchLinear(width, inner, count, bias=False)
        self.up_proj = SwitchLinear(width, inner, count, bias=False)
        self.down_proj = SwitchLinear(inner, width, count, bias=False)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """x: [..., E], chosen: [..., k] -> [..., k, E]."""
        x = x[..., None, None, :]
        gate = _expert_matmul(self.gate_proj, x, chosen)
        up = _expert_matmul(self.up_proj, x, chosen)
        return _expert_matmul(self.down_proj, _geglu(gate, up), chosen).squeeze(-2)


def _expert_matmul(
    proj: SwitchLinear | QuantizedSwitchLinear, x: mx.array, chosen: mx.array
) -> mx.array:
    if isinstance(proj, SwitchLinear) and not on_gpu():
        # MLX's CPU backend has gather_mm in float32 only.
        weight = proj.weight.swapaxes(-1, -2).astype(mx.float32)
        out = mx.gather_mm(x.astype(mx.float32), weight, rhs_indices=chosen)
        return out.astype(x.dtype)
    return proj(x, chosen)


class Experts(nn.Module):
    """The experts a router chose, weighted and summed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.switch_glu = SwitchGLU(config)

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """x: [..., E] -> [..., E]."""
        return (self.switch_glu(x, chosen) * weights[..., None].astype(x.dtype)).sum(axis=-2)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, normed before and after; experts and per-layer inputs if any."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self._moe = config.num_experts > 0
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(width, layer.intermediate_size)
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(width, eps=eps)
        self.layer_scalar = mx.ones((1,))
        if self._moe:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = nn.RMSNorm(width, eps=eps)
            self.post_feedforward_layernorm_2 = nn.RMSNorm(width, eps=eps)
            self.pre_feedforward_layernorm_2 = nn.RMSNorm(width, eps=eps)
        if config.hidden_size_per_layer_input:
            inner = config.hidden_size_per_layer_input
            self.per_layer_input_gate = nn.Linear(width, inner, bias=False)
            self.per_layer_projection = nn.Linear(inner, width, bias=False)
            self.post_per_layer_input_norm = nn.RMSNorm(width, eps=eps)

    def __call__(
        self, h: mx.array, reader: Reader, per_layer_input: mx.array | None = None
    ) -> mx.array:
        """h: [B, L, E], per_layer_input: [B, L, P] -> [B, L, E]."""
        h = h + self.post_attention_layernorm(self.self_attn(self.input_layernorm(h), reader))
        h = h + self.post_feedforward_layernorm(self._feed_forward(h))
        if per_layer_input is not None:
            gated = _geglu(self.per_layer_input_gate(h), per_layer_input)
            h = h + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return h * self.layer_scalar

    def _feed_forward(self, h: mx.array) -> mx.array:
        dense = self.mlp(self.pre_feedforward_layernorm(h))
        if not self._moe:
            return dense
        chosen, weights = self.router(h)
        sparse = self.experts(self.pre_feedforward_layernorm_2(h), chosen, weights)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(sparse)
