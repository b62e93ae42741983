"""Tiny random Gemma 4 checkpoints, target and assistant, as transformers writes and reads them.

Five families stand for the five published sizes: every structural feature is there (per-layer
embeddings, shared K/V, double-wide MLP, k_eq_v, MoE, centroid head, unified), only small. Nothing
here computes a model, so a golden made from these folders is nobody's arithmetic but
transformers'.

Weights are uniform: RandomState's stream is frozen across numpy releases, and a uniform draw
needs no libm, so a checkpoint has the same bytes on every platform. Each tensor has its own
stream (seed and the CRC of its name), so a layout that adds tensors changes none of the others.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoint_specs import Specs, assistant_specs, text_specs, unused_specs
from tests.families import EOS, FAMILIES, UNIFIED, assistant_config, target_config

__all__ = ["FAMILIES", "layouts", "sha256", "write_assistant", "write_checkpoint", "write_pair"]

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Tensors = dict[str, np.ndarray]


def _draw(specs: Specs, seed: int, stream: str) -> Tensors:
    tensors = {}
    for name, (shape, low, high) in specs.items():
        state = np.random.RandomState([seed, zlib.crc32(f"{stream}.{name}".encode())])
        tensors[name] = (low + (high - low) * state.random_sample(shape)).astype(np.float32)
    return tensors


def sha256(tensors: Tensors) -> str:
    """Hash names, shapes and bytes of float32 or int64 tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}:{value.dtype.str}:{value.shape};".encode())
        digest.update(value.astype(value.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _encode(value: np.ndarray, dtype: str) -> tuple[str, bytes]:
    """Cast a float32 tensor (nearest, ties to even): its safetensors type and its bytes."""
    if value.dtype == np.int64:
        return "I64", value.astype("<i8").tobytes()
    if dtype == "bfloat16":
        bits = value.view(np.uint32).astype(np.uint64)
        return DTYPES[dtype], ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return DTYPES[dtype], value.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def _write_safetensors(path: Path, tensors: Tensors, dtype: str) -> None:
    """Write the safetensors format itself: numpy has no bfloat16 for the library to take."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, value in tensors.items():
        kind, encoded = _encode(value, dtype)
        span = [len(data), len(data) + len(encoded)]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": span}
        data += encoded
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _save(folder: Path, tensors: Tensors, dtype: str, shards: int) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {sorted(DTYPES)}")
    names, where = sorted(tensors), {}
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        number = "" if shards == 1 else f"-{shard + 1:05}-of-{shards:05}"
        file = f"model{number}.safetensors"
        _write_safetensors(folder / file, part, dtype)
        where.update(dict.fromkeys(part, file))
    if shards > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def layouts(family: str) -> tuple[str, ...]:
    """Return the tensor layouts a family's target is published in."""
    return ("text", "unified" if family in UNIFIED else "conditional")


def write_checkpoint(
    folder: Path,
    family: str,
    *,
    layout: str = "text",
    config_layout: str = "published",
    seed: int = 0,
    dtype: str = "float32",
) -> str:
    """Write a target and return the SHA-256 of its text tensors, which no layout or dtype changes.

    layout: "text" (ForCausalLM, one file), "conditional" or "unified" (multimodal, two shards).
    config_layout: "published" (global_head_dim) or "per_layer" (as transformers >= 5.17 saves it).
    """
    config = target_config(family, layout, config_layout, dtype)
    plain = target_config(family, "text", "published", dtype)
    drawn = _draw(text_specs(plain), seed, "target")
    prefix = "model." if layout == "text" else "model.language_model."
    tensors = {prefix + name: value for name, value in drawn.items()}
    if layout != "text":
        tensors.update(_draw(unused_specs(family, plain), seed, "target"))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, tensors, dtype, shards=1 if layout == "text" else 2)
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": 2, "eos_token_id": EOS, "pad_token_id": 0}
    _write_json(folder / "generation_config.json", generation)
    return sha256(drawn)


def write_assistant(
    folder: Path,
    family: str,
    *,
    config_layout: str = "published",
    seed: int = 0,
    dtype: str = "float32",
) -> str:
    """Write the drafter of a family's target and return the SHA-256 of its tensors."""
    config = assistant_config(family, config_layout, dtype)
    plain = assistant_config(family, "published", dtype)
    tensors = _draw(assistant_specs(plain), seed, "assistant")
    if plain["use_ordered_embeddings"]:
        state = np.random.RandomState([seed, zlib.crc32(b"assistant.token_ordering")])
        draws = state.random_sample(plain["text_config"]["vocab_size"])
        ordering = np.argsort(draws, kind="stable")
        tensors["masked_embedding.token_ordering"] = ordering.astype(np.int64)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, tensors, dtype, shards=1)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": 1, "num_assistant_tokens": 4})
    return sha256(tensors)


def write_pair(
    folder: Path,
    family: str,
    *,
    layout: str = "text",
    config_layout: str = "published",
    seed: int = 0,
    dtype: str = "float32",
) -> tuple[Path, Path]:
    """Write folder/target and folder/assistant and return both paths."""
    target, assistant = Path(folder) / "target", Path(folder) / "assistant"
    write_checkpoint(
        target, family, layout=layout, config_layout=config_layout, seed=seed, dtype=dtype
    )
    write_assistant(assistant, family, config_layout=config_layout, seed=seed, dtype=dtype)
    return target, assistant
