"""The target as a lean torch module: Gemma 4's text model at one small size, for training.

Parameter names and results equal transformers' Gemma4ForCausalLM (`training.export` checks
both). Only what this size needs is here: one K/V head, no per-layer embeddings, no experts, no
shared layers. Dimensions: B rows, T positions, H query heads, D head dim, E model width, V
vocabulary, W window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLIDING, FULL = "sliding_attention", "full_attention"
ROPE_THETA = {SLIDING: 10_000.0, FULL: 1_000_000.0}
FULL_ROTARY_FACTOR = 0.25


@dataclass(frozen=True, slots=True)
class Size:
    """The dimensions of a target or of a drafter's decoder."""

    hidden: int = 192
    intermediate: int = 512
    layer_types: Sequence[str] = (*[SLIDING] * 5, FULL) * 2
    heads: int = 4
    head_dim: int = 48
    global_head_dim: int = 96
    vocab: int = 4096
    window: int = 128
    softcap: float = 30.0
    eps: float = 1e-6

    def dim(self, layer_type: str) -> int:
        """Return the head dim of a layer of this type."""
        return self.head_dim if layer_type == SLIDING else self.global_head_dim


class Memory(NamedTuple):
    """What the target hands to a drafter: post-norm hidden [B, T, E] and K/V [B, T, D] by type."""

    hidden: Tensor
    keys: dict[str, Tensor]
    values: dict[str, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.eps) * self.weight


def rms(x: Tensor, eps: float) -> Tensor:
    """Scale the last axis to unit root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rope_table(length: int, dim: int, layer_type: str) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T, D] for positions 0..T-1; full layers rotate a quarter of the pairs."""
    rates = ROPE_THETA[layer_type] ** -(torch.arange(0, dim, 2).float() / dim)
    if layer_type == FULL:
        rates[int(FULL_ROTARY_FACTOR * dim // 2) :] = 0.0
    angles = torch.outer(torch.arange(length).float(), rates)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to [..., T, D] in the half-split layout."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend [B, H, T, D] over one K/V head [B, T, D] under a boolean mask [T, T]."""
    B, H, T, D = q.shape
    scores = (q.reshape(B, H * T, D) @ k.mT).view(B, H, T, T)
    probs = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (probs.reshape(B, H * T, T) @ v).view(B, H, T, D)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend in blocks of W positions, each over its own block and the one before.

    q: [B, H, T, D]; k, v: [B, T, D]; mask: [n, W, 2W] with T = n W.
    """
    B, H, T, D = q.shape
    n, window, _ = mask.shape
    q = q.view(B, H, n, window, D).transpose(1, 2).reshape(B * n, H * window, D)
    scores = (q @ two_blocks(k, window).mT).view(B, n, H, window, 2 * window)
    probs = scores.masked_fill(~mask[None, :, None], -torch.inf).softmax(-1)
    out = probs.view(B * n, H * window, 2 * window) @ two_blocks(v, window)
    return out.view(B, n, H, window, D).transpose(1, 2).reshape(B, H, T, D)


def two_blocks(x: Tensor, window: int) -> Tensor:
    """Return [B * n, 2W, D]: every block of W rows behind the block before it (zeros first)."""
    B, T, D = x.shape
    x = x.view(B, T // window, window, D)
    before = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat([before, x], dim=2).view(-1, 2 * window, D)


class Place(NamedTuple):
    """What a layer type needs besides weights: rotary cos and sin [T, D] and its mask."""

    cos: Tensor
    sin: Tensor
    mask: Tensor


def places(size: Size, length: int) -> dict[str, Place]:
    """Return the target's Place by layer type: causal, and the last W keys in sliding layers."""
    full = torch.ones(length, length, dtype=torch.bool).tril()
    n, i, j = (length // size.window, torch.arange(size.window), torch.arange(2 * size.window))
    q, k = i[:, None] + size.window, j[None, :]
    band = (k <= q) & (k > q - size.window)
    exists = torch.arange(n)[:, None, None] + k // size.window >= 1
    masks = {SLIDING: band & exists, FULL: full}
    return {t: Place(*rope_table(length, size.dim(t), t), m) for t, m in masks.items()}


class MLP(nn.Module):
    """down(gelu_tanh(gate) * up)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.down_proj = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Attention(nn.Module):
    """One layer's projections; returns the output with its keys and values."""

    def __init__(self, size: Size, layer_type: str) -> None:
        super().__init__()
        self.heads, self.eps, self.dim = size.heads, size.eps, size.dim(layer_type)
        self.attend = banded_attention if layer_type == SLIDING else full_attention
        self.q_proj = nn.Linear(size.hidden, size.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(size.hidden, self.dim, bias=False)
        self.v_proj = nn.Linear(size.hidden, self.dim, bias=False)
        self.o_proj = nn.Linear(size.heads * self.dim, size.hidden, bias=False)
        self.q_norm = RMSNorm(self.dim, size.eps)
        self.k_norm = RMSNorm(self.dim, size.eps)

    def forward(self, x: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.dim)).transpose(1, 2)
        q = rotate(q, place.cos, place.sin)
        k = rotate(self.k_norm(self.k_proj(x)), place.cos, place.sin)
        v = rms(self.v_proj(x), self.eps)
        out = self.attend(q, k, v, place.mask)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1)), k, v


class Layer(nn.Module):
    """Attention and MLP, each between two norms, around the residual."""

    def __init__(self, size: Size, layer_type: str) -> None:
        super().__init__()
        self.self_attn = Attention(size, layer_type)
        self.mlp = MLP(size)
        self.input_layernorm = RMSNorm(size.hidden, size.eps)
        self.post_attention_layernorm = RMSNorm(size.hidden, size.eps)
        self.pre_feedforward_layernorm = RMSNorm(size.hidden, size.eps)
        self.post_feedforward_layernorm = RMSNorm(size.hidden, size.eps)
        self.layer_scalar = nn.Buffer(torch.ones(1))

    def forward(self, x: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        out, k, v = self.self_attn(self.input_layernorm(x), place)
        x = x + self.post_attention_layernorm(out)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar, k, v


class Decoder(nn.Module):
    """Embedding, layers and final norm: the part transformers names `model`."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocab, size.hidden)
        self.layers = nn.ModuleList(Layer(size, kind) for kind in size.layer_types)
        self.norm = RMSNorm(size.hidden, size.eps)


class Target(nn.Module):
    """The language model: ids [B, T] to softcapped logits [B, T, V]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.model = Decoder(size)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Set the initial weights: the final logits start near zero and layers start small."""
        for name, weight in self.named_parameters():
            if "embed_tokens" in name:
                nn.init.normal_(weight, std=0.5 * self.size.hidden**-0.5)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
            elif "layernorm" in name and "post_" in name:
                weight.fill_(1.5 * (2 * len(self.size.layer_types)) ** -0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the scaled embeddings, which a drafter receives too."""
        return self.model.embed_tokens(ids) * self.size.hidden**0.5

    def memory(self, ids: Tensor) -> Memory:
        """Run the layers; T must be a multiple of the window."""
        x = self.embed(ids)
        by_type = places(self.size, ids.shape[1])
        keys: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for layer, kind in zip(self.model.layers, self.size.layer_types, strict=True):
            x, keys[kind], values[kind] = layer(x, by_type[kind])
        return Memory(self.model.norm(x), keys, values)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the softcapped logits of post-norm hidden states."""
        raw = hidden @ self.model.embed_tokens.weight.T
        return torch.tanh(raw / self.size.softcap) * self.size.softcap

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.memory(ids).hidden)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy of labels [B, T] given post-norm hidden states."""
        return F.cross_entropy(self.logits(hidden).flatten(0, 1), labels.flatten())

    def compile_parts(self) -> None:
        """Compile one layer of each type and the loss: a minute, where the whole takes many."""
        for layer in self.model.layers:
            layer.compile()
        self.loss = torch.compile(self.loss)
