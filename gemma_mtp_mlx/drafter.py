"""The drafter (Gemma 4 "assistant"): proposes tokens from the target's own state.

A few query-only layers read the target's committed keys and values; each step takes the last
token's target embedding and a hidden state (the target's after its final norm first, then its own
output projected back) at one constant position, that of the bonus token.
Source: transformers Gemma4AssistantForCausalLM, SinglePositionMultiTokenCandidateGenerator.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.config import DrafterConfig
from gemma_mtp_mlx.layers import DecoderLayer
from gemma_mtp_mlx.readers import SharedKV

Embed = Callable[[mx.array], mx.array]  # tokens [B, 1] -> the target's scaled embedding [B, 1, E]


class Candidates(NamedTuple):
    """What a draft step chooses from.

    logits: [B, N] float32; ids: [B, N] the tokens they belong to, or None for all in order.
    """

    logits: mx.array
    ids: mx.array | None


Draw = Callable[[Candidates, int], mx.array]  # candidates, step -> tokens [B]


class _Model(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        text = config.text
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = [DecoderLayer(text, layer) for layer in text.layers]
        self.norm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)


class _MaskedEmbedding(nn.Module):
    """Centroids and, per centroid, the tokens that belong to it."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.centroids = nn.Linear(config.text.hidden_size, config.num_centroids, bias=False)
        self.token_ordering = mx.zeros((config.text.vocab_size,), mx.int32)


class Drafter(nn.Module):
    """A Gemma 4 assistant."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        width, backbone = config.text.hidden_size, config.backbone_hidden_size
        self.model = _Model(config)
        self.pre_projection = nn.Linear(2 * backbone, width, bias=False)
        self.post_projection = nn.Linear(width, backbone, bias=False)
        if config.use_ordered_embeddings:
            self.masked_embedding = _MaskedEmbedding(config)

    def draft(
        self, tokens: mx.array, hidden: mx.array, shared: SharedKV, embed: Embed, draw: Draw, k: int
    ) -> mx.array:
        """Propose k tokens per row.

        tokens: [B] the bonus tokens; hidden: [B, E] the target's hidden state after its final norm
        at the position before them. Returns: [B, k] int32.
        """
        drafts = []
        for step in range(k):
            candidates, hidden = self.step(embed(tokens[:, None]), hidden, shared)
            tokens = draw(candidates, step)
            drafts.append(tokens)
        return mx.stack(drafts, axis=1)

    def step(
        self, embedding: mx.array, hidden: mx.array, shared: SharedKV
    ) -> tuple[Candidates, mx.array]:
        """Run one step. embedding: [B, 1, E], hidden: [B, E]. Returns candidates and [B, E]."""
        h = self.pre_projection(mx.concatenate([embedding, hidden[:, None]], axis=-1))
        for layer in self.model.layers:
            h = layer(h, shared)
        h = self.model.norm(h)[:, 0]
        return self._candidates(h), self.post_projection(h)

    def _candidates(self, h: mx.array) -> Candidates:
        """h: [B, width] -> every token, or those of the best centroids."""
        if not self.config.use_ordered_embeddings:
            return Candidates(self.model.embed_tokens.as_linear(h).astype(mx.float32), None)
        head, count = self.masked_embedding, self.config.centroid_intermediate_top_k
        best = mx.argpartition(-head.centroids(h), count - 1, axis=-1)[:, :count]
        groups = head.token_ordering.reshape(self.config.num_centroids, -1)
        ids = groups[best].reshape(h.shape[0], -1)
        logits = (self.model.embed_tokens(ids) @ h[..., None])[..., 0]
        return Candidates(logits.astype(mx.float32), ids)
