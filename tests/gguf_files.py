"""Tiny GGUF files as llama.cpp writes them, made from the tiny checkpoints.

Keys and tensor names come from the gguf package's own tables and methods, and what is written
follows llama.cpp's conversion/gemma.py, so nothing here is shared with the reader under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from tests.checkpoints import write_checkpoint

Values = dict[str, np.ndarray]
Choose = Callable[[str, np.ndarray], Type]
Edit = Callable[[gguf.GGUFWriter], Any]  # changes what a file will hold
PACKED = {Type.Q4_0: 32, Type.Q4_1: 32, Type.Q8_0: 32, Type.Q6_K: 256}
FILE = "model.gguf"


def dense(name: str, value: np.ndarray) -> Type:
    return Type.F32


def mostly(packed: Type) -> Choose:
    """Return llama.cpp's choice for a file of that type: matrices that divide, not the router."""

    def choose(name: str, value: np.ndarray) -> Type:
        if value.ndim < 2 or "ffn_gate_inp" in name:
            return Type.F32
        return packed if value.shape[-1] % PACKED.get(packed, 1) == 0 else Type.F16

    return choose


def read_values(folder: Path) -> Values:
    """Return a checkpoint's tensors in float32."""
    stored = mx.load(str(folder / "model.safetensors"))
    assert isinstance(stored, dict)
    return {name: np.array(value.astype(mx.float32)) for name, value in stored.items()}


def write_gguf(
    folder: Path,
    choose: Choose = dense,
    *,
    split_experts: bool = False,
    edit: Edit | None = None,
) -> tuple[Path, dict[str, np.ndarray]]:
    """Write FILE beside a checkpoint and return it, and what its tensors mean by their names."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(folder / FILE, "gemma4")
    _add_metadata(writer, config)
    meant = {}
    for name, value in _renamed(config, read_values(folder), split_experts).items():
        meant[name] = _add_tensor(writer, name, value, choose(name, value))
    pairs = config["global_head_dim"] // 2
    turning = int(pairs * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    divisors = np.array([1.0] * turning + [1e30] * (pairs - turning), np.float32)
    writer.add_tensor("rope_freqs.weight", divisors)
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / FILE, meant


def write(folder: Path, family: str, choose: Choose = dense, **options: Any) -> tuple[Path, Any]:
    write_checkpoint(folder, family)
    return write_gguf(folder, choose, **options)


def pack(value: np.ndarray, kind: Type) -> np.ndarray:
    """Return a tensor's bytes in that type. Of Q6_K, which gguf cannot write: any bytes."""
    if kind == Type.Q6_K:
        blocks = value.reshape(-1, 256)
        state = np.random.RandomState(len(blocks))
        packed = state.randint(0, 256, (len(blocks), 210), np.uint8)
        packed[:, 208:] = np.abs(blocks).max(-1, keepdims=True).astype("<f2").view(np.uint8)
        return packed.reshape(*value.shape[:-1], -1)
    return gguf.quants.quantize(value, kind)


def _add_tensor(writer: gguf.GGUFWriter, name: str, value: np.ndarray, kind: Type) -> np.ndarray:
    packed = pack(value, kind)
    writer.add_tensor(name, packed, raw_dtype=kind)
    return gguf.quants.dequantize(packed, kind)


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    layers, shared = len(sliding), config["num_kv_shared_layers"]
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    width = config["intermediate_size"]
    if config["use_double_wide_mlp"]:
        owning = layers - shared
        writer.add_feed_forward_length([width] * owning + [2 * width] * shared)
    else:
        writer.add_feed_forward_length(width)
    writer.add_head_count(config["num_attention_heads"])
    kv_heads, full = config["num_key_value_heads"], config["num_global_key_value_heads"]
    if full is None:
        writer.add_head_count_kv(kv_heads)
    else:
        writer.add_head_count_kv([kv_heads if slides else full for slides in sliding])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config.get("hidden_size_per_layer_input") or 0)
    writer.add_sliding_window_pattern(sliding)
    for add, name in (
        (writer.add_key_length, "global_head_dim"),
        (writer.add_value_length, "global_head_dim"),
        (writer.add_rope_dimension_count, "global_head_dim"),
        (writer.add_key_length_swa, "head_dim"),
        (writer.add_value_length_swa, "head_dim"),
        (writer.add_rope_dimension_count_swa, "head_dim"),
    ):
        add(config[name])
    if config.get("enable_moe_block"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _renamed(config: dict[str, Any], values: Values, split_experts: bool) -> Values:
    """Return tensors by llama.cpp's names."""
    layers = len(config["layer_types"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, layers)
    renamed: Values = {}
    for name, value in values.items():
        layer = name.split(".")[2]
        if name.endswith("router.scale"):
            renamed[f"blk.{layer}.ffn_gate_inp.scale"] = value
        elif name.endswith("per_expert_scale"):
            renamed[f"blk.{layer}.ffn_down_exps.scale"] = value
        elif name.endswith("gate_up_proj") and split_experts:
            gate, up = np.split(value, 2, axis=1)
            renamed[f"blk.{layer}.ffn_gate_exps.weight"] = gate
            renamed[f"blk.{layer}.ffn_up_exps.weight"] = up
        else:
            whole = name.removesuffix(".weight")
            found = table.get_name(whole)
            assert found is not None, name
            renamed[f"{found}.weight"] = value
    return renamed


CONTROL = ["<pad>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>"]
USER_DEFINED = ["<|channel>", "<b>"]  # the first is special in Gemma, the second is not
TEXT = "a small text, small as texts are\nand  with two spaces\n\nthe end of the text"


def gemma_tokenizer() -> dict[str, Any]:
    """Return tokenizer.json of a small tokenizer laid out as Gemma's is."""
    learned = Tokenizer(BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.train_from_iterator([TEXT] * 3, BpeTrainer(vocab_size=60, show_progress=False))
    pieces: dict[str, int] = json.loads(learned.to_str())["model"]["vocab"]
    order = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", *USER_DEFINED]
    order += [f"<0x{byte:02X}>" for byte in range(256)]
    order += sorted(pieces, key=pieces.__getitem__)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    start = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token, **flags, "special": token != "<b>"}
            for id, token in enumerate(order[:9])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(order)},
            "merges": json.loads(learned.to_str())["model"]["merges"],
        },
    }


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Add gemma_tokenizer as llama.cpp does, with <turn|> as EOS and <eos> a plain token."""
    tokenizer = gemma_tokenizer()
    vocab = tokenizer["model"]["vocab"]
    kinds = dict.fromkeys(vocab, gguf.TokenType.NORMAL)
    kinds.update(dict.fromkeys(CONTROL, gguf.TokenType.CONTROL))
    kinds.update(dict.fromkeys(USER_DEFINED, gguf.TokenType.USER_DEFINED))
    kinds.update({token: gguf.TokenType.BYTE for token in vocab if token.startswith("<0x")})
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(list(vocab))
    writer.add_token_scores([-1000.0] * len(vocab))
    writer.add_token_types(list(kinds.values()))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocab["<bos>"])
    writer.add_eos_token_id(vocab["<turn|>"])
    writer.add_unk_token_id(vocab["<unk>"])
    writer.add_pad_token_id(vocab["<pad>"])
    writer.add_mask_token_id(vocab["<mask>"])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ bos_token }}<|turn>{{ messages[0]['content'] }}<turn|>")
    writer.add_float32("general.sampling.top_p", 0.95)


def set_value(key: str, value: Any, kind: gguf.GGUFValueType = gguf.GGUFValueType.UINT32) -> Edit:
    """Return an edit that gives a key another value; an array is one of whole numbers."""

    def edit(writer: gguf.GGUFWriter) -> None:
        sub = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.ARRAY else None
        writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, kind, sub)

    return edit


def drop_value(key: str) -> Edit:
    return lambda writer: writer.kv_data[0].pop(key)


def drop_tensor(name: str) -> Edit:
    return lambda writer: writer.tensors[0].pop(name)


def add(name: str, shape: tuple[int, ...], kind: Type = Type.F32) -> Edit:
    def edit(writer: gguf.GGUFWriter) -> None:
        values = np.ones(shape, np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    return edit
