"""A target and its drafter as matrices and sizes: what the cost of a round is predicted from.

An outline is made from a plan, that is from headers: those of a folder or a repository, or those
that `convert` would write for one of the published families.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from gemma_mtp_mlx import footprint
from gemma_mtp_mlx.checkpoint import Stored
from gemma_mtp_mlx.config import DrafterConfig, ModelConfig
from gemma_mtp_mlx.convert.packing import Change, outputs
from gemma_mtp_mlx.convert.recipe import DRAFTER, Quantization, Recipe, Rule, default_recipe
from gemma_mtp_mlx.dispatch import Weights
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.families import TEXTS, drafter_config, target_config
from gemma_mtp_mlx.footprint import Footprint, Reads
from gemma_mtp_mlx.inspection import Inspection
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import Piece
from gemma_mtp_mlx.weights import Plan

# What --bits may say, and how each is packed; None: as published, in bfloat16.
FORMATS: dict[str, Quantization | None] = {
    "4": Quantization("affine", 4),
    "5": Quantization("affine", 5),
    "6": Quantization("affine", 6),
    "8": Quantization("affine", 8),
    "16": None,
    "mxfp4": Quantization("mxfp4"),
    "mxfp8": Quantization("mxfp8"),
    "nvfp4": Quantization("nvfp4"),
}
# Rows are taken from these, and the whole matrix is never read but where it is the head too.
_GATHERED = ("model.embed_tokens_per_layer", "masked_embedding.token_ordering")
_HEAD = "model.embed_tokens"


@dataclass(frozen=True, slots=True)
class Part:
    """A target or a drafter: the matrices that each pass multiplies by, and how many are alike.

    head: the one that makes logits, not among the matrices, None for a centroid head. experts: one
    expert's matrices, over all layers. reads: all of what a pass reads, these included.
    """

    matrices: tuple[tuple[Weights, int], ...]
    head: Weights | None
    experts: tuple[tuple[Weights, int], ...]
    reads: Reads
    weights_bytes: int

    @property
    def other_bytes(self) -> int:
        """Bytes a pass reads that are of no matrix: norms, scalars, scales of no matmul."""
        head = 0 if self.head is None else self.head.nbytes
        return self.reads.fixed_bytes - head - sum(w.nbytes * n for w, n in self.matrices)


@dataclass(frozen=True, slots=True)
class Outline:
    """A pair. name: a family's or a folder's. drafter: None if it has none. dtype: of its cache."""

    name: str
    formats: str
    config: ModelConfig
    target: Part
    drafter_config: DrafterConfig | None
    drafter: Part | None
    dtype: mx.Dtype
    embedding_row_bytes: int


class _Headers:
    """A checkpoint that is nothing but headers."""

    dtype: str | None = None
    files: tuple[Path, ...] = ()

    def __init__(self, tensors: dict[str, Stored]) -> None:
        self.config: dict[str, Any] = {}
        self.tensors = tensors

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        raise AssertionError("there are no weights to read")


def of_family(family: str, bits: str, drafter_bits: str, *, uniform: bool = False) -> Outline:
    """Return a published pair as `convert` packs it, in formats of FORMATS.

    uniform: as mlx_lm's and mlx-vlm's converters do it, which pack head and embeddings like the
    rest and only routers in 8 bits.
    """
    own, drafter = target_config(family), drafter_config(family)
    recipe = Recipe(_rules(bits, drafter_bits, drafter.use_ordered_embeddings, uniform))
    plans = (
        _planned(Target(own), "", recipe),
        _planned(Drafter(drafter), DRAFTER, recipe),
    )
    formats = f"{_spelled(bits)}, drafter {_spelled(drafter_bits)}"
    return _outline(family, formats, (own, plans[0]), (drafter, plans[1]), mx.bfloat16)


def of_inspection(found: Inspection) -> Outline:
    """Return what was inspected. Raises: ValueError if that is a drafter alone."""
    if found.target is None:
        assert found.drafter is not None
        raise ValueError(f"{found.drafter.source.name} is a drafter; predict needs its target")
    target, drafter = found.target, found.drafter
    formats = f"{target.footprint.bits:.1f} bits a weight"
    own = None
    if drafter is not None:
        formats += f", drafter {drafter.footprint.bits:.1f}"
        own = (drafter.config, drafter.plan)
    size = footprint.size_name(target.config)
    name = f"{target.source.name}{f' ({size})' if size else ''}"
    return _outline(name, formats, (target.config, target.plan), own, target.dtype)


def family_of(name: str) -> str | None:
    """Return the published family a name stands for, in any case: 26b, 26B-A4B; None if none."""
    wanted = name.lower()
    return next((f for f in TEXTS if wanted in (f.lower(), f.lower().removesuffix("-a4b"))), None)


def _spelled(bits: str) -> str:
    return {"16": "bfloat16"}.get(bits, f"{bits}-bit" if bits.isdecimal() else bits)


def _outline(
    name: str,
    formats: str,
    target: tuple[ModelConfig, Plan],
    drafter: tuple[DrafterConfig, Plan] | None,
    dtype: mx.Dtype,
) -> Outline:
    own = footprint.target_footprint(*target)
    head = _weights(target[1], f"{_HEAD}.weight")
    part = _part(target[1], own, head)
    row = footprint.embedding_row_bytes(target[0], own)
    if drafter is None:
        return Outline(name, formats, target[0], part, None, None, dtype, row)
    ordered = drafter[0].use_ordered_embeddings
    theirs = footprint.drafter_footprint(*drafter)
    tied = None if ordered else _weights(drafter[1], f"{_HEAD}.weight")
    return Outline(
        name, formats, target[0], part, drafter[0], _part(drafter[1], theirs, tied), dtype, row
    )


def _part(plan: Plan, found: Footprint, head: Weights | None) -> Part:
    matrices: Counter[Weights] = Counter()
    experts: Counter[Weights] = Counter()
    for name in plan.pieces:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path in (*_GATHERED, _HEAD) or len(plan.stored(name).shape) < 2:
            continue
        of = experts if len(plan.stored(name).shape) == 3 else matrices
        of[_weights(plan, name)] += 1
    return Part(
        tuple(matrices.items()), head, tuple(experts.items()), found.reads, found.weights_bytes
    )


def _weights(plan: Plan, name: str) -> Weights:
    """Return a matrix, or one expert's, by the shape its codes are stored in."""
    stored, parts = plan.stored(name), plan.pieces[name].parts
    rows, width = stored.shape[-2] // parts, stored.shape[-1]
    packed = plan.quantization.get(name.removesuffix(".weight"))
    if packed is None:
        size = 8 * stored.nbytes // math.prod(stored.shape)
        return Weights(rows, width, size, 1, "plain")
    bits: int = packed["bits"]
    return Weights(rows, width * 32 // bits, bits, packed["group_size"], packed["mode"])


def _rules(bits: str, drafter_bits: str, centroids: bool, uniform: bool) -> tuple[Rule, ...]:
    wanted, theirs = FORMATS[bits], FORMATS[drafter_bits]
    kept = default_recipe(Quantization(), centroid_head=centroids)
    drafter = [r for r in kept if r.pattern.startswith(DRAFTER) and r.quantization is None]
    drafter.append(Rule(f"{DRAFTER}*", theirs))
    if wanted is None:
        return (*drafter, Rule("*", None))
    if uniform:
        return (*drafter, Rule("*.router.proj", FORMATS["8"]), Rule("*", wanted))
    own = default_recipe(wanted, centroid_head=centroids)
    return (*drafter, *(rule for rule in own if not rule.pattern.startswith(DRAFTER)))


def _planned(module: Target | Drafter, folder: str, recipe: Recipe) -> Plan:
    """Return the plan of a model whose weights are packed by a recipe. folder: as in a recipe."""
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    tensors: dict[str, Stored] = {}
    quantization: dict[str, dict[str, Any]] = {}
    for name, value in parameters.items():
        if value.dtype == mx.int32:
            tensors[name] = Stored(Path(), "I32", value.shape)
            continue
        path = name.removesuffix(".weight")
        chosen = recipe.choose(f"{folder}{path}") if path != name and value.ndim > 1 else None
        params = None if chosen is None else chosen.params
        if params is not None and value.shape[-1] % params["group_size"] == 0:
            quantization[path] = params
        else:
            params = None
        for made in outputs(name, value.shape, Change(mx.bfloat16, params)):
            tensors[made.name] = Stored(Path(), made.dtype, made.shape)
    pieces = {name: Piece(name) for name in tensors}
    return Plan(_Headers(tensors), pieces, {}, quantization)
