"""Convert a target and its drafter: a source in, one finished folder out, or nothing at all.

Everything is planned from headers, so what cannot be converted is refused before a weight is read.
What is written lies in a folder beside OUT, which takes OUT's name when it is complete; ended on
the way, the same conversion goes on from its last finished file.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gemma_mtp_mlx import __version__
from gemma_mtp_mlx.checkpoint import INDEX
from gemma_mtp_mlx.convert.card import model_card
from gemma_mtp_mlx.convert.digest import Digests
from gemma_mtp_mlx.convert.journal import Journal
from gemma_mtp_mlx.convert.packing import Error
from gemma_mtp_mlx.convert.plan import WRITTEN, ModelPlan, plan_drafter, plan_target
from gemma_mtp_mlx.convert.recipe import Quantization, Rule, check_used, default_recipe
from gemma_mtp_mlx.convert.record import RECORD, Written, record
from gemma_mtp_mlx.convert.stream import Shard, shards, write_shard
from gemma_mtp_mlx.pairing import LOOKED_AT, Kind, doubts, kind_of

SHARD_BYTES = 5 << 30
_MARGIN = 64 << 20  # for tokenizers and all that is small

Work = Sequence[tuple[ModelPlan, list[Shard]]]
OnBytes = Callable[[int, int], None]  # bytes of the source converted, and in all


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion wrote. drafter: None if there was none to convert."""

    target: Written
    drafter: Written | None


def convert(
    source: str,
    out: Path,
    *,
    draft_source: str | None = None,
    quantization: Quantization | None = None,
    rules: Sequence[Rule] = (),
    dtype: str | None = None,
    repository: str | None = None,
    on_bytes: OnBytes | None = None,
) -> Report:
    """Plan a conversion and write it; arguments and errors are those of `prepare` and `write`."""
    check_out(out)
    plans = prepare(
        source, draft_source=draft_source, quantization=quantization, rules=rules, dtype=dtype
    )
    return write(plans, out, repository=repository, on_bytes=on_bytes)


def check_out(out: Path) -> None:
    """Raise ValueError if OUT holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; remove it or choose another folder")


def prepare(
    source: str,
    *,
    draft_source: str | None = None,
    quantization: Quantization | None = None,
    rules: Sequence[Rule] = (),
    dtype: str | None = None,
) -> list[ModelPlan]:
    """Return what becomes of a target and, if one is named, of its drafter.

    source, draft_source: a folder, a GGUF file or a hub repository. quantization: for the default
    recipe, None to pack nothing; rules: decide before it. dtype: of everything that is not packed;
    None keeps the source's.
    Raises: ValueError for a source that cannot be read, a drafter of another target, or a rule that
    fits nothing.
    """
    if dtype is not None and dtype not in WRITTEN:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(WRITTEN)}")
    target = plan_target(source, dtype)
    plans = [target]
    if draft_source is not None:
        plans.append(plan_drafter(draft_source, target, dtype))
    if quantization is not None or rules:
        if not any(model.unpacked for model in plans):
            raise ValueError(
                f"{source} is quantised already and would lose twice; convert the original, or "
                "leave the quantisation as it is"
            )
        ordered = any(model.centroid_head for model in plans)
        defaults = default_recipe(quantization, centroid_head=ordered) if quantization else ()
        check_used(rules, [path for model in plans for path in model.paths])
        plans = [model.with_rules((*rules, *defaults)) for model in plans]
    return plans


def doubts_of(plans: Sequence[ModelPlan]) -> list[str]:
    """Return what speaks against a pair, or against how it will be packed, a line each."""
    kinds = [_kind(model) for model in plans]
    return doubts(kinds[0], kinds[1] if len(kinds) > 1 else None)


def _kind(model: ModelPlan) -> Kind:
    """What a source was trained for, packed as it will be written."""
    found = kind_of(model.plan, model.origin[0])
    params = model.params.get(LOOKED_AT)
    if params is None or LOOKED_AT in (*model.on_grid, *model.taken):
        return found
    return replace(found, packed=(params["mode"], params["bits"], params["group_size"]))


def partial_folder(out: Path) -> Path:
    """Return where OUT is until it is complete."""
    return out.parent / f".{out.name}.partial"


def write(
    plans: Sequence[ModelPlan],
    out: Path,
    *,
    repository: str | None = None,
    on_bytes: OnBytes | None = None,
) -> Report:
    """Write the target and its drafter as MLX folders OUT and OUT/drafter.

    repository: what the model card calls the folder. OUT appears when it is complete. Ended by an
    interrupt, a kill or a full disk, the same plan goes on from the last file that was finished.
    Raises: ValueError for too little disk, an OUT that holds something, values that cannot be
    meant; OSError.
    """
    check_out(out)
    work = [(model, shards(model.folder, model.parts, SHARD_BYTES)) for model in plans]
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(partial_folder(out), _key(plans))
    try:
        _check_disk(journal, work)
        files = tuple(file for model in plans for file in model.checkpoint.files)
        with closing(Digests(files)) as digests:
            _write_shards(work, journal, on_bytes or _silent)
            cards = [model_card(plans, repository), None]
            written = [
                _finish(model, those, journal, digests, card)
                for (model, those), card in zip(work, cards, strict=False)
            ]
        journal.finish(out)
    except (KeyboardInterrupt, OSError):
        journal.close(keep=True)
        raise
    except BaseException:
        journal.close(keep=False)
        raise
    return Report(written[0], written[1] if len(written) > 1 else None)


def _silent(done: int, total: int) -> None:
    pass


def _key(plans: Sequence[ModelPlan]) -> str:
    """Tell conversions apart: by version, source files and everything that is written."""
    digest = hashlib.sha256(f"{__version__} {SHARD_BYTES}".encode())
    for plan in plans:
        for file in plan.checkpoint.files:
            facts = file.stat()
            digest.update(f"{file} {facts.st_size} {facts.st_mtime_ns}".encode())
        digest.update(repr((plan.config, plan.parts)).encode())
    return digest.hexdigest()


def _check_disk(journal: Journal, work: Work) -> None:
    left = [shard for _, those in work for shard in those if shard.name not in journal.done]
    needed = sum(shard.nbytes for shard in left) + _MARGIN
    free = shutil.disk_usage(journal.folder).free
    if needed > free:
        raise ValueError(
            f"{needed / 1e9:.1f} GB are needed for {journal.folder.parent} and {free / 1e9:.1f} "
            "GB are free there; free some, or choose a folder on another disk"
        )


def _write_shards(work: Work, journal: Journal, on_bytes: OnBytes) -> None:
    total = sum(part.nbytes for plan, _ in work for part in plan.parts)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_bytes(done, total)

    for plan, those in work:
        for shard in those:
            if shard.name in journal.done:
                advance(sum(part.nbytes for part in shard.parts))
                continue
            file = journal.folder / shard.name
            file.parent.mkdir(exist_ok=True)
            written = write_shard(shard, plan.checkpoint, file, advance)
            errors = {name: asdict(error) for name, error in written.errors.items()}
            journal.note(shard.name, {"sha256": written.sha256, "errors": errors})


def _finish(
    plan: ModelPlan, those: Sequence[Shard], journal: Journal, digests: Digests, card: str | None
) -> Written:
    """Write a model's small files, what was converted from what among them."""
    small = dict(plan.companions)
    small["config.json"] = _json({**plan.config, **plan.quantization_block})
    if card is not None:
        small["README.md"] = card.encode()
    if len(those) > 1:
        weight_map = {o.name: Path(s.name).name for s in those for p in s.parts for o in p.outputs}
        metadata = {"total_size": sum(shard.nbytes for shard in those)}
        small[INDEX] = _json({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    noted = [journal.done[shard.name] for shard in those]
    errors = {
        name.removesuffix(".weight"): Error(**error)
        for facts in noted
        for name, error in facts["errors"].items()
    }
    ranked = dict(sorted(errors.items(), key=lambda item: -item[1].relative))
    written = _written(plan, those, ranked)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
    for shard, facts in zip(those, noted, strict=True):
        files[Path(shard.name).name] = facts["sha256"]
    small[RECORD] = _json(record(plan, written, files, digests), in_order=True)
    for name, content in small.items():
        (journal.folder / plan.folder / name).write_bytes(content)
    return written


def _written(plan: ModelPlan, those: Sequence[Shard], errors: dict[str, Error]) -> Written:
    return Written(
        used=len(plan.parts),
        skipped=plan.plan.skipped,
        packed=len(errors),
        taken=len(plan.taken),
        kept=plan.kept,
        off_grid=plan.off_grid,
        on_grid=plan.on_grid,
        bytes_in=sum(part.nbytes for part in plan.parts),
        bytes_out=sum(shard.nbytes for shard in those),
        errors=errors,
    )


def _json(content: dict[str, Any], *, in_order: bool = False) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=not in_order) + "\n").encode()
