"""The built-in prompts in the tokens of a model whose weights are not loaded."""

from pathlib import Path

from mlx_lm.tokenizer_utils import load

from gemma_mtp_mlx import prompt_kinds
from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.prompts import Prompts


def encode_prompts(model: Path, kind: str) -> list[list[int]]:
    """Return a kind's prompts in the model's tokens."""
    tokenizer = load(model) if (model / "tokenizer.json").is_file() else None
    config = ModelConfig.from_dict(read_config(model))
    return prompt_kinds.encode(kind, Prompts(config, tokenizer, frozenset()))
