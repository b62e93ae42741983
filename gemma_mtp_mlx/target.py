"""The target: a Gemma 4 text model that runs prompts and verifies drafts.

Parameter names are mlx_lm's, so a folder written for it loads without renaming.
Source: transformers Gemma4TextModel, Gemma4ForCausalLM.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.kernels.arithmetic import Arithmetic
from gemma_mtp_mlx.kernels.embed_tokens import embed_tokens
from gemma_mtp_mlx.kernels.per_layer_inputs import per_layer_inputs
from gemma_mtp_mlx.kernels.token_head import head_logits, token_head
from gemma_mtp_mlx.layers import DecoderLayer, Reader, Stream
from gemma_mtp_mlx.readers import PromptReader
from gemma_mtp_mlx.sampling import Sampling


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

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations: the norms', whatever weights and scales are stored in."""
        return self.norm.weight.dtype

    def embed(self, tokens: mx.array, beside: mx.array | None = None) -> mx.array:
        """tokens: [B, L] -> [B, L, E], scaled by sqrt(E); [B, L, 2E] with what is put beside."""
        scale = self._config.hidden_size**0.5
        return embed_tokens(self.embed_tokens, tokens, scale, beside, self.dtype)

    def begin(
        self, tokens: mx.array, arithmetic: Arithmetic
    ) -> tuple[Stream, Sequence[mx.array | None]]:
        """tokens: [B, L] -> what the first layer takes, and one [B, L, P] or None per layer."""
        h = self.embed(tokens)
        inputs = self._per_layer_inputs(tokens, h, arithmetic)
        return Stream(h, self.layers[0].input_layernorm(h)), inputs

    def norm_after(self, layer: int) -> nn.RMSNorm:
        """Return the norm of what follows a layer."""
        if layer + 1 < len(self.layers):
            return self.layers[layer + 1].input_layernorm
        return self.norm

    def _per_layer_inputs(
        self, tokens: mx.array, embedding: mx.array, arithmetic: Arithmetic
    ) -> Sequence[mx.array | None]:
        config = self._config
        if not config.hidden_size_per_layer_input:
            return [None] * len(self.layers)
        (context,) = arithmetic.project(embedding, self.per_layer_model_projection)
        by_token = embed_tokens(self.embed_tokens_per_layer, tokens, None, None, self.dtype)
        weight = self.per_layer_projection_norm.weight
        return per_layer_inputs(context, by_token, weight, config.hidden_size, config.rms_norm_eps)


class Target(nn.Module):
    """A Gemma 4 text model. Its language model head is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations, and so of keys and values."""
        return self.model.dtype

    def embed(self, tokens: mx.array, beside: mx.array) -> mx.array:
        """What a drafter reads: tokens' [B, L] scaled embeddings, and beside them [B, L, E]."""
        return self.model.embed(tokens, beside)

    def verify(self, tokens: mx.array, reader: Reader) -> mx.array:
        """Run a block. tokens: [B, L]. Returns the hidden state after the final norm [B, L, E]."""
        stream, inputs = self.model.begin(tokens, reader.arithmetic)
        return self._run(range(len(inputs)), stream, reader, inputs).normed

    def prefill(self, tokens: mx.array, reader: PromptReader, *, last: bool) -> mx.array | None:
        """Run a prompt chunk. tokens: [1, T].

        Layers that share keys and values matter for the prompt's last position only: they are
        skipped in every chunk but the last, and there run on one position.
        Returns: the hidden state after the final norm at the last position, [1, E]; None if not
        the last chunk.
        """
        stream, inputs = self.model.begin(tokens, reader.arithmetic)
        owners = self.config.num_owning_layers
        stream = self._run(range(owners), stream, reader, inputs)
        if not last:
            return None
        end = reader.at_end(tokens.shape[1])
        stream = Stream(*(x[:, -1:] for x in stream))
        trimmed = [None if x is None else x[:, -1:] for x in inputs]
        return self._run(range(owners, len(inputs)), stream, end, trimmed).normed[:, 0]

    def _run(
        self,
        layers: range,
        stream: Stream,
        reader: Reader,
        inputs: Sequence[mx.array | None],
    ) -> Stream:
        for i in layers:
            stream = self.model.layers[i](stream, reader, self.model.norm_after(i), inputs[i])
        return stream

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden: [..., E] after the final norm -> float32 logits [..., V], softcapped."""
        return head_logits(hidden, self.model.embed_tokens, self.config.final_logit_softcapping)

    def choose(self, hidden: mx.array, sampling: Sampling, positions: mx.array) -> mx.array:
        """Draw from the logits of hidden [B, L, E], unfiltered, at positions [B, L]: [B, L]."""
        cap = self.config.final_logit_softcapping
        return token_head(hidden, self.model.embed_tokens, cap, sampling, positions)
