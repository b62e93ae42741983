"""The config.json of five tiny Gemma 4 targets and their assistants, in both published layouts.

"published" is what Google's files hold (global_head_dim, num_global_key_value_heads); "per_layer"
is what transformers >= 5.17 saves (per_layer_config with zero-padded layer numbers, only the
layers that differ).
"""

from __future__ import annotations

from typing import Any

WINDOW = 16
EOS = [1, 5]
PATTERN = {"S": "sliding_attention", "F": "full_attention"}
ROPE = {
    "full_attention": {
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000.0,
        "rope_type": "proportional",
    },
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
BASE: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "max_position_embeddings": 4096,
    "num_global_key_value_heads": None,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": 128,
}
GEMMA4_ONLY: dict[str, Any] = {
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 0,
    "moe_intermediate_size": None,
    "num_experts": None,
    "top_k_experts": None,
    "vocab_size_per_layer_input": 128,
}

# Layer patterns are chosen so that a wrong rule shows: in e4b the first full layer is not the one
# that is shared, in e2b sharing starts inside a period, so that the last sliding owner is also the
# last owner of all.
FAMILIES: dict[str, dict[str, Any]] = {
    "e2b": {
        "layers": "SSSSFSSSSF",
        "heads": (4, 1, None),
        "hidden_size_per_layer_input": 64,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
    },
    "e4b": {
        "layers": "SSFSSFSSF",
        "heads": (4, 2, None),
        "hidden_size_per_layer_input": 64,
        "num_kv_shared_layers": 3,
    },
    "12b": {
        "layers": "SSFSSF",
        "heads": (4, 2, 1),
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
        "vocab_size": 192,
    },
    "26b": {
        "layers": "SSFSSF",
        "heads": (4, 4, 2),
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
        "enable_moe_block": True,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "top_k_experts": 2,
    },
    "31b": {
        "layers": "SSSFSSSF",
        "heads": (8, 4, 2),
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
    },
}
UNIFIED = ("12b",)
ORDERED = ("e2b", "e4b")


def _text_config(family: str) -> dict[str, Any]:
    """Return the explicit, published text config of a family's target."""
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, expected one of {sorted(FAMILIES)}")
    own = dict(FAMILIES[family])
    layers, (heads, kv_heads, global_kv_heads) = own.pop("layers"), own.pop("heads")
    unified = family in UNIFIED
    return {
        **BASE,
        **({} if unified else GEMMA4_ONLY),
        **own,
        "model_type": "gemma4_unified_text" if unified else "gemma4_text",
        "layer_types": [PATTERN[letter] for letter in layers],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_global_key_value_heads": global_kv_heads,
        "rope_parameters": ROPE,
    }


def _per_layer(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a published text config as transformers 5.22.2 saves it."""
    config = dict(config)
    override = {"head_dim": config.pop("global_head_dim")}
    kv_heads = config.pop("num_global_key_value_heads")
    if kv_heads is not None and config["attention_k_eq_v"]:
        override["num_key_value_heads"] = kv_heads
    types = config["layer_types"]
    width = len(str(len(types) - 1))
    config["per_layer_config"] = {
        str(layer).zfill(width): override
        for layer, kind in enumerate(types)
        if kind == "full_attention"
    }
    return config


def _laid_out(text: dict[str, Any], config_layout: str) -> dict[str, Any]:
    if config_layout not in ("published", "per_layer"):
        raise ValueError(f"config_layout is {config_layout!r}, expected published or per_layer")
    return _per_layer(text) if config_layout == "per_layer" else text


def target_config(family: str, layout: str, config_layout: str, dtype: str) -> dict[str, Any]:
    """Return config.json of a target; arguments as checkpoints.write_checkpoint takes them."""
    text = _laid_out(_text_config(family), config_layout)
    unified = family in UNIFIED
    stem = "Gemma4Unified" if unified else "Gemma4"
    if layout == "text":
        return {**text, "architectures": [f"{stem}ForCausalLM"], "dtype": dtype}
    if layout != ("unified" if unified else "conditional"):
        raise ValueError(f"layout is {layout!r}, which the family {family!r} is not published in")
    return {
        "architectures": [f"{stem}ForConditionalGeneration"],
        "audio_config": None,
        "audio_token_id": 258881,
        "boa_token_id": 256000,
        "boi_token_id": 255999,
        "dtype": dtype,
        "eoa_token_index": 258883,
        "eoi_token_id": 258882,
        "eos_token_id": EOS,
        "image_token_id": 258880,
        "initializer_range": 0.02,
        "model_type": "gemma4_unified" if unified else "gemma4",
        "text_config": text,
        "tie_word_embeddings": True,
        "video_token_id": 258884,
        "vision_config": None,
    }


def assistant_config(family: str, config_layout: str, dtype: str) -> dict[str, Any]:
    """Return config.json of a target's assistant: four layers that own no keys and values."""
    target, ordered, unified = _text_config(family), family in ORDERED, family in UNIFIED
    text = {
        **target,
        "final_logit_softcapping": None,
        "hidden_size": 64,
        "intermediate_size": 128,
        "layer_types": [PATTERN[letter] for letter in "SSSF"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "use_bidirectional_attention": None,
        "use_double_wide_mlp": False,
    }
    if not unified:
        text.update({**GEMMA4_ONLY, "vocab_size_per_layer_input": 0})
    stem = "Gemma4UnifiedAssistant" if unified else "Gemma4Assistant"
    return {
        "architectures": [f"{stem}ForCausalLM"],
        "backbone_hidden_size": target["hidden_size"],
        "centroid_intermediate_top_k": 4,
        "dtype": dtype,
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "num_centroids": 16,
        "text_config": _laid_out(text, config_layout),
        "tie_word_embeddings": True,
        "use_ordered_embeddings": ordered,
    }
