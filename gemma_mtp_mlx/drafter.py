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
from gemma_mtp_mlx.kernels.centroid_head import CentroidHead, centroid_candidates, centroid_head
from gemma_mtp_mlx.kernels.token_head import head_logits, token_head
from gemma_mtp_mlx.layers import DecoderLayer, Reader, Stream
from gemma_mtp_mlx.sampling import Sampling

# tokens [B, 1] and hidden states [B, 1, E] -> the target's scaled embedding beside them, [B, 1, 2E]
Embed = Callable[[mx.array, mx.array], mx.array]


class Candidates(NamedTuple):
    """What a draft step chooses from.

    logits: [B, N] float32; ids: [B, N] the tokens they belong to, or None for all in order.
    """

    logits: mx.array
    ids: mx.array | None


Draw = Callable[[mx.array, int], mx.array]  # hidden states [B, width], step -> tokens [B]


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
        self, tokens: mx.array, hidden: mx.array, shared: Reader, embed: Embed, draw: Draw, k: int
    ) -> mx.array:
        """Propose k tokens per row.

        tokens: [B] the bonus tokens; hidden: [B, E] the target's hidden state after its final norm
        at the position before them. Returns: [B, k] int32.
        """
        drafts = []
        for step in range(k):
            h, hidden = self.step(embed(tokens[:, None], hidden[:, None]), shared)
            tokens = draw(h, step)
            drafts.append(tokens)
        return mx.stack(drafts, axis=1)

    def step(self, fed: mx.array, shared: Reader) -> tuple[mx.array, mx.array]:
        """Run one step. fed: [B, 1, 2E], the token's embedding and the hidden state before it.

        Returns: the hidden state to draw from, [B, width], and to feed back, [B, E].
        """
        arithmetic, layers = shared.arithmetic, self.model.layers
        (h,) = arithmetic.project(fed, self.pre_projection)
        stream = Stream(h, layers[0].input_layernorm(h))
        norms = [*(layer.input_layernorm for layer in layers[1:]), self.model.norm]
        for layer, norm in zip(layers, norms, strict=True):
            stream = layer(stream, shared, norm)
        (back,) = arithmetic.project(stream.normed, self.post_projection)
        return stream.normed[:, 0], back[:, 0]

    def choose(self, h: mx.array, sampling: Sampling, positions: mx.array) -> mx.array:
        """Draw from the logits of h [B, width], unfiltered, at positions [B, 1]: [B]."""
        head = self.model.embed_tokens
        if not self.config.use_ordered_embeddings:
            return token_head(h[:, None], head, None, sampling, positions)[:, 0]
        return centroid_head(h, self._centroids(), sampling, positions[:, 0])

    def candidates(self, h: mx.array) -> Candidates:
        """h: [B, width] -> every token, or those of the best centroids."""
        head = self.model.embed_tokens
        if not self.config.use_ordered_embeddings:
            return Candidates(head_logits(h, head, None), None)
        return Candidates(*centroid_candidates(h, self._centroids()))

    def _centroids(self) -> CentroidHead:
        head = self.masked_embedding
        count = self.config.centroid_intermediate_top_k
        return CentroidHead(head.centroids, head.token_ordering, self.model.embed_tokens, count)
