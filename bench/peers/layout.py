"""The same weights in the conditional-generation layout, the only one mlx_vlm drafts with.

Names get "language_model." in front, config.json a text_config. Nothing is computed or converted,
quantised weights stay as they are.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mtp_mlx.checkpoint import Folder
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import target_names
from gemma_mtp_mlx.weights import plan_weights, read_parameters

PREFIX = "language_model."
_SHARD_BYTES = 2 << 30


def conditional_config(
    config: dict[str, Any], quantization: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return a target's config.json in this layout. quantization: of each module, by our path."""
    text, meant = config.get("text_config", config), ModelConfig.from_dict(config)
    dropped = ("architectures", "quantization", "quantization_config")
    written = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": {
            **{name: value for name, value in text.items() if name not in dropped},
            "model_type": "gemma4_text",
            # What a config may leave out, where the class it comes from has other defaults.
            "hidden_size_per_layer_input": meant.hidden_size_per_layer_input,
            "max_position_embeddings": meant.max_position_embeddings,
            "num_kv_shared_layers": len(meant.layers) - meant.num_owning_layers,
            "sliding_window": meant.sliding_window,
            "use_double_wide_mlp": bool(text.get("use_double_wide_mlp")),
        },
        "vision_config": {"num_hidden_layers": 1},  # made, found without weights, dropped
        "audio_config": None,
        "eos_token_id": [],
    }
    if quantization:
        every = list(quantization.values())
        modules = {PREFIX + path: params for path, params in quantization.items()}
        written["quantization"] = {**max(every, key=every.count), **modules}
    return written


def write_conditional(source: Path, folder: Path) -> None:
    """Write a target's weights and config into an existing folder, in this layout.

    Raises: ValueError if the config does not mean the same model in it.
    """
    checkpoint = Folder(source)
    config = ModelConfig.from_dict(checkpoint.config)
    module = Target(config)
    plan = plan_weights(module, checkpoint, target_names(config))
    shard: dict[str, mx.array] = {}
    held = number = 0
    for name, value in read_parameters(plan):
        if shard and held + value.nbytes > _SHARD_BYTES:
            mx.save_safetensors(str(folder / f"model-{number:05}.safetensors"), shard)
            shard, held, number = {}, 0, number + 1
        shard[PREFIX + name] = value
        held += value.nbytes
    mx.save_safetensors(str(folder / f"model-{number:05}.safetensors"), shard)
    written = conditional_config(checkpoint.config, plan.quantization)
    if ModelConfig.from_dict(written) != config:
        raise ValueError(f"{source}: its config.json does not fit this layout; convert it first")
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
