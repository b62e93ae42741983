"""What a Gemma 4 checkpoint's config.json says, as facts per layer.

Published checkpoints write `global_head_dim` and `num_global_key_value_heads`; transformers >= 5.17
saves `per_layer_config` instead, whose keys are zero-padded layer numbers and which lists only the
layers that differ. Both are read here and nowhere else: the rest of the project asks a layer.
Modules are built from it before any weight is looked at, so every number has its bounds.
Source: transformers Gemma4TextConfig, Gemma4UnifiedTextConfig, Gemma4AssistantConfig.
"""

from dataclasses import dataclass
from typing import Any

from gemma_mtp_mlx.fields import Fields, shown

SLIDING, FULL = "sliding_attention", "full_attention"
TARGET_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
_UNIFIED = ("gemma4_unified_text", "gemma4_unified", "gemma4_unified_assistant")
_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
# Far beyond every published model, and small enough that no shape or byte count overflows.
_WHERE = "config.json: "
_MOST_LAYERS, _WIDEST, _LONGEST = 1000, 1 << 20, 1 << 24
_BOUNDS: dict[str, tuple[float, float]] = {
    "backbone_hidden_size": (1, _WIDEST),
    "centroid_intermediate_top_k": (0, _LONGEST),
    "final_logit_softcapping": (1e-6, 1e9),
    "global_head_dim": (0, 1 << 14),
    "head_dim": (2, 1 << 14),
    "hidden_size": (1, _WIDEST),
    "hidden_size_per_layer_input": (0, _WIDEST),
    "intermediate_size": (1, _WIDEST),
    "max_position_embeddings": (1, _LONGEST),
    "moe_intermediate_size": (1, _WIDEST),
    "num_attention_heads": (1, 4096),
    "num_centroids": (0, _LONGEST),
    "num_experts": (1, 4096),
    "num_global_key_value_heads": (0, 4096),
    "num_hidden_layers": (1, _MOST_LAYERS),
    "num_key_value_heads": (1, 4096),
    "num_kv_shared_layers": (0, _MOST_LAYERS),
    "partial_rotary_factor": (0, 1),
    "rms_norm_eps": (0, 1),
    "rope_theta": (1e-6, 1e15),
    "sliding_window": (1, _LONGEST),
    "top_k_experts": (1, 4096),
    "vocab_size": (1, _LONGEST),
    "vocab_size_per_layer_input": (0, _LONGEST),
}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # what only these values are known of
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "attention_bias": (False, None),
    "tie_word_embeddings": (True, None),
    "use_bidirectional_attention": ("vision", None),
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
        text = Fields(config, _WHERE, _BOUNDS)
        return _text_config(text.object("text_config") if "text_config" in config else text)

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
        fields = Fields(config, _WHERE, _BOUNDS)
        drafter = cls(
            text=_text_config(fields.object("text_config"), owns_kv=False),
            backbone_hidden_size=fields.whole("backbone_hidden_size", 1536),
            use_ordered_embeddings=fields.flag("use_ordered_embeddings"),
            num_centroids=fields.whole("num_centroids", 2048),
            centroid_intermediate_top_k=fields.whole("centroid_intermediate_top_k", 32),
        )
        if drafter.use_ordered_embeddings:
            drafter._check_centroids(fields)
        return drafter

    def _check_centroids(self, fields: Fields) -> None:
        vocabulary, count = self.text.vocab_size, self.num_centroids
        if not count or vocabulary % count:
            raise fields.wrong("num_centroids", f"a divisor of the vocab_size {vocabulary}")
        if not 1 <= self.centroid_intermediate_top_k <= count:
            raise fields.wrong("centroid_intermediate_top_k", f"from 1 to num_centroids, {count}")


def _check_type(config: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    model_type = config.get("model_type")
    if model_type not in known:
        raise ValueError(
            f"config.json says model_type {shown(model_type)}, which is not {what}; "
            f"expected one of {', '.join(known)}"
        )


def _text_config(text: Fields, *, owns_kv: bool = True) -> ModelConfig:
    unified = text.values.get("model_type") in _UNIFIED
    moe = text.flag("enable_moe_block")
    for name, known in _UNSUPPORTED.items():
        text.one_of(name, known)
    cap = text.values.get("final_logit_softcapping")
    given = "hidden_size_per_layer_input" in text.values
    per_layer_input = text.whole_or("hidden_size_per_layer_input", 0 if given else 256)
    config = ModelConfig(
        vocab_size=text.whole("vocab_size", 262_144),
        hidden_size=text.whole("hidden_size"),
        num_attention_heads=text.whole("num_attention_heads"),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        sliding_window=text.whole("sliding_window", 1024 if unified else 512),
        final_logit_softcapping=None if cap is None else text.number("final_logit_softcapping", 1),
        max_position_embeddings=text.whole(
            "max_position_embeddings", 262_144 if unified else 131_072
        ),
        hidden_size_per_layer_input=per_layer_input if owns_kv and not unified else 0,
        vocab_size_per_layer_input=_per_layer_vocabulary(text),
        num_experts=text.whole("num_experts") if moe else 0,
        top_k_experts=text.whole("top_k_experts") if moe else 0,
        moe_intermediate_size=text.whole("moe_intermediate_size") if moe else 0,
        layers=_layers(text, owns_kv=owns_kv),
    )
    _check_shapes(text, config)
    return config


def _per_layer_vocabulary(text: Fields) -> int:
    given = "vocab_size_per_layer_input" in text.values
    return text.whole_or("vocab_size_per_layer_input", 0 if given else 262_144)


def _check_shapes(text: Fields, config: ModelConfig) -> None:
    """Raise ValueError for sizes that are possible, but not together."""
    if config.top_k_experts > config.num_experts:
        raise text.wrong("top_k_experts", f"at most num_experts, {config.num_experts}")
    if config.hidden_size_per_layer_input and not config.vocab_size_per_layer_input:
        raise text.wrong("vocab_size_per_layer_input", "above 0, as there are per-layer inputs")
    shapes: dict[bool, tuple[int, int]] = {}
    for layer in config.layers:
        shape = layer.head_dim, layer.num_key_value_heads
        if layer.head_dim % 2:
            raise ValueError(f"{_WHERE}layer {layer.index} has heads of {layer.head_dim}: odd")
        if shapes.setdefault(layer.sliding, shape) != shape:
            raise ValueError(
                f"{_WHERE}layers of one kind differ from each other: layer {layer.index} has "
                f"{shape[1]} key/value heads of {shape[0]}; this model is not supported"
            )
        if layer.owns_kv and config.num_attention_heads % layer.num_key_value_heads:
            raise ValueError(
                f"{_WHERE}{config.num_attention_heads} query heads do not divide over the "
                f"{layer.num_key_value_heads} key/value heads of layer {layer.index}"
            )


def _layers(text: Fields, *, owns_kv: bool) -> tuple[LayerConfig, ...]:
    count = text.whole("num_hidden_layers")
    types = _layer_types(text, count)
    shared = text.whole_or("num_kv_shared_layers", 0) if owns_kv else count
    if shared > count:
        raise text.wrong("num_kv_shared_layers", f"at most num_hidden_layers, {count}")
    first_shared = count - shared
    last_owner = {kind: i for i, kind in enumerate(types[:first_shared])}
    if owns_kv and len(last_owner) < 2:
        raise ValueError(
            f"{_WHERE}the {first_shared} layers with keys and values of their own must be of "
            f"both kinds, {SLIDING} and {FULL}"
        )
    overrides = _overrides(text, count)
    ropes = {kind: _rope(text, kind) for kind in (SLIDING, FULL)}
    double = text.flag("use_double_wide_mlp") and owns_kv
    layers = []
    for i, kind in enumerate(types):
        owner = i < first_shared
        head_dim, kv_heads = _attention_shape(text, kind, overrides.get(i))
        theta, factor = ropes[kind]
        layers.append(
            LayerConfig(
                index=i,
                sliding=kind == SLIDING,
                head_dim=head_dim,
                num_key_value_heads=kv_heads,
                k_eq_v=text.flag("attention_k_eq_v") and kind == FULL,
                owns_kv=owner,
                kv_source=i if owner else last_owner.get(kind, i),
                intermediate_size=text.whole("intermediate_size") * (1 + (double and not owner)),
                rope_theta=theta,
                rope_dims=2 * int(factor * head_dim // 2),
            )
        )
    return tuple(layers)


def _layer_types(text: Fields, count: int) -> list[str]:
    """Return each layer's kind; the last is always full attention."""
    types = text.values.get("layer_types")
    if types is None or types == []:
        types = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    known = isinstance(types, list) and all(kind in (SLIDING, FULL) for kind in types)
    if not known or len(types) != count:
        raise text.wrong("layer_types", f"a list of {count} of {SLIDING} and {FULL}")
    return [*types[: count - 1], FULL]


def _overrides(text: Fields, count: int) -> dict[int, Fields]:
    """Return what per_layer_config says, by layer."""
    found = text.object("per_layer_config")
    overrides: dict[int, Fields] = {}
    for key in found.values:
        plain = key.isascii() and key.isdecimal() and len(key) <= 8
        layer = int(key) if plain else count
        if layer >= count or layer in overrides:
            raise found.wrong(key, f"for another layer: there are 0 to {count - 1}, each once")
        overrides[layer] = found.object(key)
        for name in overrides[layer].values.keys() - {"head_dim", "num_key_value_heads"}:
            raise overrides[layer].wrong(name, "left out: layers that differ in it are not read")
    return overrides


def _attention_shape(text: Fields, kind: str, override: Fields | None) -> tuple[int, int]:
    """Return (head_dim, key/value heads) of a layer of that kind."""
    head_dim = text.whole("head_dim", 256)
    kv_heads = text.whole("num_key_value_heads", 4)
    if kind == FULL and "per_layer_config" not in text.values:
        given = "global_head_dim" in text.values
        head_dim = text.whole_or("global_head_dim", head_dim if given else 512)
        if text.flag("attention_k_eq_v"):
            kv_heads = text.whole_or("num_global_key_value_heads", kv_heads)
    if override is None:
        return head_dim, kv_heads
    return override.whole("head_dim", head_dim), override.whole("num_key_value_heads", kv_heads)


def _rope(text: Fields, kind: str) -> tuple[float, float]:
    """Return a kind's theta, and the share of a head's entries that is rotated."""
    given = text.object("rope_parameters")
    for name in given.values.keys() - {SLIDING, FULL}:
        raise given.wrong(name, f"inside of {SLIDING} or {FULL}")
    rope = given.object(kind)
    usual = _ROPE[kind]
    rope.one_of("rope_type", ("default", "proportional", None))
    rope.one_of("factor", (1.0, 1, None))
    factor = rope.number("partial_rotary_factor", usual.get("partial_rotary_factor", 1.0))
    return rope.number("rope_theta", usual["rope_theta"]), factor
