"""What becomes of a model: which parameters there are, where they lie and what is made of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from gemma_mtp_mlx import grid, hub, weights
from gemma_mtp_mlx.checkpoint import Checkpoint, Stored
from gemma_mtp_mlx.config import DRAFTER_TYPES, DrafterConfig, ModelConfig
from gemma_mtp_mlx.convert.config import drafter_dict, target_dict
from gemma_mtp_mlx.convert.packing import DTYPES, Change, Part, outputs
from gemma_mtp_mlx.convert.recipe import DRAFTER, Quantization, Recipe, Rule
from gemma_mtp_mlx.convert.sources import companions, open_source
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.pairing import check_pair
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import Piece, drafter_names, target_names

WRITTEN = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_NAMES = {dtype: name for name, dtype in WRITTEN.items()}
_FALLBACK = {"": Quantization("affine", 8, 32), DRAFTER: Quantization("affine", 4, 32)}
_SAMPLES, _SAMPLE_ROWS = 8, 32  # strips of a weight that are tried on the grid


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A checked source and what becomes of it; none of its weights are read.

    folder: "" or "drafter/". source: as it was named; path: where that is. config: config.json to
    be written, but for quantisation. params: of each module that is packed, in OUT. companions: the
    files a model is used with. kept: modules no rule packs, or whose rows do not divide; on_grid,
    off_grid: modules that QAT was asked for and has, or has not, trained.
    """

    folder: str
    source: str
    path: Path
    config: dict[str, Any]
    module: Target | Drafter
    plan: weights.Plan
    dtype: str | None
    parts: tuple[Part, ...]
    params: dict[str, dict[str, Any]]
    companions: dict[str, bytes]
    rules: tuple[Rule, ...] = ()
    kept: tuple[str, ...] = ()
    on_grid: tuple[str, ...] = ()
    off_grid: tuple[str, ...] = ()

    @property
    def origin(self) -> tuple[str, str | None]:
        """The source's repository and revision, or the name of its folder or file."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return hub.repository_of(folder) or (self.path.resolve().name, None)

    @property
    def checkpoint(self) -> Checkpoint:
        """What is read."""
        return self.plan.checkpoint

    @property
    def taken(self) -> tuple[str, ...]:
        """Modules that are packed in the source."""
        return tuple(self.plan.quantization)

    @property
    def paths(self) -> list[str]:
        """Modules that a rule may pack, as it names them."""
        return [f"{self.folder}{path}" for path in _packable(self.module)]

    @property
    def centroid_head(self) -> bool:
        """Whether it is a drafter that chooses among centroids first."""
        return isinstance(self.module, Drafter) and self.module.config.use_ordered_embeddings

    @property
    def recipe(self) -> dict[str, Any]:
        """The rules that decided, as a recipe file has them."""
        return Recipe(self.rules).as_json()

    @property
    def quantization_block(self) -> dict[str, Any]:
        """Return config.json's entries: defaults, and the modules that differ from them."""
        if not self.params:
            return {}
        every = list(self.params.values())
        usual = max(every, key=every.count)
        differ = {path: params for path, params in self.params.items() if params != usual}
        return {name: {**usual, **differ} for name in ("quantization", "quantization_config")}

    @property
    def unpacked(self) -> list[str]:
        """Modules that could be packed, and are not in the source."""
        return [path for path in _packable(self.module) if path not in self.plan.quantization]

    def with_rules(self, rules: Sequence[Rule]) -> "ModelPlan":
        """Pack by rules what the source has not packed.

        Raises: ValueError if QAT was asked for and most of a target is not on its grid.
        """
        return _Packer(self, Recipe(tuple(rules))).planned()


def plan_target(source: str, dtype: str | None) -> ModelPlan:
    """Open a target. source: a folder, a GGUF file or a repository; dtype: to be written."""
    path = hub.resolve_source(source)
    checkpoint = open_source(path)
    if checkpoint.config.get("model_type") in DRAFTER_TYPES:
        raise ValueError(f"{path} is a drafter; give it as the draft model of a target")
    config = ModelConfig.from_dict(checkpoint.config)
    module = Target(config)
    plan = weights.plan_weights(module, checkpoint, target_names(config))
    dtype = dtype or checkpoint.dtype
    written = target_dict(checkpoint.config, config, _dtype(plan, dtype))
    return _as_it_is("", source, path, written, module, plan, dtype)


def plan_drafter(source: str, target: ModelPlan, dtype: str | None) -> ModelPlan:
    """Open a drafter. Raises: ValueError if it does not belong to the target."""
    path = hub.resolve_source(source)
    checkpoint = open_source(path)
    config = DrafterConfig.from_dict(checkpoint.config)
    assert isinstance(target.module, Target)
    check_pair(target.module.config, config)
    module = Drafter(config)
    plan = weights.plan_weights(module, checkpoint, drafter_names())
    dtype = dtype or checkpoint.dtype
    written = drafter_dict(checkpoint.config, config, _dtype(plan, dtype))
    return _as_it_is(DRAFTER, source, path, written, module, plan, dtype)


def _dtype(plan: weights.Plan, asked: str | None) -> str:
    """Return the type that config.json names: the one asked for, or the final norm's."""
    return asked or _NAMES[_norm_dtype(plan)]


def _norm_dtype(plan: weights.Plan) -> mx.Dtype:
    return DTYPES[plan.stored("model.norm.weight").dtype]


def _as_it_is(
    folder: str,
    source: str,
    path: Path,
    config: dict[str, Any],
    module: Target | Drafter,
    plan: weights.Plan,
    dtype: str | None,
) -> ModelPlan:
    cast = None if dtype is None else WRITTEN[dtype]
    changes = {
        name: Change(_kept_dtype(name, plan.stored(name), plan, cast)) for name in plan.pieces
    }
    parts = tuple(_part(plan, name, change) for name, change in changes.items())
    params, small = plan.quantization, companions(path, plan.checkpoint)
    return ModelPlan(folder, source, path, config, module, plan, dtype, parts, params, small)


def _kept_dtype(name: str, stored: Stored, plan: weights.Plan, cast: mx.Dtype | None) -> mx.Dtype:
    """Return the type of a parameter that is not packed here."""
    own = DTYPES[stored.dtype]
    if cast is None or not mx.issubdtype(own, mx.floating):
        return own
    path = name.rpartition(".")[0]
    # Scales of another type than the model's have it for a reason: they are exact.
    exact = path in plan.quantization and own != _norm_dtype(plan)
    return own if exact else cast


def _part(plan: weights.Plan, name: str, change: Change) -> Part:
    piece, stored = plan.pieces[name], plan.stored(name)
    *lead, width = stored.shape or (1,)
    shape = stored.shape
    rows: tuple[range, ...] = (range(math.prod(lead)),)
    if piece.parts > 1:
        rows, tall = _cut(piece, lead)
        shape = (*lead[:-1], tall, width)
    row_bytes = width * DTYPES[stored.dtype].size
    return Part(name, piece.stored, rows, row_bytes, change, outputs(name, shape, change))


def _cut(piece: Piece, lead: Sequence[int]) -> tuple[tuple[range, ...], int]:
    """Return the rows of one of a tensor's equal parts along its second last axis, and how many."""
    *outer, whole = lead
    tall = whole // piece.parts
    starts = [i * whole + piece.part * tall for i in range(math.prod(outer))]
    return tuple(range(start, start + tall) for start in starts), tall


def _packable(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that can be packed, or are."""
    leaves: dict[str, Any] = dict(tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module))
    return {
        path: leaf for path, leaf in leaves.items() if "weight" in leaf and leaf.weight.ndim > 1
    }


class _Packer:
    """Applies a recipe to a model."""

    def __init__(self, model: ModelPlan, recipe: Recipe) -> None:
        self._model = model
        self._recipe = recipe
        self._changes: dict[str, Change] = {}
        self._kept: list[str] = []
        self._grid: dict[bool, list[str]] = {True: [], False: []}

    def planned(self) -> ModelPlan:
        """Return the model's plan with the recipe in it."""
        model = self._model
        for path in model.unpacked:
            self._choose(path, self._recipe.choose(f"{model.folder}{path}"))
        self._check_grid()
        packed = {
            name.removesuffix(".weight"): change.params
            for name, change in self._changes.items()
            if change.params
        }
        return replace(
            model,
            parts=tuple(
                _part(model.plan, part.name, self._changes.get(part.name, part.change))
                for part in model.parts
            ),
            params={**model.params, **packed},
            rules=self._recipe.rules,
            kept=tuple(self._kept),
            on_grid=tuple(self._grid[True]),
            off_grid=tuple(self._grid[False]),
        )

    def _choose(self, path: str, quantization: Quantization | None) -> None:
        model, name = self._model, f"{path}.weight"
        width = model.plan.stored(name).shape[-1]
        written = self._written_dtype(name)
        if quantization is not None and quantization.mode == "qat" and width % grid.GROUP == 0:
            scales, share = grid.scale_dtype(self._sample(name), written)
            trained = share >= grid.ON_GRID
            self._grid[trained].append(path)
            if trained:
                self._changes[name] = Change(scales, quantization.params, on_grid=True)
                return
            quantization = _FALLBACK[model.folder]
        if quantization is None or width % quantization.params["group_size"]:
            self._kept.append(path)
        else:
            self._changes[name] = Change(written, quantization.params)

    def _written_dtype(self, name: str) -> mx.Dtype:
        model = self._model
        return WRITTEN[model.dtype] if model.dtype else DTYPES[model.plan.stored(name).dtype]

    def _sample(self, name: str) -> mx.array:
        """Return rows from all over a weight."""
        part = _part(self._model.plan, name, Change(mx.bfloat16))
        strips = tuple(part.strips())
        some = [rows[:_SAMPLE_ROWS] for rows in strips[:: -(-len(strips) // _SAMPLES)]]
        read = self._model.checkpoint.rows
        return mx.concatenate([read(part.stored, rows.start, rows.stop) for rows in some])

    def _check_grid(self) -> None:
        """Raise ValueError if a target that QAT was asked for was not trained for it."""
        off = len(self._grid[False])
        on = len(self._grid[True]) + len(self._model.taken)
        if off > on and not self._model.folder:
            raise ValueError(
                f"{self._model.source} was not trained for the q4_0 grid: {off} of {on + off} "
                f"modules are not on it, {self._grid[False][0]} among them; convert a "
                "-qat-q4_0-unquantized checkpoint, or use another mode than qat"
            )
