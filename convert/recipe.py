"""Which modules are quantised, and how: a default, and rules of one's own before it.

Weights of linear layers, embeddings and experts are packed in groups along their last axis; a
module whose last axis does not divide stays as it is. By default what decides much and costs little
gets 8 bits: per-layer embeddings, routers and the head. A drafter is read once per drafted token
and checked by the target, so it gets 4 bits whatever the target has. A centroid head reads its
embedding row by row and chooses by small differences between centroids: both stay as they are.
"""

import fnmatch
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp_mlx.checkpoint import read_json

_MODES = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
    "qat": ((4,), (32,)),
}
MODES = tuple(_MODES)
DRAFTER = "drafter/"  # what stands before the path of a drafter's module in a rule
_FINE = ("model.embed_tokens", "model.embed_tokens_per_layer", "*.router.proj")
_CENTROID_HEAD = ("model.embed_tokens", "masked_embedding.centroids")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a weight is packed. Raises ValueError for what MLX cannot pack.

    mode: affine, mxfp4, mxfp8 or nvfp4 as mx.quantize has them, or qat: affine codes on the q4_0
    grid that the weight was trained for, see `grid`. bits, group_size: None for the mode's usual.
    """

    mode: str = "affine"
    bits: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        for name, known in zip(("bits", "group_size"), _MODES[self.mode], strict=True):
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, known[0])
            elif type(given) is not int or given not in known:
                raise ValueError(
                    f"{name} is {given!r}; with mode {self.mode} it must be {_either(known)}"
                )

    @property
    def params(self) -> dict[str, Any]:
        """What mx.quantize and config.json call it."""
        mode = "affine" if self.mode == "qat" else self.mode
        return {"group_size": self.group_size, "bits": self.bits, "mode": mode}

    @property
    def said(self) -> dict[str, Any]:
        """The same as a rule of a recipe says it."""
        return {"mode": self.mode, "bits": self.bits, "group_size": self.group_size}


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done to modules whose path fits a shell-like pattern; None: they stay as they are."""

    pattern: str
    quantization: Quantization | None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules in order: the first that fits a module decides, and one that none fits stays."""

    rules: tuple[Rule, ...]

    def choose(self, path: str) -> Quantization | None:
        """Return how a module is packed. path: with `DRAFTER` in front for a drafter's."""
        for rule in self.rules:
            if fnmatch.fnmatchcase(path, rule.pattern):
                return rule.quantization
        return None

    def as_json(self) -> dict[str, Any]:
        """Return the rules as `read_rules` reads them."""
        return {
            rule.pattern: None if rule.quantization is None else rule.quantization.said
            for rule in self.rules
        }


def default_recipe(quantization: Quantization, *, centroid_head: bool) -> tuple[Rule, ...]:
    """Return the rules for a target and its drafter. centroid_head: whether that has one."""
    qat = quantization.mode == "qat"
    group = quantization.group_size if quantization.mode in ("affine", "qat") else None
    # What is on the grid needs no more bits.
    fine = quantization if qat else Quantization("affine", 8, group)
    drafter = quantization if quantization.bits == 4 else Quantization("affine", 4, group)
    return (
        *(Rule(f"{DRAFTER}{path}", None) for path in _CENTROID_HEAD if centroid_head),
        Rule(f"{DRAFTER}*", drafter),
        *(Rule(path, fine) for path in _FINE),
        Rule("*", quantization),
    )


def read_rules(file: Path) -> list[Rule]:
    """Read a recipe file: a JSON object of pattern: {"mode", "bits", "group_size"} or null.

    Raises: ValueError naming the file and the rule for anything else.
    """
    rules = read_json(file).items()
    return [Rule(pattern, _quantization(file, pattern, said)) for pattern, said in rules]


def _quantization(file: Path, pattern: str, said: Any) -> Quantization | None:
    known = ("mode", "bits", "group_size")
    if said is None:
        return None
    if not isinstance(said, dict) or not set(said) <= set(known):
        raise ValueError(
            f"{file}, {pattern}: {json.dumps(said)[:80]} is no quantisation; give an object of "
            f"{', '.join(known)}, or null to leave these modules as they are"
        )
    try:
        return Quantization(**said)
    except ValueError as error:
        raise ValueError(f"{file}, {pattern}: {error}") from error


def check_used(rules: Iterable[Rule], paths: Sequence[str]) -> None:
    """Raise ValueError for a rule that fits none of the modules: it is misspelt."""
    for rule in rules:
        if not any(fnmatch.fnmatchcase(path, rule.pattern) for path in paths):
            raise ValueError(
                f"the recipe's rule {rule.pattern!r} fits no module; modules are called "
                f"{', '.join(paths[:2])}, ... and {paths[-1]}"
            )


def _either(values: Sequence[int]) -> str:
    *most, last = map(str, sorted(values))
    return f"{', '.join(most)} or {last}" if most else last
