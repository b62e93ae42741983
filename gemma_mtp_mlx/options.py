"""The options that commands share, and what is read from what was given to them."""

import json
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_mtp_mlx.progress import say

if TYPE_CHECKING:
    from gemma_mtp_mlx.api import Pair

NAME = "mlx-gemma-mtp"
MEMORY = "What MLX may use; a Mac gives it 2/3 to 3/4 of its own."
MOST_DRAFTS = 15  # round.MAX_DRAFTS, which takes long to import


class Dtype(StrEnum):
    """What `--dtype` may be."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class QMode(StrEnum):
    """What `--q-mode` may be: recipe.MODES, which takes long to import."""

    AFFINE = "affine"
    MXFP4 = "mxfp4"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"
    QAT = "qat"


def opt(metavar: str, says: str, *names: str) -> Any:
    """Return an option with a value."""
    return typer.Option(*names, metavar=metavar, help=says)


def flag(says: str, *names: str) -> Any:
    """Return an option that is there or not, or one of few."""
    return typer.Option(*names, help=says)


Model = Annotated[str | None, opt("DIR_OR_REPO", "The target; the built-in pair if not given.")]
DraftModel = Annotated[str | None, opt("DIR_OR_REPO|none", "The drafter; the target's own if not.")]
DraftTokens = Annotated[
    str, opt("auto|N", "Tokens drafted per round, 0 to 15; auto looks for the fastest.")
]
Fast = Annotated[
    bool, flag("On a GPU, MLX's kernels where they win: the same text up to numerical ties.")
]
PromptFile = Annotated[str | None, opt("FILE", "A file with a prompt; - is stdin.")]
System = Annotated[str | None, opt("TEXT", "A system message, put first.")]
NoTemplate = Annotated[bool, flag("Take the prompt as it is.", "--ignore-chat-template")]
Temp = Annotated[float, opt("T", "Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, opt("P", "Sample from the best that make up P; 1 is off.")]
TopK = Annotated[int, opt("N", "Sample from the N best tokens; 0 is off.")]
MinP = Annotated[float, opt("P", "Least probability, relative to the best; 0 is off.")]
Seed = Annotated[int | None, opt("N", "Seed for sampling; fresh if not given.")]
Think = Annotated[
    bool | None,
    flag("Whether to ask for thinking; if the model can, it is.", "--thinking/--no-thinking"),
]
ThinkingBudget = Annotated[int | None, opt("N", "Most tokens of thinking.")]


def read_prompts(texts: list[str], file: str | None) -> list[str]:
    """Return the prompts given as text and the one in a file, which is taken as it is."""
    prompts = [text.encode("utf-8", "surrogateescape") for text in texts]
    names = ["--prompt"] * len(prompts)
    if file is not None:
        prompts.append(sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes())
        names.append("standard input" if file == "-" else file)
    if not prompts:
        raise ValueError(
            "there is no prompt; give --prompt TEXT or --prompt-file FILE (- is stdin)"
        )
    return [_decode(data, name) for data, name in zip(prompts, names, strict=True)]


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {error.start} is not UTF-8; give the prompt as UTF-8 text"
        ) from error


def read_depth(text: str) -> int | None:
    """Return how many tokens to draft per round, None to let costs and acceptance decide."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) > MOST_DRAFTS:
        raise ValueError(f"--num-draft-tokens is {text}; it must be auto or 0 to {MOST_DRAFTS}")
    return int(text)


def text_or_file(given: str, sign: str) -> str:
    """Return what is given if it has what every such text has, else what is in that file."""
    return given if sign in given else _decode(Path(given).read_bytes(), given)


def read_schema(given: str) -> Any:
    """Return a JSON schema given as it is or as a file. Raises: ValueError if it is not JSON."""
    try:
        return json.loads(text_or_file(given, "{"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--json-schema is not JSON: {error}") from error


def load_pair(model: str | None, draft_model: str | None, *, fast: bool = False) -> "Pair":
    """Load what --model and --draft-model name, and say so."""
    from gemma_mtp_mlx import hub, load

    if model is None:
        say(f"{NAME}: no --model given: using the small built-in pair, trained on Python code")
    began = time.perf_counter()
    drafter = None if draft_model == "none" else draft_model or "auto"
    pair = load(hub.builtin() if model is None else model, drafter, fast=fast)
    plain = " without a drafter" if pair.drafter is None else ""
    say(f"Loaded{plain} in {time.perf_counter() - began:.1f} s", *pair.notes)
    return pair
