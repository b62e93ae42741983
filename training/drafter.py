"""The drafter as a lean torch module: Gemma 4's assistant at one small size, for training.

Row n of a window drafts the tokens after x[n]: its input is the target's embedding of x[n] and
the target's post-norm hidden state at n - 1, its query position is n in every step, and it
attends to the target's keys 0..n-1 (the last W + 1 of them in sliding layers). All rows run at
once: the keys are shifted by one place, so that "0..n-1" becomes causal. Row 0 has no keys; it
sees a zero row and is never used. Parameter names and results equal transformers'
Gemma4AssistantForCausalLM.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.target import (
    FULL,
    MLP,
    SLIDING,
    Memory,
    Place,
    RMSNorm,
    Size,
    Target,
    banded_attention,
    full_attention,
    rope_table,
    rotate,
)

DRAFTER_SIZE = Size(hidden=160, intermediate=448, layer_types=(SLIDING, FULL))
EMBEDDING_SHARE = 0.3


class Shared(NamedTuple):
    """The target's keys and values [B, T, D] of one layer type, shifted one place later."""

    key: Tensor
    value: Tensor


def shared_of(memory: Memory) -> dict[str, Shared]:
    """Shift the target's keys and values by one place, a zero row first."""
    shifted = [
        {kind: F.pad(x, (0, 0, 1, 0))[:, :-1] for kind, x in states.items()}
        for states in (memory.keys, memory.values)
    ]
    return {kind: Shared(shifted[0][kind], shifted[1][kind]) for kind in memory.keys}


def drafter_places(size: Size, length: int) -> dict[str, Place]:
    """Return the drafter's Place by layer type: all shifted keys, or the last W + 1."""
    full = torch.ones(length, length, dtype=torch.bool).tril()
    full[1:, 0] = False
    n, i, j = (length // size.window, torch.arange(size.window), torch.arange(2 * size.window))
    q, k = i[:, None] + size.window, j[None, :]
    band = (k <= q) & (k >= q - size.window)
    position = torch.arange(n)[:, None, None] * size.window + k - size.window
    masks = {SLIDING: band & (position >= 1), FULL: full}
    masks[SLIDING][0, 0, size.window] = True
    return {t: Place(*rope_table(length, size.dim(t), t), m) for t, m in masks.items()}


class QueryAttention(nn.Module):
    """Queries of the drafter over the target's keys and values."""

    def __init__(self, size: Size, layer_type: str) -> None:
        super().__init__()
        self.heads, self.dim = size.heads, size.dim(layer_type)
        self.attend = banded_attention if layer_type == SLIDING else full_attention
        self.q_proj = nn.Linear(size.hidden, size.heads * self.dim, bias=False)
        self.o_proj = nn.Linear(size.heads * self.dim, size.hidden, bias=False)
        self.q_norm = RMSNorm(self.dim, size.eps)

    def forward(self, x: Tensor, place: Place, shared: Shared) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.dim)).transpose(1, 2)
        q = rotate(q, place.cos, place.sin)
        out = self.attend(q, shared.key, shared.value, place.mask)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class QueryLayer(nn.Module):
    """Attention over the target's memory and MLP, each between two norms."""

    def __init__(self, size: Size, layer_type: str) -> None:
        super().__init__()
        self.self_attn = QueryAttention(size, layer_type)
        self.mlp = MLP(size)
        self.input_layernorm = RMSNorm(size.hidden, size.eps)
        self.post_attention_layernorm = RMSNorm(size.hidden, size.eps)
        self.pre_feedforward_layernorm = RMSNorm(size.hidden, size.eps)
        self.post_feedforward_layernorm = RMSNorm(size.hidden, size.eps)
        self.layer_scalar = nn.Buffer(torch.ones(1))

    def forward(self, x: Tensor, place: Place, shared: Shared) -> Tensor:
        out = self.self_attn(self.input_layernorm(x), place, shared)
        x = x + self.post_attention_layernorm(out)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar


class QueryDecoder(nn.Module):
    """Tied head, query layers and final norm: the part transformers names `model`."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocab, size.hidden)
        self.layers = nn.ModuleList(QueryLayer(size, kind) for kind in size.layer_types)
        self.norm = RMSNorm(size.hidden, size.eps)


class Drafter(nn.Module):
    """The drafter; `step` is one draft step of every row."""

    def __init__(self, size: Size, backbone: int) -> None:
        super().__init__()
        self.size = size
        self.model = QueryDecoder(size)
        self.pre_projection = nn.Linear(2 * backbone, size.hidden, bias=False)
        self.post_projection = nn.Linear(size.hidden, backbone, bias=False)

    @torch.no_grad()
    def initialise(self, target: Target, hidden: Tensor) -> None:
        """Start as the target's head at the drafter's width, the best cut for these hidden states.

        The best rank-r factors of the logits E h over states h with second moment C = S S are
        those of the singular value decomposition of E S: E h ~ (E A)(B h), A = S V, B = V^T S^-1.
        """
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
            elif "layernorm" in name and "post_" in name:
                weight.fill_(0.5)
        head = target.model.embed_tokens.weight
        states = hidden.flatten(0, 1)
        values, vectors = torch.linalg.eigh(states.T @ states / len(states))
        root = values.clamp(min=1e-4 * values.max().item()).sqrt()
        spread = vectors * root @ vectors.T
        basis = torch.linalg.svd(head @ spread, full_matrices=False).Vh[: self.size.hidden]
        widen = spread @ basis.T
        narrow = basis @ (vectors / root @ vectors.T)
        self.model.embed_tokens.weight.copy_(head @ widen)
        self.post_projection.weight.copy_(widen)
        self.pre_projection.weight.copy_(torch.cat([EMBEDDING_SHARE * narrow, narrow], dim=1))

    def step(
        self, embedded: Tensor, hidden: Tensor, shared: dict[str, Shared], by_type: dict[str, Place]
    ) -> tuple[Tensor, Tensor]:
        """Draft once: return the post-norm state [B, T, hidden] and the fed-back one [B, T, E]."""
        x = self.pre_projection(torch.cat([embedded, hidden], dim=-1))
        for layer, kind in zip(self.model.layers, self.size.layer_types, strict=True):
            x = layer(x, by_type[kind], shared[kind])
        x = self.model.norm(x)
        return x, self.post_projection(x)

    def logits(self, state: Tensor) -> Tensor:
        """Return the logits of post-norm states; no softcap."""
        return state @ self.model.embed_tokens.weight.T

    def loss(self, state: Tensor, probs: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted mean of half CE to the target's argmax, half to its distribution."""
        logprobs = F.log_softmax(self.logits(state), dim=-1)
        soft = -(probs * logprobs).sum(-1)
        hard = -logprobs.gather(-1, choice[..., None])[..., 0]
        return ((hard + soft) / 2 * weight).sum() / weight.sum()

    def compile_parts(self) -> None:
        """Compile one layer of each type and the loss."""
        for layer in self.model.layers:
            layer.compile()
        self.loss = torch.compile(self.loss)
