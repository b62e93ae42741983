"""A GGUF file's metadata as config.json of a gemma4_text target, in the published layout.

What llama.cpp writes per layer (key/value heads, MLP widths, the sliding pattern) is folded back
into the published facts; a file whose layers cannot be said that way is refused. Its metadata has
no key for the share of a full layer's head that is rotated: that is in the tensor rope_freqs, one
divisor per pair of entries, 1 where it rotates and 1e30 where it does not.
Source: llama.cpp, conversion/gemma.py (Gemma4Model) and src/models/gemma4.cpp.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mtp_mlx.config import FULL, SLIDING
from gemma_mtp_mlx.convert.gguf_header import Entry

ARCHITECTURE = "gemma4"
_STANDS_STILL = 1e20  # llama.cpp writes 1e30


@dataclass(frozen=True, slots=True)
class _Metadata:
    """The metadata under the architecture's keys, and the file it is blamed on."""

    file: Path
    values: dict[str, Any]

    def get(self, key: str) -> Any:
        return self.values.get(f"{ARCHITECTURE}.{key}")

    def wrong(self, key: str, expected: str) -> ValueError:
        said = "nothing" if self.get(key) is None else repr(self.get(key))[:80].replace("\n", " ")
        return ValueError(
            f"{self.file} says {said} for {ARCHITECTURE}.{key}, expected {expected}; "
            "convert the model again with a current llama.cpp"
        )

    def integer(self, key: str, least: int = 1) -> int:
        value = self.get(key)
        if type(value) is not int or value < least:
            raise self.wrong(key, f"a whole number from {least}")
        return value

    def optional(self, key: str) -> int:
        """Return a count that may be absent, which means 0."""
        return 0 if self.get(key) is None else self.integer(key, 0)

    def positive(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, float | int) or not 0 < value < math.inf:
            raise self.wrong(key, "a positive number")
        return float(value)

    def per_layer(self, key: str, layers: int) -> list[int]:
        """Return one number per layer, of an array or of one number for all."""
        value = self.get(key)
        if not isinstance(value, np.ndarray):
            return [self.integer(key)] * layers
        if value.dtype.kind not in "iub" or value.shape != (layers,):
            raise self.wrong(key, f"{layers} whole numbers")
        return [int(item) for item in value]


def text_config(
    file: Path, values: dict[str, Any], tensors: dict[str, Entry], divisors: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Return config.json without token ids and quantisation. divisors: the tensor rope_freqs.

    Raises: ValueError naming the file and the key for anything missing, or not of this layout.
    """
    said = _Metadata(file, values)
    layers = said.integer("block_count")
    if layers > len(tensors):
        raise said.wrong("block_count", f"no more than its {len(tensors)} tensors")
    sliding = said.per_layer("attention.sliding_window_pattern", layers)
    heads = said.per_layer("attention.head_count", layers)
    if len(set(heads)) > 1:
        raise said.wrong("attention.head_count", "the same number in every layer")
    if all(sliding) or not any(sliding):
        raise said.wrong("attention.sliding_window_pattern", "layers of both kinds")
    softcap = said.get("final_logit_softcapping")
    ple = said.optional("embedding_length_per_layer_input")
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "attention_bias": False,
        "dtype": "bfloat16",
        "final_logit_softcapping": (
            None if softcap is None else said.positive("final_logit_softcapping")
        ),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": said.integer("embedding_length"),
        "hidden_size_per_layer_input": ple,
        "layer_types": [SLIDING if slides else FULL for slides in sliding],
        "max_position_embeddings": said.integer("context_length"),
        "model_type": "gemma4_text",
        "num_attention_heads": heads[0],
        "num_hidden_layers": layers,
        "rms_norm_eps": said.positive("attention.layer_norm_rms_epsilon"),
        "sliding_window": said.integer("attention.sliding_window"),
        "tie_word_embeddings": True,
        "vocab_size": _rows(file, tensors, "token_embd.weight"),
        "vocab_size_per_layer_input": (
            _rows(file, tensors, "per_layer_token_embd.weight") if ple else 0
        ),
        **_attention(said, sliding, tensors),
        **_rope(said, divisors),
        **_mlp(said, layers),
    }


def _rows(file: Path, tensors: dict[str, Entry], name: str) -> int:
    if name not in tensors:
        raise ValueError(f"{file} has no tensor {name}; it is not a whole Gemma 4 target")
    return tensors[name].shape[0]


def _attention(said: _Metadata, sliding: list[int], tensors: dict[str, Entry]) -> dict[str, Any]:
    layers, shared = len(sliding), said.optional("attention.shared_kv_layers")
    if shared >= layers:
        raise said.wrong("attention.shared_kv_layers", f"less than its {layers} layers")
    kv_heads = said.per_layer("attention.head_count_kv", layers)
    by_kind: dict[bool, set[int]] = {True: set(), False: set()}
    for slides, heads in zip(sliding, kv_heads, strict=True):
        by_kind[bool(slides)].add(heads)
    if any(len(numbers) != 1 for numbers in by_kind.values()):
        raise said.wrong("attention.head_count_kv", "one number for each kind of layer")
    # Where a full layer has no values of its own, its keys are its values.
    k_eq_v = {
        f"blk.{layer}.attn_v.weight" not in tensors
        for layer, slides in enumerate(sliding[: layers - shared])
        if not slides
    }
    if len(k_eq_v) != 1:
        raise ValueError(
            f"{said.file} has attn_v in some of its full layers only; it is not a Gemma 4 target"
        )
    (alone,) = k_eq_v
    if not alone and by_kind[True] != by_kind[False]:
        raise said.wrong("attention.head_count_kv", "one number where full layers have values")
    return {
        "attention_k_eq_v": alone,
        "global_head_dim": _head_dim(said, "length"),
        "head_dim": _head_dim(said, "length_swa"),
        "num_global_key_value_heads": by_kind[False].pop() if alone else None,
        "num_key_value_heads": by_kind[True].pop(),
        "num_kv_shared_layers": shared,
    }


def _head_dim(said: _Metadata, key: str) -> int:
    head_dim = said.integer(f"attention.key_{key}")
    if said.integer(f"attention.value_{key}") != head_dim:
        raise said.wrong(f"attention.value_{key}", f"{head_dim}, as for keys")
    return head_dim


def _rope(said: _Metadata, divisors: np.ndarray[Any, Any]) -> dict[str, Any]:
    if str(said.get("rope.scaling.type")).lower() != "none":  # None as well
        raise said.wrong("rope.scaling.type", "none: Gemma 4 does not scale its positions")
    for key, whole in (("", "length"), ("_swa", "length_swa")):
        if said.integer(f"rope.dimension_count{key}") != said.integer(f"attention.key_{whole}"):
            raise said.wrong(f"rope.dimension_count{key}", "the length of a head")
    rotated = int((divisors == 1).sum())
    still = divisors[rotated:]
    pairs = said.integer("attention.key_length") // 2
    if divisors.size != pairs or not (divisors[:rotated] == 1).all():
        raise ValueError(f"{said.file}: tensor rope_freqs.weight is not that of a Gemma 4 model")
    if not (still > _STANDS_STILL).all():
        raise ValueError(f"{said.file}: rope_freqs.weight scales positions, Gemma 4 does not")
    return {
        "rope_parameters": {
            FULL: {
                "partial_rotary_factor": rotated / pairs,
                "rope_theta": said.positive("rope.freq_base"),
                "rope_type": "proportional",
            },
            SLIDING: {"rope_theta": said.positive("rope.freq_base_swa"), "rope_type": "default"},
        }
    }


def _mlp(said: _Metadata, layers: int) -> dict[str, Any]:
    widths = said.per_layer("feed_forward_length", layers)
    owning = layers - said.optional("attention.shared_kv_layers")
    double = widths == [widths[0]] * owning + [2 * widths[0]] * (layers - owning)
    if not double and len(set(widths)) > 1:
        raise said.wrong("feed_forward_length", "one width, doubled where keys are shared")
    experts = said.optional("expert_count")
    return {
        "enable_moe_block": experts > 0,
        "intermediate_size": widths[0],
        "moe_intermediate_size": said.integer("expert_feed_forward_length") if experts else None,
        "num_experts": experts or None,
        "top_k_experts": said.integer("expert_used_count") if experts else None,
        "use_double_wide_mlp": double and owning < layers,
    }
