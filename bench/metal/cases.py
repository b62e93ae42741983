"""The cases that stand for all the kernels: one model's, or those that are measured by default."""

from bench.metal.activations import attention, embedded, heads, layer_inputs, residual, routing
from bench.metal.matrices import (
    centroids,
    chosen_experts,
    gate_up,
    head,
    per_layer_gate,
    projections,
)
from bench.metal.place import Case, Place
from gemma_mtp_mlx.families import drafter_config


def cases(place: Place) -> list[Case]:
    """Return the cases of one model and pass."""
    config, hidden = place.config, place.config.hidden_size
    inner = place.layer(sliding=True).intermediate_size
    found = []
    for sliding in (True, False):
        layer = place.layer(sliding=sliding)
        queries = config.num_attention_heads * layer.head_dim
        keys = layer.num_key_value_heads * layer.head_dim
        heights = [queries, *[keys] * (1 if layer.k_eq_v else 2)]
        kind = "sliding" if sliding else "full"
        found += [
            projections(place, f"{kind}, to heads", hidden, *heights),
            projections(place, f"{kind}, from heads", queries, hidden),
            attention(place, sliding=sliding),
        ]
    found += [gate_up(place), projections(place, "down", inner, hidden)]
    found += [heads(place), residual(place), head(place), embedded(place)]
    if config.hidden_size_per_layer_input:
        found += [per_layer_gate(place), layer_inputs(place)]
    if config.num_experts:
        found += [routing(place), chosen_experts(place)]
    if drafter_config(place.model).use_ordered_embeddings:
        found.append(centroids(place))
    return found
