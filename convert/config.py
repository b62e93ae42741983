"""Write config.json in the published, flat layout, whatever layout it came in.

What differs by layer is written from what the runtime itself understood, with every default spelled
out (mlx_lm's are E2B's). The result is read back: if it does not mean the same model, this layout
cannot express that model and the conversion stops.
"""

from dataclasses import replace
from typing import Any

from gemma_mtp_mlx.config import FULL, SLIDING, DrafterConfig, LayerConfig, ModelConfig

_DROPPED = ("per_layer_config", "quantization", "quantization_config", "torch_dtype")
_FROM_TOP = ("bos_token_id", "eos_token_id", "pad_token_id")


def target_dict(source: dict[str, Any], config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return config.json of a gemma4_text target. source: its config.json; dtype: as written."""
    text = source.get("text_config", source)
    kept = {name: source[name] for name in _FROM_TOP if source.get(name) is not None}
    written = {
        **_text_dict(text, config),
        **kept,
        "architectures": ["Gemma4ForCausalLM"],
        "dtype": dtype,
        "num_kv_shared_layers": len(config.layers) - config.num_owning_layers,
        "use_double_wide_mlp": bool(text.get("use_double_wide_mlp")),
    }
    _check_same(ModelConfig.from_dict(written), config)
    return written


def drafter_dict(source: dict[str, Any], config: DrafterConfig, dtype: str) -> dict[str, Any]:
    """Return config.json of a gemma4_assistant drafter."""
    written = {name: value for name, value in source.items() if name not in _DROPPED}
    written.update(
        architectures=["Gemma4AssistantForCausalLM"],
        backbone_hidden_size=config.backbone_hidden_size,
        centroid_intermediate_top_k=config.centroid_intermediate_top_k,
        dtype=dtype,
        model_type="gemma4_assistant",
        num_centroids=config.num_centroids,
        text_config={
            **_text_dict(source["text_config"], config.text),
            "num_kv_shared_layers": len(config.text.layers),
            "use_double_wide_mlp": False,
        },
        use_ordered_embeddings=config.use_ordered_embeddings,
    )
    again = DrafterConfig.from_dict(written)
    _check_same(again.text, config.text)
    assert replace(again, text=config.text) == config
    return written


def _text_dict(source: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    sliding, full = _one_of(config, SLIDING), _one_of(config, FULL)
    k_eq_v = full.k_eq_v
    per_layer_input = config.hidden_size_per_layer_input
    kept = {name: value for name, value in source.items() if name not in _DROPPED}
    return {
        **kept,
        "attention_k_eq_v": k_eq_v,
        "enable_moe_block": config.num_experts > 0,
        "final_logit_softcapping": config.final_logit_softcapping,
        "global_head_dim": full.head_dim,
        "head_dim": sliding.head_dim,
        "hidden_size_per_layer_input": per_layer_input,
        "layer_types": [SLIDING if layer.sliding else FULL for layer in config.layers],
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "gemma4_text",
        "num_global_key_value_heads": full.num_key_value_heads if k_eq_v else None,
        "num_key_value_heads": sliding.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {SLIDING: _rope(sliding), FULL: _rope(full)},
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": True,
        "vocab_size": config.vocab_size,
        "vocab_size_per_layer_input": config.vocab_size_per_layer_input if per_layer_input else 0,
    }


def _one_of(config: ModelConfig, kind: str) -> LayerConfig:
    """Return the first layer of that kind, or the last of all if there is none."""
    layers = [layer for layer in config.layers if layer.sliding == (kind == SLIDING)]
    return (layers or config.layers[-1:])[0]


def _rope(layer: LayerConfig) -> dict[str, Any]:
    if layer.rope_dims == layer.head_dim:
        return {"rope_theta": layer.rope_theta, "rope_type": "default"}
    return {
        "partial_rotary_factor": layer.rope_dims / layer.head_dim,
        "rope_theta": layer.rope_theta,
        "rope_type": "proportional",
    }


def _check_same(written: ModelConfig, config: ModelConfig) -> None:
    if not config.hidden_size_per_layer_input:
        config = replace(config, vocab_size_per_layer_input=0)
    if written != config:
        raise ValueError(
            "config.json describes layers of one kind that differ from each other, which the "
            "published layout cannot say; this model cannot be converted"
        )
