"""A prompt's keys and values in a file (safetensors), up to its last whole chunk."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from gemma_mtp_mlx.config import ModelConfig

FORMAT = "1"


class PromptCache(NamedTuple):
    """The first tokens of a prompt and what prefill has made of them.

    tokens: whole chunks of `chunk`; full: [2G, n, D] per owning full layer; window: the last
    positions per owning sliding layer, in order.
    """

    tokens: Sequence[int]
    chunk: int
    full: dict[int, mx.array]
    window: dict[int, mx.array]


def write_prompt_cache(file: Path, saved: PromptCache, model: str) -> None:
    """Write a prompt cache; an older file is replaced when the new one is complete.

    model: fingerprint of the target the cache belongs to.
    """
    arrays = {"tokens": mx.array(list(saved.tokens))}
    for kind, layers in (("full", saved.full), ("window", saved.window)):
        for index, kv in layers.items():
            arrays[f"{kind}.{index}"] = kv
    metadata = {"format": FORMAT, "chunk": str(saved.chunk), "model": model}
    part = file.with_name(f".{file.name}.part.safetensors")
    try:
        mx.save_safetensors(str(part), arrays, metadata)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def cached_tokens(file: Path) -> int:
    """Return how many tokens a prompt cache holds. Raises: ValueError if it is not one."""
    return _load(file)[0]["tokens"].size


def read_prompt_cache(file: Path, model: str, config: ModelConfig, chunk: int) -> PromptCache:
    """Read a prompt cache.

    Raises: ValueError if it is not one, or was made with another model or chunk size.
    """
    arrays, metadata = _load(file)
    if metadata.get("model") != model or metadata.get("chunk") != str(chunk):
        raise ValueError(f"{file} was made with another model; make it again with this one")
    layers = {
        kind: {
            layer.index: arrays[f"{kind}.{layer.index}"]
            for layer in config.layers
            if layer.owns_kv and layer.sliding == (kind == "window")
        }
        for kind in ("full", "window")
    }
    tokens: list[int] = arrays["tokens"].tolist()  # type: ignore[assignment]
    return PromptCache(tokens, chunk, layers["full"], layers["window"])


def _load(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Open a file. Returns its arrays, which are read when they are needed, and its metadata."""
    try:
        loaded = mx.load(str(file), format="safetensors", return_metadata=True)
    except RuntimeError as error:
        raise ValueError(f"{file} is not a prompt cache: {error}") from error
    arrays: dict[str, mx.array]
    metadata: dict[str, str]
    arrays, metadata = loaded  # type: ignore[assignment]
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file} is not a prompt cache of this version; make it again")
    return arrays, metadata
