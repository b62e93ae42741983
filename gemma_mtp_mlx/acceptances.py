"""Which share of drafts is accepted, by kind of prompt, and what a round then gains."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of prompt. chances: of each draft if all before it agreed; beyond, as the last."""

    chances: tuple[float, ...]
    source: str
    note: str


def _read() -> dict[str, Kind]:
    text = files("gemma_mtp_mlx").joinpath("data/acceptances.json").read_text()
    kinds = json.loads(text)["kinds"]
    return {n: Kind(tuple(k["chances"]), k["source"], k["note"]) for n, k in kinds.items()}


KINDS = _read()


def tokens_per_round(chances: Sequence[float], k: int) -> float:
    """Return what a row gains by a round of k drafts, the target's own token included."""
    total, agreed = 1.0, 1.0
    for i in range(k):
        agreed *= chances[min(i, len(chances) - 1)]
        total += agreed
    return total
