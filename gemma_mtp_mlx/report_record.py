"""Everything a report says, and report.json: what was measured, with what, on what, by whom not.

A report is made to be attached to a public page: it has no path of the machine it comes from, and
neither its name nor its user's.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_mtp_mlx import doctor_report, hub
from gemma_mtp_mlx.checkpoint import read_json
from gemma_mtp_mlx.doctor import Diagnosis
from gemma_mtp_mlx.footprint import drafter_size_name, size_name
from gemma_mtp_mlx.inspection import DrafterFacts, Inspection, TargetFacts
from gemma_mtp_mlx.machine import Machine
from gemma_mtp_mlx.measure import Measured, Speed

SCHEMA = 1
FILE, THROUGHPUT, ACCEPTANCE = "report.json", "throughput.png", "acceptance.png"
BUILTIN = "the built-in pair"
_CONVERTED = "conversion.json"
# Home folders, also those of others, and what a hub's name may be.
_HOME = re.compile(r"/(?:Users|home)/[^/\s\"'`]+|/root\b")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Model:
    """A target or a drafter.

    size: which of the published ones, None if none. formats: how each kind of weights is stored.
    revision: on the hub, of the model or of what it was converted from; sha256: of its files, from
    conversion.json, none without one.
    """

    name: str
    size: str | None
    bits_per_weight: float
    weights_bytes: int
    formats: dict[str, str]
    revision: str | None
    sha256: dict[str, str]


@dataclass(frozen=True, slots=True)
class Predicted:
    """What was not measured: tokens per second that the cost model says rounds of a depth give."""

    kind: str
    rows: int
    depth: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """command: that makes the same report.

    predicted: of what was measured, nothing for a chip whose figures are not known. load_average:
    of one minute, before and after.
    """

    date: str
    command: str
    machine: Machine
    versions: dict[str, str]
    target: Model
    drafter: Model | None
    doctor: Diagnosis
    measured: tuple[Measured, ...]
    predicted: tuple[Predicted, ...]
    load_average: tuple[float, float]


def models(found: Inspection, target: Path, drafter: Path | None) -> tuple[Model, Model | None]:
    """Return what was found in the folders of a pair."""
    assert found.target is not None
    own = _model(target, found.target, size_name(found.target.config))
    if drafter is None or found.drafter is None:
        return own, None
    return own, _model(drafter, found.drafter, drafter_size_name(found.drafter.config))


def _model(folder: Path, facts: TargetFacts | DrafterFacts, size: str | None) -> Model:
    record = folder / _CONVERTED
    converted = read_json(record) if record.is_file() else {}
    source = converted.get("source") or {}
    snapshot = hub.repository_of(folder)
    return Model(
        public_name(folder),
        size,
        round(facts.footprint.bits, 3),
        facts.footprint.weights_bytes,
        {group.name: ", ".join(group.formats) for group in facts.footprint.groups},
        snapshot[1] if snapshot else source.get("revision"),
        converted.get("files") or {},
    )


def public_name(folder: Path) -> str:
    """Return what a model is called where nobody knows this machine's folders."""
    if folder.resolve().is_relative_to(hub.builtin().resolve()):
        return BUILTIN if folder.resolve() == hub.builtin().resolve() else f"{BUILTIN}'s drafter"
    name = hub.known_as(folder)
    return name if _REPOSITORY.fullmatch(name) else Path(name).name


def deepest(measured: Sequence[Measured]) -> list[tuple[Measured, Speed]]:
    """Return of each kind its most rows at the greatest fixed depth; none without a drafter."""
    chosen: dict[str, tuple[Measured, Speed]] = {}
    for each in sorted(measured, key=lambda m: m.rows):
        speed = max(each.speeds, key=lambda s: s.depth or 0)
        if speed.depth:
            chosen[each.kind] = (each, speed)
    return list(chosen.values())


def as_json(report: Report) -> str:
    """Return report.json."""
    found = asdict(report) | {"doctor": doctor_report.as_json(report.doctor)}
    head = {"schema": SCHEMA, "apple_gpu": report.machine.apple_gpu}
    return json.dumps({**head, **found}, indent=1, ensure_ascii=False)


def without_paths(text: str, *folders: Path) -> str:
    """Return a text in which folders, named by their full paths, have their names only."""
    for folder in folders:
        for path in (folder.absolute(), folder.resolve()):
            text = text.replace(str(path), public_name(folder))
    return _HOME.sub("~", text.replace(str(Path.home()), "~"))
