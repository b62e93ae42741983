"""Write the trained pair as two ordinary Hugging Face checkpoints: python -m training.export.

The configs have the published layout (`global_head_dim`, not the `per_layer_config` that newer
transformers save), with every field explicit that mlx-lm would otherwise fill with another
default. Weights are rounded to bfloat16. `training.verify` then checks the folders against
transformers and mlx-lm.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from training.drafter import DRAFTER_SIZE, Drafter
from training.target import FULL, FULL_ROTARY_FACTOR, ROPE_THETA, SLIDING, Size, Target
from training.tokenizer import BOS, EOS, PAD, TURN_END, write_tokenizer
from training.train_target import grow, half_size

MAX_POSITIONS = 4096
NUM_ASSISTANT_TOKENS = 4
MAX_NEW_TOKENS = 512  # of an answer that nobody limits: the target soon repeats itself


def text_config(size: Size, shared_layers: int) -> dict:
    """Return the gemma4_text configuration of one model of the pair."""
    return {
        "model_type": "gemma4_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        "bos_token_id": BOS,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "eos_token_id": EOS,
        "final_logit_softcapping": None if shared_layers else size.softcap,
        "global_head_dim": size.global_head_dim,
        "head_dim": size.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": size.hidden,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate,
        "layer_types": list(size.layer_types),
        "max_position_embeddings": MAX_POSITIONS,
        "num_attention_heads": size.heads,
        "num_global_key_value_heads": None,
        "num_hidden_layers": len(size.layer_types),
        "num_key_value_heads": 1,
        "num_kv_shared_layers": shared_layers,
        "pad_token_id": PAD,
        "rms_norm_eps": size.eps,
        "rope_parameters": {
            FULL: {
                "partial_rotary_factor": FULL_ROTARY_FACTOR,
                "rope_theta": ROPE_THETA[FULL],
                "rope_type": "proportional",
            },
            SLIDING: {"rope_theta": ROPE_THETA[SLIDING], "rope_type": "default"},
        },
        "sliding_window": size.window,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": size.vocab,
        "vocab_size_per_layer_input": 0,
    }


def target_config() -> dict:
    """Return the target's config.json."""
    return {"architectures": ["Gemma4ForCausalLM"], **text_config(Size(), 0)}


def drafter_config() -> dict:
    """Return the drafter's config.json."""
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": Size().hidden,
        "bos_token_id": BOS,
        "dtype": "bfloat16",
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "text_config": text_config(DRAFTER_SIZE, len(DRAFTER_SIZE.layer_types)),
        "tie_word_embeddings": True,
        "use_ordered_embeddings": False,
    }


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_weights(path: Path, model: nn.Module) -> None:
    """Write the model's tensors in bfloat16."""
    tensors = {name: x.detach().bfloat16().contiguous() for name, x in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def read_target(path: Path) -> Target:
    """Return the target of a checkpoint, grown if it is still half."""
    state = torch.load(path, weights_only=True)
    grown = state["progress"]["grown_at"] >= 0
    target = Target(Size() if grown else half_size())
    target.load_state_dict(state["model"])
    return target if grown else grow(target)


def read_drafter(path: Path, target: Target) -> Drafter:
    """Return the drafter of a checkpoint."""
    drafter = Drafter(DRAFTER_SIZE, target.size.hidden)
    drafter.load_state_dict(torch.load(path, weights_only=True)["model"])
    return drafter


def export_pair(run: Path, out: Path) -> None:
    """Write out/target and out/drafter from the run's checkpoints, replacing older ones."""
    fresh = out.with_name(out.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "target").mkdir(parents=True)
    (fresh / "drafter").mkdir()
    target = read_target(run / "target.pt")
    write_weights(fresh / "target" / "model.safetensors", target)
    write_json(fresh / "target" / "config.json", target_config())
    ids = {"bos_token_id": BOS, "pad_token_id": PAD}
    ends = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": [EOS, TURN_END]}
    write_json(fresh / "target" / "generation_config.json", {**ids, **ends})
    write_tokenizer(run / "tokenizer.json", fresh / "target")
    write_weights(fresh / "drafter" / "model.safetensors", read_drafter(run / "drafter.pt", target))
    write_json(fresh / "drafter" / "config.json", drafter_config())
    assistant = {"num_assistant_tokens": NUM_ASSISTANT_TOKENS}
    assistant["num_assistant_tokens_schedule"] = "constant"
    write_json(
        fresh / "drafter" / "generation_config.json", {**ids, "eos_token_id": EOS, **assistant}
    )
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True, help="gets target/ and drafter/")
    args = parser.parse_args()
    export_pair(args.run, args.out)


if __name__ == "__main__":
    main()
