"""The five Gemma 4 models as their config.json describes them: sizes only, no weights.

Source: transformers' Gemma4TextConfig and the published configurations; the assistants' likewise.
"""

from typing import Any

from gemma_mtp_mlx.config import FULL, SLIDING, DrafterConfig, ModelConfig

_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 131_072,
    "model_type": "gemma4_text",
    "num_global_key_value_heads": None,
    "num_kv_shared_layers": 0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "use_double_wide_mlp": False,
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
}
_SMALL = {"hidden_size_per_layer_input": 256, "sliding_window": 512}
_K_IS_V = {"attention_k_eq_v": True}


def _text(sizes: tuple[int, int, int], heads: tuple[int, int, int], **own: Any) -> dict[str, Any]:
    """sizes: hidden, layers, MLP; heads: queries, keys of sliding and of full layers."""
    (hidden, layers, inner), (queries, sliding, full) = sizes, heads
    period = own.pop("period", 6)
    types = [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)]
    return {
        **_TEXT,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "layer_types": types,
        "num_attention_heads": queries,
        "num_global_key_value_heads": full,
        "num_hidden_layers": layers,
        "num_key_value_heads": sliding,
        **own,
    }


TEXTS = {
    "E2B": _text(
        (1536, 35, 6144),
        (8, 1, 1),
        period=5,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        **_SMALL,
    ),
    "E4B": _text((2560, 42, 10_240), (8, 2, 2), num_kv_shared_layers=18, **_SMALL),
    "12B": _text((3840, 48, 15_360), (16, 8, 1), **_K_IS_V),
    "26B-A4B": _text(
        (2816, 30, 2112),
        (16, 8, 2),
        enable_moe_block=True,
        moe_intermediate_size=704,
        num_experts=128,
        top_k_experts=8,
        **_K_IS_V,
    ),
    "31B": _text((5376, 60, 21_504), (32, 16, 4), **_K_IS_V),
}
# Hidden and MLP widths, query heads, and whether the head looks into centroids first.
_ASSISTANTS = {
    "E2B": (256, 2048, 4, True),
    "E4B": (256, 2048, 4, True),
    "12B": (1024, 8192, 16, False),
    "26B-A4B": (1024, 8192, 16, False),
    "31B": (1024, 8192, 32, False),
}


def target_config(model: str) -> ModelConfig:
    """Return a target's facts per layer."""
    return ModelConfig.from_dict(TEXTS[model])


def drafter_config(model: str) -> DrafterConfig:
    """Return its assistant's: four layers that read the target's keys and values."""
    hidden, inner, queries, ordered = _ASSISTANTS[model]
    target = TEXTS[model]
    text = {
        **target,
        "enable_moe_block": False,
        "final_logit_softcapping": None,
        "hidden_size": hidden,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": inner,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "num_attention_heads": queries,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": False,
    }
    return DrafterConfig.from_dict(
        {
            "backbone_hidden_size": target["hidden_size"],
            "centroid_intermediate_top_k": 32,
            "model_type": "gemma4_assistant",
            "num_centroids": 2048,
            "text_config": text,
            "use_ordered_embeddings": ordered,
        }
    )
