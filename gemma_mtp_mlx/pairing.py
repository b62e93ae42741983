"""Whether a drafter belongs to a target: what makes it impossible, and what makes it a bad idea.

A drafter reads the target's activations, and the keys and values of two of its layers: where their
shapes differ, it cannot. A drafter trained for another version of the same target fits and drafts
badly, without a sign but the speed; so it is looked for and said, with what it costs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from gemma_mtp_mlx import grid
from gemma_mtp_mlx.config import DrafterConfig, ModelConfig
from gemma_mtp_mlx.weights import Plan

# Share of drafts accepted, QAT target of 26B-A4B: github.com/mudler/LocalAI/pull/10215.
QAT_ACCEPTED, PLAIN_ACCEPTED = 0.92, 0.57
# Rms error of weights on the q4_0 grid that are packed otherwise, relative; a test measures them.
_REPACKED = {
    ("affine", 4, 32): 0.062,
    ("affine", 4, 64): 0.071,
    ("affine", 5, 64): 0.042,
    ("affine", 6, 64): 0.022,
    ("affine", 8, 64): 0.008,
    ("mxfp4", 4, 32): 0.113,
    ("mxfp8", 8, 32): 0.026,
    ("nvfp4", 4, 16): 0.103,
}
LOOKED_AT, _ROWS = "model.layers.0.mlp.gate_proj", 32  # that is looked at; every model has it


@dataclass(frozen=True, slots=True)
class Kind:
    """What a model was trained for, as far as its files tell.

    qat: whether that was the q4_0 grid. packed: (mode, bits, group size) if not on that grid.
    """

    qat: bool
    packed: tuple[str, int, int] | None = None


def check_pair(target: ModelConfig, drafter: DrafterConfig) -> None:
    """Raise ValueError, naming every difference, unless the drafter can read the target."""
    differences = list(dict.fromkeys(_differences(target, drafter)))
    if differences:
        raise ValueError(
            f"this drafter does not belong to this target: {'; '.join(differences)}. Use the "
            "target's own assistant, or --draft-model none"
        )


def _differences(target: ModelConfig, drafter: DrafterConfig) -> Iterator[str]:
    text = drafter.text
    if drafter.backbone_hidden_size != target.hidden_size:
        yield (
            f"it was made for hidden size {drafter.backbone_hidden_size}, the target has "
            f"{target.hidden_size}"
        )
    if text.vocab_size != target.vocab_size:
        yield f"vocabulary {text.vocab_size}, target {target.vocab_size}"
    if text.sliding_window != target.sliding_window:
        yield f"window {text.sliding_window}, target {target.sliding_window}"
    kinds = {layer.sliding for layer in target.layers if layer.owns_kv}
    for layer in text.layers:
        what = "sliding" if layer.sliding else "full"
        if layer.sliding not in kinds:
            yield f"layer {layer.index} reads a {what}-attention layer, the target keeps none"
            continue
        owner = target.last_owner(sliding=layer.sliding)
        if layer.head_dim != owner.head_dim:
            yield (
                f"layer {layer.index} reads heads of {layer.head_dim}, the target's layer "
                f"{owner.index} keeps {owner.head_dim}"
            )
        if layer.num_key_value_heads != owner.num_key_value_heads:
            yield (
                f"layer {layer.index} reads {layer.num_key_value_heads} key/value heads, the "
                f"target's layer {owner.index} keeps {owner.num_key_value_heads}"
            )
        if text.num_attention_heads % owner.num_key_value_heads:
            yield (
                f"{text.num_attention_heads} query heads do not divide over the target's "
                f"{owner.num_key_value_heads} key/value heads"
            )


def kind_of(plan: Plan, name: str) -> Kind:
    """Look at the name a model goes by, no path, and at a few of its weights."""
    parameter, path = f"{LOOKED_AT}.weight", plan.pieces[f"{LOOKED_AT}.weight"].stored
    path = path.removesuffix(".weight")
    read = plan.checkpoint.rows
    named = "qat" in re.split(r"[^a-z0-9]+", name.lower())
    params = plan.quantization.get(LOOKED_AT)
    rows = min(_ROWS, plan.stored(parameter).shape[0])
    if params is None:
        sample = read(f"{path}.weight", 0, rows)
        fits = sample.shape[1] % grid.GROUP == 0
        return Kind(named or (fits and grid.scale_dtype(sample, sample.dtype)[1] >= grid.ON_GRID))
    if params["mode"] == "affine" and params["bits"] == grid.BITS:
        scales, biases = (read(f"{path}.{what}", 0, rows) for what in ("scales", "biases"))
        if mx.array_equal(scales * -grid.ZERO, biases).item():
            return Kind(qat=True)
    return Kind(named, (params["mode"], params["bits"], params["group_size"]))


def doubts(target: Kind, drafter: Kind | None) -> list[str]:
    """Return what speaks against a target and its drafter, None if there is none, a line each."""
    lines = []
    if target.qat and target.packed is not None:
        error = _REPACKED.get(target.packed)
        mode, bits, group_size = target.packed
        cost = "" if error is None else f": its weights are {error:.1%} (rms) off, exactly kept 0"
        lines.append(
            f"the target was trained for the q4_0 grid and is packed on another ({mode}, {bits} "
            f"bits, groups of {group_size}){cost}; convert the -qat-q4_0-unquantized checkpoint "
            "with -q --q-mode qat"
        )
    if drafter is not None and target.qat and not drafter.qat:
        lines.append(
            f"the target is a QAT model and the drafter is not: {PLAIN_ACCEPTED:.0%} of drafts "
            f"were accepted where it was measured, instead of {QAT_ACCEPTED:.0%}; use the drafter "
            "whose name ends in -qat-q4_0-unquantized-assistant"
        )
    if drafter is not None and drafter.qat and not target.qat:
        lines.append(
            "the drafter is a QAT model's and the target is not: fewer drafts are accepted, how "
            "many was not measured; use the target's own drafter, whose name ends in -it-assistant"
        )
    return lines
