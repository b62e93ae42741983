"""What `inspect` finds out about a model before any of its weights are read, or even there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mtp_mlx import catalogue, footprint, hub, memory, remote
from gemma_mtp_mlx.checkpoint import Checkpoint
from gemma_mtp_mlx.config import DRAFTER_TYPES, DrafterConfig, ModelConfig
from gemma_mtp_mlx.convert.packing import DTYPES, Change, outputs
from gemma_mtp_mlx.convert.recipe import DRAFTER, Quantization, Recipe, default_recipe
from gemma_mtp_mlx.convert.sources import open_source
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.footprint import Footprint, Room
from gemma_mtp_mlx.pairing import check_pair
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import drafter_names, target_names
from gemma_mtp_mlx.weights import Plan, plan_weights

FOLDER, CACHE, HUB = "folder", "cache", "hub"
ROWS = (1, 4, 8)
CONTEXTS = (4096, 32_768, 131_072)
DRAFTS = (0, 2, 4, 8)
_LAYOUTS = {"gemma4_text": "text", "gemma4": "conditional", "gemma4_assistant": "drafter"}
_LAYOUTS |= {"gemma4_unified": "unified", "gemma4_unified_text": "text"}
_LAYOUTS |= {"gemma4_unified_assistant": "drafter"}


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint and where it is: FOLDER, CACHE or HUB, where it is not downloaded."""

    name: str
    where: str
    folder: Path | None
    checkpoint: Checkpoint

    @property
    def layout(self) -> str:
        """How its tensors are laid out: text, conditional, unified or drafter."""
        return _LAYOUTS.get(self.checkpoint.config.get("model_type", ""), "unknown")

    @property
    def config_layout(self) -> str:
        """How its config.json says which layers differ: published or per_layer."""
        config = self.checkpoint.config
        text = config.get("text_config", config)
        return "per_layer" if "per_layer_config" in text else "published"


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """A target.

    dtype: of its keys and values. converted_bytes: as `convert -q` packs it by default, None if it
    is packed already.
    """

    source: Source
    config: ModelConfig
    plan: Plan
    footprint: Footprint
    dtype: mx.Dtype
    skipped: dict[str, int]
    converted_bytes: int | None


@dataclass(frozen=True, slots=True)
class DrafterFacts:
    """A drafter. converted_bytes: as of a target."""

    source: Source
    config: DrafterConfig
    plan: Plan
    footprint: Footprint
    converted_bytes: int | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found. target: None if a drafter was asked for. note: why there is no drafter."""

    target: TargetFacts | None
    drafter: DrafterFacts | None
    note: str
    memory_bytes: int
    memory_given: bool

    def room(self, *, converted: bool = False) -> Room:
        """Return what fits, of the model as it is or as it would be converted."""
        assert self.target is not None
        parts: list[TargetFacts | DrafterFacts | None] = [self.target, self.drafter]
        sizes = [0 if part is None else _size(part, converted=converted) for part in parts]
        return footprint.room(self.target.config, self.target.dtype, self.memory_bytes, *sizes)

    @property
    def is_converted(self) -> bool:
        """Whether converting would leave everything as it is."""
        parts = [part for part in (self.target, self.drafter) if part is not None]
        return all(part.converted_bytes is None for part in parts)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Tokens of the contexts that are shown: those of CONTEXTS the model was made for."""
        assert self.target is not None
        longest = self.target.config.max_position_embeddings
        return tuple(context for context in CONTEXTS if context < longest) + (
            () if longest > CONTEXTS[-1] else (longest,)
        )

    def round_bytes(self, rows: int, k: int) -> float:
        """Bytes of weights that a round reads."""
        assert self.target is not None
        target = self.target.footprint
        drafter = None if self.drafter is None else self.drafter.footprint
        row = footprint.embedding_row_bytes(self.target.config, target)
        return footprint.round_bytes(target, drafter, row, rows, k)

    def kv_read_bytes(self, context: int) -> tuple[int, int]:
        """Bytes of keys and values read of one row: by a verify pass, and by one draft step."""
        assert self.target is not None
        config, dtype = self.target.config, self.target.dtype
        read = footprint.kv_read_bytes(config, dtype, context)
        if self.drafter is None:
            return read, 0
        drafter = self.drafter.config
        return read, footprint.drafter_kv_read_bytes(drafter, config, dtype, context)


def inspect(model: str, drafter: str = "auto", memory_bytes: int | None = None) -> Inspection:
    """Look at a model and its drafter. Headers are read, of a repository that is not here too.

    model: a folder or a repository. drafter: the same, auto for the model's own, or none.
    memory_bytes: what MLX may use, None for this device's.
    Raises: ValueError for what cannot be looked at, or a drafter that is another target's.
    """
    given = memory_bytes is not None
    has = memory_bytes if memory_bytes is not None else memory.device_bytes()
    source = open_model(model)
    if source.checkpoint.config.get("model_type") in DRAFTER_TYPES:
        return Inspection(None, _drafter(source), "", has, given)
    found, note = (None, "left out") if drafter == "none" else (None, "")
    if drafter == "auto":
        found, note = _own_drafter(model, source)
    elif drafter != "none":
        found = open_model(drafter)
    own = None if found is None else _drafter(found)
    target = _target(source, centroid_head=own is not None and own.config.use_ordered_embeddings)
    if own is not None:
        check_pair(target.config, own.config)
    return Inspection(target, own, note, has, given)


def open_model(name: str, folder: str = "") -> Source:
    """Open what a name stands for: a folder, a repository in the cache, or one on the hub.

    folder: of the repository, with a slash at its end.
    """
    if Path(name).expanduser().exists():
        path = hub.resolve_source(name)
        path = path / folder if folder else path
        return Source(str(path), FOLDER, path, open_source(path))
    repository, revision = hub.split_name(name)
    where = f"{repository}/{folder}".rstrip("/")
    there = hub.cached(name)
    if there is not None and (not folder or (there / folder).is_dir()):
        return Source(where, CACHE, there / folder, open_source(there / folder))
    return Source(where, HUB, None, remote.RemoteCheckpoint(repository, revision, folder))


def _own_drafter(name: str, target: Source) -> tuple[Source | None, str]:
    """Return the drafter of a target of that name: in its folder, or published beside it."""
    if target.folder is not None:
        published = hub.drafter_name(target.folder)
    elif remote.exists(*hub.split_name(name), f"{DRAFTER}config.json"):
        return open_model(name, DRAFTER), ""
    else:
        published = catalogue.drafter_repository(target.name)
    if published is None:
        return None, "none in its folder, and none known; name one with --draft-model"
    try:
        return open_model(published), ""
    except ValueError as error:
        return None, f"{published} could not be looked at: {error}"


def _target(source: Source, *, centroid_head: bool) -> TargetFacts:
    config = ModelConfig.from_dict(source.checkpoint.config)
    plan = plan_weights(Target(config), source.checkpoint, target_names(config))
    return TargetFacts(
        source,
        config,
        plan,
        footprint.target_footprint(config, plan),
        footprint.kv_dtype(plan),
        plan.skipped,
        converted_bytes(plan, "", centroid_head=centroid_head),
    )


def _drafter(source: Source) -> DrafterFacts:
    config = DrafterConfig.from_dict(source.checkpoint.config)
    plan = plan_weights(Drafter(config), source.checkpoint, drafter_names())
    return DrafterFacts(
        source,
        config,
        plan,
        footprint.drafter_footprint(config, plan),
        converted_bytes(plan, DRAFTER, centroid_head=config.use_ordered_embeddings),
    )


def converted_bytes(plan: Plan, folder: str, *, centroid_head: bool) -> int | None:
    """Return the bytes of a model after `convert -q` with its defaults; None if it is packed.

    folder: what stands before the names of its modules in a recipe.
    """
    if plan.quantization:
        return None
    recipe = Recipe(default_recipe(Quantization(), centroid_head=centroid_head))
    return sum(
        output.nbytes
        for name in plan.pieces
        for output in outputs(name, _shape(plan, name), _change(plan, name, folder, recipe))
    )


def _shape(plan: Plan, name: str) -> tuple[int, ...]:
    shape, parts = plan.stored(name).shape, plan.pieces[name].parts
    return shape if parts == 1 else (*shape[:-2], shape[-2] // parts, shape[-1])


def _change(plan: Plan, name: str, folder: str, recipe: Recipe) -> Change:
    """Return what the recipe makes of a parameter, as convert.plan has it."""
    shape, dtype = _shape(plan, name), DTYPES[plan.stored(name).dtype]
    if not name.endswith(".weight") or len(shape) < 2:
        return Change(dtype)
    chosen = recipe.choose(f"{folder}{name.removesuffix('.weight')}")
    params: dict[str, Any] | None = None if chosen is None else chosen.params
    if params is not None and shape[-1] % params["group_size"]:
        params = None
    return Change(dtype, params)


def _size(part: TargetFacts | DrafterFacts, *, converted: bool) -> int:
    if converted and part.converted_bytes is not None:
        return part.converted_bytes
    return part.footprint.weights_bytes
