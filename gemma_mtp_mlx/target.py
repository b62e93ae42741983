"""The target: a Gemma 4 text model that runs prompts and verifies drafts.

Parameter names are mlx_lm's, so a folder written for it loads without renaming.
Source: transformers Gemma4TextModel, Gemma4ForCausalLM.
"""

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.device import fused
from gemma_mtp_mlx.layers import DecoderLayer
from gemma_mtp_mlx.readers import PromptReader, VerifyReader


class TextModel(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = [DecoderLayer(config, layer) for layer in config.layers]
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        if config.hidden_size_per_layer_input:
            inner = len(config.layers) * config.hidden_size_per_layer_input
            self.embed_tokens_per_layer = nn.Embedding(config.vocab_size_per_layer_input, inner)
            self.per_layer_model_projection = nn.Linear(width, inner, bias=False)
            self.per_layer_projection_norm = nn.RMSNorm(
                config.hidden_size_per_layer_input, eps=config.rms_norm_eps
            )

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens: [..., L] -> [..., L, E], scaled by sqrt(E) in the weights' dtype."""
        embedding = self.embed_tokens(tokens)
        return embedding * mx.array(self._config.hidden_size**0.5, embedding.dtype)

    def per_layer_inputs(self, tokens: mx.array, embedding: mx.array) -> list[mx.array | None]:
        """One [B, L, P] per layer, from the token and from its embedding; None where unused."""
        size, count = self._config.hidden_size_per_layer_input, len(self._config.layers)
        if not size:
            return [None] * count
        by_token = self.embed_tokens_per_layer(tokens)
        by_token = by_token * mx.array(size**0.5, by_token.dtype)
        context = self.per_layer_model_projection(embedding) * self._config.hidden_size**-0.5
        context = self.per_layer_projection_norm(context.reshape(*tokens.shape, count, size))
        inputs = (context + by_token.reshape(*tokens.shape, count, size)) * 2.0**-0.5
        return [inputs[:, :, i] for i in range(count)]


class Target(nn.Module):
    """A Gemma 4 text model. Its language model head is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations, and so of keys and values."""
        return self.model.norm.weight.dtype

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens: [..., L] -> scaled embedding [..., L, E]: also a drafter's input."""
        return self.model.embed(tokens)

    def verify(self, tokens: mx.array, reader: VerifyReader) -> mx.array:
        """Run a block. tokens: [B, L]. Returns the hidden state after the final norm [B, L, E]."""
        h = self.model.embed(tokens)
        inputs = self.model.per_layer_inputs(tokens, h)
        for layer, per_layer_input in zip(self.model.layers, inputs, strict=True):
            h = layer(h, reader, per_layer_input)
        return self.model.norm(h)

    def prefill(self, tokens: mx.array, reader: PromptReader, *, last: bool) -> mx.array | None:
        """Run a prompt chunk. tokens: [1, T].

        Layers that share keys and values matter for the prompt's last position only: they are
        skipped in every chunk but the last, and there run on one position.
        Returns: the hidden state after the final norm at the last position, [1, E]; None if not
        the last chunk.
        """
        h = self.model.embed(tokens)
        inputs = self.model.per_layer_inputs(tokens, h)
        owners = self.config.num_owning_layers
        for layer, per_layer_input in zip(self.model.layers[:owners], inputs, strict=False):
            h = layer(h, reader, per_layer_input)
        if not last:
            return None
        h = h[:, -1:]
        end = reader.at_end(tokens.shape[1])
        for layer, per_layer_input in zip(self.model.layers[owners:], inputs[owners:], strict=True):
            trimmed = None if per_layer_input is None else per_layer_input[:, -1:]
            h = layer(h, end, trimmed)
        return self.model.norm(h)[:, 0]

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden: [..., E] after the final norm -> float32 logits [..., V], softcapped."""
        logits = self.model.embed_tokens.as_linear(hidden).astype(mx.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else _softcap(logits, cap)


@fused
def _softcap(logits: mx.array, cap: float) -> mx.array:
    return mx.tanh(logits / cap) * cap
