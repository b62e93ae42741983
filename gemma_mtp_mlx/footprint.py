"""What a model takes and what it reads, in bytes, from its configuration and headers alone.

Nothing here is measured: a pass reads every weight it needs once, which is what kernels aim at
(kernels/README.md, "least"). All sizes are bytes, and contexts are in tokens.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

from gemma_mtp_mlx.cache import position_bytes, ring_size, seat_size, window_bytes
from gemma_mtp_mlx.config import DrafterConfig, LayerConfig, ModelConfig
from gemma_mtp_mlx.memory import RESERVED
from gemma_mtp_mlx.weights import Plan

EMBEDDINGS, PER_LAYER, CENTROIDS = "embeddings and head", "per-layer embeddings", "centroids"
EXPERTS, REST = "experts", "norms and scalars"
# The first part of a parameter's path that is here decides.
_KINDS = {
    "embed_tokens": EMBEDDINGS,
    "embed_tokens_per_layer": PER_LAYER,
    "masked_embedding": CENTROIDS,
    "self_attn": "attention",
    "mlp": "MLP",
    "experts": EXPERTS,
    "router": "router",
    "per_layer_input_gate": "per-layer projections",
    "per_layer_projection": "per-layer projections",
    "per_layer_model_projection": "per-layer projections",
    "pre_projection": "projections",
    "post_projection": "projections",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int32", "I32": "int32"}
_MLX = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
# Hidden size, layers, experts. Source: transformers' convert_gemma4_weights.py; 12B: mlx-vlm's.
_SIZES = {
    (1536, 35, 0): "E2B",
    (2560, 42, 0): "E4B",
    (3840, 48, 0): "12B",
    (2816, 30, 128): "26B-A4B",
    (5376, 60, 0): "31B",
}


@dataclass(frozen=True, slots=True)
class Group:
    """Weights of one kind. formats: that of most bytes first; weights: how many numbers."""

    name: str
    formats: tuple[str, ...]
    weights: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales and biases included."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True, slots=True)
class Reads:
    """What a pass reads of a model's weights.

    fixed_bytes: whatever it computes; token_bytes: of each token, rows of embeddings. parts: how
    many experts, or clusters of a centroid head, there are; part_bytes: of one, in all layers;
    parts_per_token: how many a token needs.
    """

    fixed_bytes: int
    token_bytes: int
    part_bytes: int = 0
    parts: int = 0
    parts_per_token: int = 0

    def pass_bytes(self, tokens: int) -> float:
        """Bytes of a pass over so many tokens."""
        parts = distinct(self.parts, self.parts_per_token, tokens)
        return self.fixed_bytes + tokens * self.token_bytes + parts * self.part_bytes


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model's weights and what is read of them. weights_bytes: as they are held in memory."""

    groups: tuple[Group, ...]
    reads: Reads

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(group.nbytes for group in self.groups)

    @property
    def bits(self) -> float:
        """Bits per weight of all, scales and biases included."""
        return 8 * self.weights_bytes / sum(group.weights for group in self.groups)


@dataclass(frozen=True, slots=True)
class Room:
    """The memory there is, the part of it that does not depend on contexts, and what does.

    row_bytes: of one row whatever its context; position_bytes: of one position of a row;
    longest: context that the model was made for.
    """

    memory_bytes: int
    weights_bytes: int
    drafter_bytes: int
    row_bytes: int
    position_bytes: int
    longest: int

    def kv_bytes(self, rows: int, context: int) -> int:
        """Bytes of keys and values of so many rows, as a cache reserves them."""
        return rows * (self.row_bytes + seat_size(context) * self.position_bytes)

    def needed_bytes(self, rows: int, context: int) -> int:
        """Bytes of everything: weights, drafter, keys and values, and `memory.RESERVED`."""
        held = self.weights_bytes + self.drafter_bytes + RESERVED
        return held + self.kv_bytes(rows, context)

    def spare_bytes(self, rows: int, context: int) -> int:
        """Bytes that are left; negative if it does not fit."""
        return self.memory_bytes - self.needed_bytes(rows, context)

    def largest_context(self, rows: int) -> int:
        """Tokens, prompt included, that each of so many rows may have; 0 if not one fits."""
        fits = self.spare_bytes(rows, 0) // (rows * self.position_bytes)
        return max(0, min(fits, self.longest))


def size_name(config: ModelConfig) -> str | None:
    """Return which of the published sizes a target has, None for another."""
    return _SIZES.get((config.hidden_size, len(config.layers), config.num_experts))


def drafter_size_name(config: DrafterConfig) -> str | None:
    """Return the published size whose targets have a drafter's hidden size, None if none has."""
    return {key[0]: name for key, name in _SIZES.items()}.get(config.backbone_hidden_size)


def features(config: ModelConfig) -> tuple[str, ...]:
    """Say what sets a target's structure apart, in words."""
    sharing = len(config.layers) - config.num_owning_layers
    found = {
        f"per-layer embeddings of {config.hidden_size_per_layer_input}": (
            config.hidden_size_per_layer_input
        ),
        f"{sharing} layers share keys and values": sharing,
        "full layers take keys as values": any(layer.k_eq_v for layer in config.layers),
        f"mixture of {config.num_experts} experts, {config.top_k_experts} a token": (
            config.num_experts
        ),
    }
    return tuple(words for words, there in found.items() if there)


def distinct(parts: int, per_token: int, tokens: int) -> float:
    """Return how many of the parts so many tokens need, expected.

    Each token's choice is taken as uniform and independent of the others'; real routing has
    favourites, so what is read is less.
    """
    return parts * (1 - (1 - per_token / parts) ** tokens) if parts else 0.0


def kv_dtype(plan: Plan) -> mx.Dtype:
    """Return the type of a target's keys and values: its final norm's."""
    return _MLX[plan.stored("model.norm.weight").dtype]


def target_footprint(config: ModelConfig, plan: Plan) -> Footprint:
    """Return a target's: a pass reads all but the rows of embeddings and experts it has no use for.

    The head is the embedding, so that is read whole, and a row of it again for each token.
    """
    groups = _groups(plan)
    sizes = {group.name: group.nbytes for group in groups}
    rows = sizes[EMBEDDINGS] // config.vocab_size
    if PER_LAYER in sizes:
        rows += sizes[PER_LAYER] // config.vocab_size_per_layer_input
    apart = sizes.get(PER_LAYER, 0) + sizes.get(EXPERTS, 0)
    expert = sizes[EXPERTS] // config.num_experts if config.num_experts else 0
    total = sum(sizes.values())
    reads = Reads(total - apart, rows, expert, config.num_experts, config.top_k_experts)
    return Footprint(groups, reads)


def drafter_footprint(config: DrafterConfig, plan: Plan) -> Footprint:
    """Return a drafter's, of one step: of a centroid head, the clusters looked into are read."""
    groups = _groups(plan)
    total = sum(group.nbytes for group in groups)
    if not config.use_ordered_embeddings:
        return Footprint(groups, Reads(total, 0))
    clusters = _held_bytes(plan, "masked_embedding.token_ordering")
    clusters += next(group.nbytes for group in groups if group.name == EMBEDDINGS)
    count, top_k = config.num_centroids, config.centroid_intermediate_top_k
    return Footprint(groups, Reads(total - clusters, 0, clusters // count, count, top_k))


def embedding_row_bytes(config: ModelConfig, target: Footprint) -> int:
    """Bytes of one token's embedding: what a draft step reads of the target's weights."""
    table = next(group.nbytes for group in target.groups if group.name == EMBEDDINGS)
    return table // config.vocab_size


def kv_read_bytes(config: ModelConfig, dtype: mx.Dtype, context: int) -> int:
    """Bytes of keys and values that a target's pass reads of one row with so long a context.

    A layer that shares another's reads them again; a sliding layer reads its window.
    """
    return sum(
        _seen(layer, context, config.sliding_window) * _kv_bytes(layer, dtype)
        for layer in config.layers
    )


def drafter_kv_read_bytes(
    config: DrafterConfig, target: ModelConfig, dtype: mx.Dtype, context: int
) -> int:
    """Bytes of the target's keys and values that one draft step reads of one row.

    Its layers read those of the target's last layers of either kind; a window and one more.
    """
    return sum(
        _seen(layer, context, target.sliding_window + 1)
        * _kv_bytes(target.last_owner(sliding=layer.sliding), dtype)
        for layer in config.text.layers
    )


def round_bytes(
    target: Footprint, drafter: Footprint | None, row_bytes: int, rows: int, k: int
) -> float:
    """Return what a round of k drafts reads of the weights: k draft steps, then K + 1 a row.

    row_bytes: of `embedding_row_bytes`. Keys and values are not in it.
    """
    read = target.reads.pass_bytes(rows * (k + 1))
    if k:
        assert drafter is not None
        read += k * (drafter.reads.pass_bytes(rows) + rows * row_bytes)
    return read


def room(
    config: ModelConfig,
    dtype: mx.Dtype,
    memory_bytes: int,
    weights_bytes: int,
    drafter_bytes: int = 0,
) -> Room:
    """Return what fits, if MLX may use so much memory. dtype: of keys and values."""
    return Room(
        memory_bytes=memory_bytes,
        weights_bytes=weights_bytes,
        drafter_bytes=drafter_bytes,
        row_bytes=window_bytes(config, dtype, ring_size(config)),
        position_bytes=position_bytes(config, dtype),
        longest=config.max_position_embeddings,
    )


def _seen(layer: LayerConfig, context: int, window: int) -> int:
    return min(context, window) if layer.sliding else context


def _kv_bytes(layer: LayerConfig, dtype: mx.Dtype) -> int:
    return 2 * layer.num_key_value_heads * layer.head_dim * dtype.size


def _kind(name: str) -> str:
    return next((_KINDS[part] for part in name.split(".") if part in _KINDS), REST)


def _held_bytes(plan: Plan, name: str) -> int:
    """Bytes of a parameter in memory, where token ids are int32."""
    stored = plan.stored(name)
    nbytes = stored.nbytes // plan.pieces[name].parts
    return nbytes // 2 if stored.dtype == "I64" else nbytes


def _groups(plan: Plan) -> tuple[Group, ...]:
    """Return what a model's weights are, in the order of the table of kinds."""
    nbytes: dict[str, dict[str, int]] = {}
    weights: dict[str, int] = {}
    for name in plan.pieces:
        kind, (form, count) = _kind(name), _format(plan, name)
        by_format = nbytes.setdefault(kind, {})
        by_format[form] = by_format.get(form, 0) + _held_bytes(plan, name)
        weights[kind] = weights.get(kind, 0) + count
    kinds = [*dict.fromkeys(_KINDS.values()), REST]
    return tuple(
        Group(
            kind,
            tuple(sorted(nbytes[kind], key=lambda form: -nbytes[kind][form])),
            weights[kind],
            sum(nbytes[kind].values()),
        )
        for kind in kinds
        if kind in nbytes
    )


def _format(plan: Plan, name: str) -> tuple[str, int]:
    """Return the format of a parameter and how many weights it is; scales belong to a weight."""
    path, _, leaf = name.rpartition(".")
    stored = plan.stored(name)
    count = math.prod(stored.shape) // plan.pieces[name].parts
    packed = plan.quantization.get(path)
    if packed is None or leaf not in ("weight", "scales", "biases"):
        return _DTYPES[stored.dtype], count
    form = f"{packed['mode']} {packed['bits']}-bit, groups of {packed['group_size']}"
    return form, count * 32 // packed["bits"] if leaf == "weight" else 0
