"""What a Gemma 4 checkpoint's config.json says, as facts per layer.

Published checkpoints write `global_head_dim` and `num_global_key_value_heads`; transformers >= 5.17
saves `per_layer_config` instead, whose keys are zero-padded layer numbers and which lists only the
layers that differ. Both are read here and nowhere else: the rest of the project asks a layer.
Source: transformers Gemma4TextConfig, Gemma4UnifiedTextConfig, Gemma4AssistantConfig.
"""

from dataclasses import dataclass
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
TARGET_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One decoder layer: its attention's shape, whose keys and values it reads, its MLP's width."""

    index: int
    sliding: bool
    head_dim: int
    num_key_value_heads: int
    k_eq_v: bool
    owns_kv: bool
    kv_source: int  # the layer whose keys and values it reads; its own index when it owns them
    intermediate_size: int
    rope_theta: float
    rope_dims: int  # rotated entries of head_dim; the rest are paired with a zero angle


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Gemma 4 text model. Sizes in elements; `layers` holds everything that differs by layer."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    rms_norm_eps: float
    sliding_window: int
    final_logit_softcapping: float | None
    max_position_embeddings: int
    hidden_size_per_layer_input: int
    vocab_size_per_layer_input: int
    num_experts: int  # 0: no mixture-of-experts block
    top_k_experts: int
    moe_intermediate_size: int
    layers: tuple[LayerConfig, ...]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read a target's config.json, flat or with a nested text_config, in either layout."""
        _check_type(config, TARGET_TYPES, "a Gemma 4 model")
        return _text_config(config.get("text_config", config), owns_kv=True)

    @property
    def num_owning_layers(self) -> int:
        """Layers that make their own keys and values; the layers after them share."""
        return sum(layer.owns_kv for layer in self.layers)

    def last_owner(self, *, sliding: bool) -> LayerConfig:
        """Return the last layer of that kind with keys and values of its own: the drafter's."""
        return [layer for layer in self.layers if layer.owns_kv and layer.sliding == sliding][-1]


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """A Gemma 4 assistant: query-only layers over the target's keys and values."""

    text: ModelConfig
    backbone_hidden_size: int
    use_ordered_embeddings: bool
    num_centroids: int
    centroid_intermediate_top_k: int

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "DrafterConfig":
        """Read an assistant's config.json."""
        _check_type(config, DRAFTER_TYPES, "a Gemma 4 drafter (assistant)")
        drafter = cls(
            text=_text_config(config["text_config"], owns_kv=False),
            backbone_hidden_size=config.get("backbone_hidden_size", 1536),
            use_ordered_embeddings=config.get("use_ordered_embeddings", False),
            num_centroids=config.get("num_centroids", 2048),
            centroid_intermediate_top_k=config.get("centroid_intermediate_top_k", 32),
        )
        if drafter.use_ordered_embeddings and drafter.text.vocab_size % drafter.num_centroids:
            raise ValueError(
                f"config.json: vocab_size {drafter.text.vocab_size} is not a multiple of "
                f"num_centroids {drafter.num_centroids}, so this centroid head cannot be read"
            )
        return drafter


def _check_type(config: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    model_type = config.get("model_type")
    if model_type not in known:
        raise ValueError(
            f"config.json says model_type {model_type!r}, which is not {what}; "
            f"expected one of {', '.join(known)}"
        )


def _text_config(text: dict[str, Any], *, owns_kv: bool) -> ModelConfig:
    unified = text.get("model_type", "").startswith("gemma4_unified")
    moe = bool(text.get("enable_moe_block"))
    _refuse_unsupported(text)
    per_layer_input = 0 if unified else text.get("hidden_size_per_layer_input", 256)
    return ModelConfig(
        vocab_size=text.get("vocab_size", 262_144),
        hidden_size=_required(text, "hidden_size"),
        num_attention_heads=_required(text, "num_attention_heads"),
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        sliding_window=text.get("sliding_window", 1024 if unified else 512),
        final_logit_softcapping=text.get("final_logit_softcapping"),
        max_position_embeddings=text.get(
            "max_position_embeddings", 262_144 if unified else 131_072
        ),
        hidden_size_per_layer_input=(per_layer_input or 0) if owns_kv else 0,
        vocab_size_per_layer_input=text.get("vocab_size_per_layer_input", 262_144) or 0,
        num_experts=_required(text, "num_experts") if moe else 0,
        top_k_experts=_required(text, "top_k_experts") if moe else 0,
        moe_intermediate_size=_required(text, "moe_intermediate_size") if moe else 0,
        layers=_layers(text, owns_kv=owns_kv),
    )


def _refuse_unsupported(text: dict[str, Any]) -> None:
    expected = {
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False, None),
        "tie_word_embeddings": (True, None),
        "use_bidirectional_attention": ("vision", None),
    }
    for name, values in expected.items():
        if text.get(name) not in values:
            raise ValueError(f"config.json: {name} {text[name]!r} is not supported")


def _required(text: dict[str, Any], name: str) -> Any:
    if text.get(name) is None:
        raise ValueError(f"config.json has no {name}; the checkpoint's config is incomplete")
    return text[name]


def _layers(text: dict[str, Any], *, owns_kv: bool) -> tuple[LayerConfig, ...]:
    count = _required(text, "num_hidden_layers")
    types = text.get("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    types = [*types[: count - 1], FULL]  # the last layer is always full attention
    first_shared = count - (text.get("num_kv_shared_layers") or 0) if owns_kv else 0
    last_owner = {kind: i for i, kind in enumerate(types[:first_shared])}
    overrides = {int(k): v for k, v in (text.get("per_layer_config") or {}).items()}
    layers = []
    for i, kind in enumerate(types):
        owner = i < first_shared
        if owns_kv and not owner and kind not in last_owner:
            raise ValueError(f"config.json: layer {i} shares {kind} keys that no layer owns")
        head_dim, kv_heads = _attention_shape(text, kind, overrides.get(i, {}))
        rope = {**_ROPE[kind], **((text.get("rope_parameters") or {}).get(kind) or {})}
        wide = 2 if text.get("use_double_wide_mlp") and owns_kv and not owner else 1
        layers.append(
            LayerConfig(
                index=i,
                sliding=kind == SLIDING,
                head_dim=head_dim,
                num_key_value_heads=kv_heads,
                k_eq_v=bool(text.get("attention_k_eq_v")) and kind == FULL,
                owns_kv=owner,
                kv_source=i if owner else last_owner.get(kind, i),
                intermediate_size=_required(text, "intermediate_size") * wide,
                rope_theta=rope["rope_theta"],
                rope_dims=_rope_dims(rope, head_dim),
            )
        )
    return tuple(layers)


def _attention_shape(text: dict[str, Any], kind: str, override: dict[str, int]) -> tuple[int, int]:
    """Return (head_dim, key/value heads) of a layer of that kind."""
    head_dim = text.get("head_dim", 256)
    kv_heads = text.get("num_key_value_heads", 4)
    if kind == FULL and "per_layer_config" not in text:
        head_dim = text.get("global_head_dim", 512) or head_dim
        if text.get("attention_k_eq_v"):
            kv_heads = text.get("num_global_key_value_heads") or kv_heads
    return override.get("head_dim", head_dim), override.get("num_key_value_heads", kv_heads)


def _rope_dims(rope: dict[str, Any], head_dim: int) -> int:
    if rope["rope_type"] not in ("default", "proportional"):
        raise ValueError(f"config.json: rope_type {rope['rope_type']!r} is not supported")
    return 2 * int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
