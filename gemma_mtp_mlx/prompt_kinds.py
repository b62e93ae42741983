"""Prompts of five kinds, eight of each, of mixed lengths: what pairs are measured and compared on.

A line of data/prompts/KIND.jsonl is {"text": ...}, a text to be continued as it is, or
{"messages": [...]}, which goes through the model's chat template.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_mtp_mlx.prompts import Message, Prompts

KINDS = ("code", "prose", "chat", "json", "repeat")
COUNT = 8  # prompts of each kind
_FOLDER = Path(__file__).parent / "data" / "prompts"


def read(kind: str) -> list[str | list[Message]]:
    """Return a kind's prompts: texts, or conversations. Raises: ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"there are no prompts {kind!r}; take one of {', '.join(KINDS)}")
    lines = (_FOLDER / f"{kind}.jsonl").read_text("utf-8").splitlines()
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [line["text"] if "text" in line else line["messages"] for line in found]


def usable(prompts: Prompts) -> Sequence[str]:
    """Return the kinds that a model can be given: without a chat template, those of plain texts.

    Raises: ValueError if it has no tokenizer.
    """
    if _tokenizer(prompts).has_chat_template:
        return KINDS
    return [kind for kind in KINDS if all(isinstance(prompt, str) for prompt in read(kind))]


def encode(kind: str, prompts: Prompts, count: int = COUNT) -> list[list[int]]:
    """Return a kind's first `count` prompts in a model's tokens.

    Raises: ValueError if the model has no tokenizer, or the kind needs a chat template it lacks.
    """
    if kind in KINDS and kind not in usable(prompts):
        raise ValueError(
            f"this model has no chat template, which the prompts {kind!r} need; put its "
            f"chat_template.jinja into its folder, or take {', '.join(usable(prompts))}"
        )
    return [prompts.encode(prompt, template=False) for prompt in read(kind)[:count]]


def _tokenizer(prompts: Prompts) -> Any:
    if prompts.tokenizer is None:
        raise ValueError(
            "this model's folder has no tokenizer.json, without which the built-in prompts cannot "
            "be encoded; put the tokenizer's files there"
        )
    return prompts.tokenizer
