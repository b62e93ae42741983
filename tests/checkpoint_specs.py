"""The tensors of a tiny Gemma 4 checkpoint: names, shapes and the range each is drawn from.

Ranges keep a random model alive: logits spread over several units and reach the softcap, hidden
states do not collapse onto the input embedding, and norms, scalars and scales are spread around 1
or away from it. They also keep it tame: with query and key norms of 0.4 to 1.2, float32 rounding
alone moves transformers' own logits by 2e-4 of the largest, which hides bugs; as they are, by
some 5e-6.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tests.families import UNIFIED

SHARED_KV_EXTRAS = ("k_proj", "v_proj", "k_norm")


class Spec(NamedTuple):
    """A tensor to draw: uniform between low and high."""

    shape: tuple[int, ...]
    low: float
    high: float


Specs = dict[str, Spec]


def _matrix(out: int, inputs: int, gain: float = 1.0) -> Spec:
    """Weights of a linear layer whose output has gain times its input's root mean square."""
    bound = gain * math.sqrt(3.0 / inputs)
    return Spec((out, inputs), -bound, bound)


def _norm(size: int, low: float = 0.5, high: float = 1.5) -> Spec:
    return Spec((size,), low, high)


def _attention(config: dict[str, Any], layer: int) -> Specs:
    full = config["layer_types"][layer] == "full_attention"
    k_eq_v = config["attention_k_eq_v"] and full
    head_dim = config["global_head_dim"] if full else config["head_dim"]
    kv_heads = config["num_key_value_heads"]
    if k_eq_v and config["num_global_key_value_heads"]:
        kv_heads = config["num_global_key_value_heads"]
    hidden, width = config["hidden_size"], config["num_attention_heads"] * head_dim
    specs = {
        "q_proj.weight": _matrix(width, hidden),
        "q_norm.weight": _norm(head_dim, 0.2, 0.8),
        "o_proj.weight": _matrix(hidden, width),
        "k_proj.weight": _matrix(kv_heads * head_dim, hidden),
        "k_norm.weight": _norm(head_dim, 0.2, 0.8),
    }
    if not k_eq_v:
        specs["v_proj.weight"] = _matrix(kv_heads * head_dim, hidden)
    return {f"self_attn.{name}": spec for name, spec in specs.items()}


def _is_shared(config: dict[str, Any], layer: int) -> bool:
    return layer >= config["num_hidden_layers"] - config["num_kv_shared_layers"]


def _own_attention(config: dict[str, Any], layer: int) -> Specs:
    specs = _attention(config, layer)
    if _is_shared(config, layer):
        for name in SHARED_KV_EXTRAS:
            specs.pop(f"self_attn.{name}.weight", None)
    return specs


def _mlp(config: dict[str, Any], layer: int) -> Specs:
    double = config["use_double_wide_mlp"] and _is_shared(config, layer)
    hidden, width = config["hidden_size"], config["intermediate_size"] * (2 if double else 1)
    return {
        "mlp.gate_proj.weight": _matrix(width, hidden, 1.5),
        "mlp.up_proj.weight": _matrix(width, hidden),
        "mlp.down_proj.weight": _matrix(hidden, width),
    }


def _experts(config: dict[str, Any]) -> Specs:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    count = config["num_experts"]
    gate_up, down = _matrix(2 * width, hidden, 1.5), _matrix(hidden, width)
    return {
        "router.proj.weight": _matrix(count, hidden, 2.0 * math.sqrt(hidden)),
        "router.scale": _norm(hidden),
        "router.per_expert_scale": _norm(count),
        "experts.gate_up_proj": gate_up._replace(shape=(count, *gate_up.shape)),
        "experts.down_proj": down._replace(shape=(count, *down.shape)),
        "pre_feedforward_layernorm_2.weight": _norm(hidden),
        "post_feedforward_layernorm_1.weight": _norm(hidden, 0.4, 1.4),
        "post_feedforward_layernorm_2.weight": _norm(hidden, 0.4, 1.4),
    }


def _per_layer_input(config: dict[str, Any]) -> Specs:
    hidden, width = config["hidden_size"], config["hidden_size_per_layer_input"]
    return {
        "per_layer_input_gate.weight": _matrix(width, hidden, 1.5),
        "per_layer_projection.weight": _matrix(hidden, width),
        "post_per_layer_input_norm.weight": _norm(hidden, 0.4, 1.4),
    }


def _layer(config: dict[str, Any], layer: int) -> Specs:
    hidden = config["hidden_size"]
    specs = {
        "input_layernorm.weight": _norm(hidden),
        "post_attention_layernorm.weight": _norm(hidden, 0.4, 1.4),
        "pre_feedforward_layernorm.weight": _norm(hidden),
        "post_feedforward_layernorm.weight": _norm(hidden, 0.4, 1.4),
        "layer_scalar": Spec((1,), 0.3, 0.9),
        **_own_attention(config, layer),
        **_mlp(config, layer),
    }
    if config.get("enable_moe_block"):
        specs.update(_experts(config))
    if config.get("hidden_size_per_layer_input"):
        specs.update(_per_layer_input(config))
    return {f"layers.{layer}.{name}": spec for name, spec in specs.items()}


def text_specs(config: dict[str, Any]) -> Specs:
    """Every tensor of the text model; names as under `model.` of Gemma4ForCausalLM."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    specs = {
        "embed_tokens.weight": Spec((config["vocab_size"], hidden), -0.43, 0.43),
        "norm.weight": _norm(hidden, 1.5, 3.5),
    }
    if ple := config.get("hidden_size_per_layer_input"):
        bound = math.sqrt(3.0 / ple)
        shape = (config["vocab_size_per_layer_input"], layers * ple)
        specs["embed_tokens_per_layer.weight"] = Spec(shape, -bound, bound)
        specs["per_layer_model_projection.weight"] = _matrix(layers * ple, hidden)
        specs["per_layer_projection_norm.weight"] = _norm(ple)
    for layer in range(layers):
        specs.update(_layer(config, layer))
    return specs


def unused_specs(family: str, config: dict[str, Any]) -> Specs:
    """What a multimodal checkpoint holds beside the text model, by full tensor name."""
    hidden = config["hidden_size"]
    if family in UNIFIED:
        return {
            "model.vision_embedder.patch_dense.weight": _matrix(hidden, 48),
            "model.vision_embedder.patch_ln1.weight": _norm(48),
            "model.vision_embedder.pos_embedding": Spec((8, 2, hidden), -1.0, 1.0),
            "model.embed_vision.embedding_projection.weight": _matrix(hidden, hidden),
            "model.embed_audio.embedding_projection.weight": _matrix(hidden, 64),
        }
    tower = "model.vision_tower.encoder.layers.0"
    specs = {
        "model.vision_tower.patch_embedder.input_proj.weight": _matrix(32, 48),
        f"{tower}.self_attn.q_proj.linear.weight": _matrix(32, 32),
        f"{tower}.input_layernorm.weight": _norm(32),
        "model.embed_vision.embedding_projection.weight": _matrix(hidden, 32),
    }
    if config["num_kv_shared_layers"]:
        specs["model.audio_tower.layers.0.norm_out.weight"] = _norm(32)
        specs["model.embed_audio.embedding_projection.weight"] = _matrix(hidden, 32)
        specs.update(_unused_kv(config))
    return specs


def _unused_kv(config: dict[str, Any]) -> Specs:
    """K/V weights of KV-shared layers: published files carry some, nobody may use them."""
    return {
        f"model.language_model.layers.{layer}.{name}": spec
        for layer in range(config["num_hidden_layers"])
        if _is_shared(config, layer)
        for name, spec in _attention(config, layer).items()
        if name.split(".")[1] in SHARED_KV_EXTRAS
    }


def assistant_specs(config: dict[str, Any]) -> Specs:
    text, backbone = config["text_config"], config["backbone_hidden_size"]
    hidden = text["hidden_size"]
    specs = {f"model.{name}": spec for name, spec in text_specs(text).items()}
    specs["pre_projection.weight"] = _matrix(hidden, 2 * backbone)
    specs["post_projection.weight"] = _matrix(backbone, hidden)
    if config["use_ordered_embeddings"]:
        specs["masked_embedding.centroids.weight"] = _matrix(config["num_centroids"], hidden)
    return specs
