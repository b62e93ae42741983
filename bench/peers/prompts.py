"""Prompts by category, as token ids. A category has eight; a batch of B takes the first B.

A line of bench/prompts/CATEGORY.jsonl is {"text": ...}, continued as it is, or {"messages": [...]},
which goes through the chat template.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "prompts"
CATEGORIES = ("code", "prose", "chat", "json", "repeat")


def read_prompts(category: str) -> list[dict[str, Any]]:
    """Return a category's prompts. Raises ValueError if there is no such category."""
    file = FOLDER / f"{category}.jsonl"
    if not file.is_file():
        raise ValueError(f"there are no prompts {category!r}; take one of {', '.join(CATEGORIES)}")
    return [json.loads(line) for line in file.read_text().splitlines()]


def encode_prompts(model: Path, category: str) -> list[list[int]]:
    """Return a category's prompts in the model's tokens."""
    from mlx_lm.tokenizer_utils import load

    if not (model / "tokenizer.json").is_file():
        raise ValueError(f"{model} has no tokenizer.json, so the prompts cannot be encoded")
    tokenizer = load(model)
    encoded = []
    for prompt in read_prompts(category):
        if "text" in prompt:
            encoded.append(tokenizer.encode(prompt["text"]))
        else:
            encoded.append(
                tokenizer.apply_chat_template(prompt["messages"], add_generation_prompt=True)
            )
    return encoded
