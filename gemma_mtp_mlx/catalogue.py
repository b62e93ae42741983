"""The published Gemma 4 models: their repositories, short names, and which drafter is whose.

A drafter predicts from its target's activations, so it goes with every copy of that target however
it is quantised, but not with fine-tunes. A target trained for quantisation (QAT) has a drafter of
its own; with the other one fewer drafts are accepted. Base models have none.
Sources: huggingface.co/collections/google/gemma-4, huggingface.co/mlx-community (the spelling of
the names differs between its collections "Gemma 4" and "Gemma 4 QAT").
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """One size: what it is called, and how it is spelled in the names of the ready-made copies."""

    name: str  # as Google spells it
    tag: str  # in short names
    ready: str  # in mlx-community's plain copies

    @property
    def google(self) -> str:
        """The instruction-tuned target as it was published."""
        return f"google/gemma-4-{self.name}-it"

    @property
    def qat(self) -> str:
        """The target that was trained for 4 bits, its weights not packed."""
        return f"{self.google}-qat-q4_0-unquantized"

    def drafter(self, *, qat: bool) -> str:
        """Return the repository of this size's drafter."""
        return f"{self.qat if qat else self.google}-assistant"

    def copies(self) -> dict[str, str]:
        """Return the repositories that short names stand for, by what follows the size."""
        plain = f"mlx-community/gemma-4-{self.ready}-it"
        qat = f"mlx-community/gemma-4-{self.name}-it-qat"
        return {
            "": f"{plain}-4bit",
            "-4bit": f"{plain}-4bit",
            "-8bit": f"{plain}-8bit",
            "-bf16": self.google,
            "-qat": f"{qat}-4bit",
            "-qat-4bit": f"{qat}-4bit",
            "-qat-8bit": f"{qat}-8bit",
            "-qat-bf16": self.qat,
        }

    def published(self) -> list[str]:
        """Return Google's repositories of this size, targets and drafters."""
        names = [self.google, self.qat, f"{self.google}-qat-q4_0-gguf"]
        if self.name != "26B-A4B":
            names.append(f"{self.google}-qat-w4a16-ct")
        return [*names, self.drafter(qat=False), self.drafter(qat=True)]


SIZES = (
    Size("E2B", "e2b", "e2b"),
    Size("E4B", "e4b", "e4b"),
    Size("12B", "12b", "12B"),
    Size("26B-A4B", "26b", "26b-a4b"),
    Size("31B", "31b", "31b"),
)
SHORT = "gemma4:"
_NAME = re.compile(r"gemma-4-(e2b|e4b|12b|26b-a4b|26b|31b)(?![a-z0-9])(.*)")
# What names say of a format. Anything else in a name may be another training.
_FORMAT = re.compile(
    r"qat|unquantized|gguf|ct|mobile|mlx|ud|unsloth|bnb|dynamic|dwq|optiq|gptq|awq|mtp"
    r"|q\d(_\d|_k(_[sml]|_xl)?)?|iq\d\w*|oq\d\w*|w\d+a\d+|\d(\.\d)?bit|bf16|f?p?16|f?p?32|fp8"
    r"|mxfp\d|nvfp4|int\d|g(s|roup)?\d+"
)


def repository(short_name: str) -> str:
    """Return the repository a short name such as gemma4:26b or gemma4:e4b-qat stands for.

    Raises: ValueError listing the short names there are.
    """
    prefix, _, tag = short_name.lower().partition(":")
    known = {
        size_tag + suffix: name
        for size in SIZES
        for size_tag in {size.tag, size.name.lower()}
        for suffix, name in size.copies().items()
    }
    if f"{prefix}:" != SHORT or tag not in known:
        tags = ", ".join(f"{SHORT}{size.tag}" for size in SIZES)
        endings = ", ".join(ending for ending in SIZES[0].copies() if ending)
        raise ValueError(
            f"there is no short name {short_name}; there are {tags}, alone or with {endings}"
        )
    return known[tag]


def drafter_repository(name: str) -> str | None:
    """Return Google's drafter of a target, or None for what has none that is known.

    name: a repository of Google's or of a copy in any format, in any case, with or without
    @revision. A fine-tune, a base model and a drafter have none.
    """
    size, rest = _parse(name)
    if size is None or not rest.startswith("-it"):
        return None
    words = [word for word in rest.removeprefix("-it").split("-") if word]
    if not all(_FORMAT.fullmatch(word) for word in words):
        return None
    return size.drafter(qat="qat" in words)


def is_qat(name: str) -> bool:
    """Return whether a repository holds a model trained for quantisation, or its drafter."""
    return "qat" in _parse(name)[1].split("-")


def is_drafter(name: str) -> bool:
    """Return whether a repository holds a drafter, by its name."""
    return "assistant" in _parse(name)[1].split("-")


def size_of(name: str) -> str | None:
    """Return a Gemma 4 repository's size as Google spells it, None if it is none by its name."""
    size, _ = _parse(name)
    return None if size is None else size.name


def _parse(name: str) -> tuple[Size | None, str]:
    """Return a repository's size and what its name says after it, in lower case."""
    last = name.partition("@")[0].rpartition("/")[2].lower().removesuffix(".gguf")
    found = _NAME.fullmatch(last)
    if found is None:
        return None, ""
    tag = found[1].removesuffix("-a4b")
    return next(size for size in SIZES if size.tag == tag), found[2]
