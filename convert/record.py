"""What a conversion was made from, how, and what came out: conversion.json, and its report.

Nothing in it depends on when or where the conversion ran: the same input gives the same bytes.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from gemma_mtp_mlx import __version__
from gemma_mtp_mlx.convert.digest import Digests
from gemma_mtp_mlx.convert.packing import Error
from gemma_mtp_mlx.convert.plan import ModelPlan

RECORD = "conversion.json"


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one model.

    used: parameters written. skipped: stored tensors left out, by reason. packed: modules packed;
    taken: modules that were packed in the source, taken over as they are; kept: modules that a
    quantisation passed over; off_grid: modules that QAT has not trained. Sizes are of weights.
    errors: of the packed modules, the greatest relative one first.
    """

    used: int
    skipped: dict[str, int]
    packed: int
    taken: int
    kept: tuple[str, ...]
    off_grid: tuple[str, ...]
    on_grid: tuple[str, ...]
    bytes_in: int
    bytes_out: int
    errors: dict[str, Error]

    @property
    def equal(self) -> float | None:
        """The share of weights on the grid that are exactly the source's, None if none are."""
        found = [self.errors[path] for path in self.on_grid]
        return sum(e.equal for e in found) / sum(e.count for e in found) if found else None


def record(
    plan: ModelPlan, written: Written, files: dict[str, str], digests: Digests
) -> dict[str, Any]:
    """Return conversion.json of a folder. files: the SHA-256 of every other file in it."""
    name, revision = plan.origin
    return {
        "converter": {"mlx-gemma-mtp": __version__, "mlx": version("mlx")},
        "source": {
            "name": name,
            "revision": revision,
            "files": {file.name: digests.of(file) for file in plan.checkpoint.files},
        },
        "dtype": plan.config["dtype"],
        "recipe": plan.recipe,
        "taken_as_packed": len(plan.taken),
        "equal_on_grid": written.equal,
        "off_grid": list(plan.off_grid),
        "not_packed": list(plan.kept),
        "files": dict(sorted(files.items())),
        "errors": {
            path: {
                "max": error.largest,
                "rms": _rounded(error.rms),
                "relative_rms": _rounded(error.relative),
            }
            for path, error in written.errors.items()
        },
    }


def _rounded(value: float) -> float:
    """Leave out the digits that hang on the order of a sum."""
    return float(f"{value:.6g}")
