"""The pieces a Gemma 4 decoder layer is made of; parameter names are mlx_lm's.

A layer attends through a reader (readers.py): it hands over its block's new keys and values and
gets back what its queries may read, so the same layer serves prefill, verify and draft passes.
Source: transformers Gemma4TextDecoderLayer and the classes it uses.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from gemma_mtp_mlx.config import LayerConfig, ModelConfig
from gemma_mtp_mlx.kernels.arithmetic import Arithmetic
from gemma_mtp_mlx.kernels.attention_heads import attention_heads
from gemma_mtp_mlx.kernels.residual_norm import residual_norm
from gemma_mtp_mlx.kernels.route import route
from gemma_mtp_mlx.readers import Turns


class Source(Protocol):
    """What one layer's queries read."""

    def attend(self, queries: mx.array) -> mx.array:
        """queries: [B, H, L, D]. Returns the same shape."""


class Reader(Protocol):
    """One pass over the cache: a VerifyReader, a PromptReader or a SharedKV of readers.py.

    turns: how RoPE turns its tokens; arithmetic: who computes what mixes a token's channels.
    """

    arithmetic: Arithmetic
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
        turn = reader.turns.of(self._layer)
        queries, block = attention_heads(
            self._project(x, reader), self._norm_weights(), turn, self._eps
        )
        out = reader.source(self._layer, block).attend(queries)
        (out,) = reader.arithmetic.project(
            out.swapaxes(1, 2).reshape(*x.shape[:2], -1), self.o_proj
        )
        return out

    def _project(self, x: mx.array, reader: Reader) -> list[mx.array]:
        """Raw queries, keys and values, [B, L, heads * D]; only queries if K/V are shared."""
        if not self._layer.owns_kv:
            return reader.arithmetic.project(x, self.q_proj)
        if self._layer.k_eq_v:
            queries, keys = reader.arithmetic.project(x, self.q_proj, self.k_proj)
            return [queries, keys, keys]
        return reader.arithmetic.project(x, self.q_proj, self.k_proj, self.v_proj)

    def _norm_weights(self) -> list[mx.array]:
        if not self._layer.owns_kv:
            return [self.q_norm.weight]
        return [self.q_norm.weight, self.k_norm.weight]


class MLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array, arithmetic: Arithmetic) -> mx.array:
        """x: [..., E] -> [..., E]."""
        inner = arithmetic.gated(x, self.gate_proj, self.up_proj)
        return arithmetic.project(inner, self.down_proj)[0]


class Router(nn.Module):
    """Chooses experts; see kernels/route.py."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))


class SwitchGLU(nn.Module):
    """One gated feed-forward per expert; weights [experts, out, in]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate_proj = SwitchLinear(width, inner, count, bias=False)
        self.up_proj = SwitchLinear(width, inner, count, bias=False)
        self.down_proj = SwitchLinear(inner, width, count, bias=False)


class Experts(nn.Module):
    """The experts a router chooses from."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.switch_glu = SwitchGLU(config)


class Stream(NamedTuple):
    """What goes from layer to layer: the hidden state, and the same after the next one's norm."""

    h: mx.array  # [B, L, E]
    normed: mx.array


class DecoderLayer(nn.Module):
    """Attention and feed-forward, normed before and after; experts and per-layer inputs if any."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self._eps = eps
        self._moe, self._top_k = config.num_experts > 0, config.top_k_experts
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
        self,
        stream: Stream,
        reader: Reader,
        next_norm: nn.RMSNorm,
        per_layer_input: mx.array | None = None,
    ) -> Stream:
        """Run the layer. next_norm: of what comes after it; per_layer_input: [B, L, P]."""
        attended = self.self_attn(stream.normed, reader)
        norms = [self.pre_feedforward_layernorm]
        if self._moe:
            norms.append(self.pre_feedforward_layernorm_2)
        after = self.post_attention_layernorm
        h, normed = self._add(stream.h, [attended], [after], norms)
        added = [self.mlp(normed[0], reader.arithmetic)]
        norms = [self.post_feedforward_layernorm]
        if self._moe:
            added.append(self._experts(h, normed[1], reader.arithmetic))
            norms += [self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2]
        if per_layer_input is not None:
            h, _ = self._add(h, added, norms, [])
            gate = self.per_layer_input_gate
            gated = reader.arithmetic.gated_by(h, gate, per_layer_input)
            added = reader.arithmetic.project(gated, self.per_layer_projection)
            norms = [self.post_per_layer_input_norm]
        h, normed = self._add(h, added, norms, [next_norm], self.layer_scalar)
        return Stream(h, normed[0])

    def _experts(self, h: mx.array, normed: mx.array, arithmetic: Arithmetic) -> mx.array:
        router = self.router
        chosen, weights = route(
            h, router.proj, router.scale, router.per_expert_scale, self._top_k, self._eps
        )
        glu = self.experts.switch_glu
        return arithmetic.experts(
            normed, chosen, weights, glu.gate_proj, glu.up_proj, glu.down_proj
        )

    def _add(
        self,
        h: mx.array,
        added: Sequence[mx.array],
        norms: Sequence[nn.RMSNorm],
        nexts: Sequence[nn.RMSNorm],
        scalar: mx.array | None = None,
    ) -> tuple[mx.array, list[mx.array]]:
        """residual_norm, with the weights of these norms."""
        weights, next_weights = [n.weight for n in norms], [n.weight for n in nexts]
        return residual_norm(h, added, weights, scalar, next_weights, self._eps)
