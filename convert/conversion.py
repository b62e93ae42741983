"""Convert a target and its drafter: source folders in, one finished folder out, or nothing at all.

Tensors are read, cast, packed and written one at a time, so memory holds one shard and one tensor.
Everything goes to a temporary folder beside OUT, which takes OUT's name when it is complete.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mtp_mlx import hub
from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.config import DRAFTER_TYPES, DrafterConfig, ModelConfig
from gemma_mtp_mlx.convert.config import drafter_dict, target_dict
from gemma_mtp_mlx.convert.packing import Packing, Quantization, choose
from gemma_mtp_mlx.convert.writer import SHARD_BYTES, ShardWriter
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import drafter_names, target_names
from gemma_mtp_mlx.weights import Plan, plan_weights, read_parameters

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)

OnTensor = Callable[[str, int, int], None]  # parameter, parameters done, parameters in all


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one model.

    used: parameters written. skipped: stored tensors left out, by reason. quantized: modules packed
    in OUT; kept: modules that a quantisation passed over. Sizes are of weights.
    """

    used: int
    skipped: dict[str, int]
    quantized: int
    kept: tuple[str, ...]
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion wrote. drafter: None if there was none to convert."""

    target: Written
    drafter: Written | None


@dataclass(frozen=True, slots=True)
class _Options:
    quantization: Quantization | None
    dtype: str | None
    on_tensor: OnTensor
    shard_bytes: int


@dataclass(frozen=True, slots=True)
class _Source:
    """A checked source model, none of its weights read."""

    folder: Path
    config: dict[str, Any]  # config.json as it will be written
    module: Target | Drafter
    plan: Plan
    packing: Packing


def convert(
    source: str,
    out: Path,
    *,
    draft_source: str | None = None,
    quantization: Quantization | None = None,
    dtype: str | None = None,
    on_tensor: OnTensor | None = None,
) -> Report:
    """Write the target, and the drafter if one is named, as MLX folders OUT and OUT/drafter.

    source, draft_source: a folder or a hub repository. dtype: of everything that is not packed;
    None keeps the source's. OUT appears when it is complete, and not at all on an error.
    Raises: ValueError for a source that cannot be read, a drafter of another target, or an OUT that
    holds something.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; remove it or choose another folder")
    options = _Options(quantization, dtype, on_tensor or _silent, SHARD_BYTES)
    target = _open_target(hub.resolve(source), options)
    drafter = None
    if draft_source is not None:
        drafter = _open_drafter(hub.resolve(draft_source), options)
        assert isinstance(drafter.module, Drafter) and isinstance(target.module, Target)
        drafter.module.config.check_pairs_with(target.module.config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch) / out.name
        report = Report(
            _write(target, made, options),
            None if drafter is None else _write(drafter, made / "drafter", options),
        )
        made.rename(out)
    return report


def _silent(name: str, done: int, total: int) -> None:
    pass


def _open_target(folder: Path, options: _Options) -> _Source:
    raw = read_config(folder)
    if raw.get("model_type") in DRAFTER_TYPES:
        raise ValueError(f"{folder} is a drafter; give it as the draft model of a target")
    config = ModelConfig.from_dict(raw)
    module = Target(config)
    plan = plan_weights(module, folder, target_names(config))
    written = target_dict(raw, config, _dtype(plan, options))
    return _Source(folder, written, module, plan, _packing(module, plan, options))


def _open_drafter(folder: Path, options: _Options) -> _Source:
    raw = read_config(folder)
    config = DrafterConfig.from_dict(raw)
    module = Drafter(config)
    plan = plan_weights(module, folder, drafter_names())
    written = drafter_dict(raw, config, _dtype(plan, options))
    return _Source(folder, written, module, plan, _packing(module, plan, options))


def _dtype(plan: Plan, options: _Options) -> str:
    """Return the type that config.json names: the one asked for, or the final norm's."""
    norm = plan.stored[plan.pieces["model.norm.weight"].stored]
    return options.dtype or _STORED[norm.dtype]


def _packing(module: Target | Drafter, plan: Plan, options: _Options) -> Packing:
    if options.quantization is None:
        return Packing(plan.quantization, packs=False)
    if plan.quantization:
        raise ValueError(
            "the source is quantised already and would lose twice; convert the original, or leave "
            "the quantisation as it is"
        )
    ordered = isinstance(module, Drafter) and module.config.use_ordered_embeddings
    return choose(module, options.quantization, centroid_head=ordered)


def _write(source: _Source, folder: Path, options: _Options) -> Written:
    folder.mkdir()
    writer = ShardWriter(folder, options.shard_bytes)
    total, bytes_in = len(source.plan.pieces), 0
    for done, (name, value) in enumerate(read_parameters(source.plan), start=1):
        bytes_in += value.nbytes
        if options.dtype is not None and mx.issubdtype(value.dtype, mx.floating):
            value = value.astype(DTYPES[options.dtype])
        for written, tensor in source.packing.apply(name, value).items():
            writer.add(written, tensor)
        options.on_tensor(name, done, total)
    writer.finish()
    config = {**source.config, **source.packing.block()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in _COPIED:
        if (source.folder / name).is_file():
            shutil.copy(source.folder / name, folder / name)
    quantized = len(source.packing.params)
    return Written(
        total, source.plan.skipped, quantized, source.packing.kept, bytes_in, writer.nbytes
    )
