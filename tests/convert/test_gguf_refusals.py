"""What is not a whole Gemma 4 target is refused in one line: what, where and what to do."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from gemma_mtp_mlx.convert.gguf import GgufFile
from tests.gguf_files import Edit, add, drop_tensor, drop_value, set_value, write

STRING, ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
FLOAT = gguf.GGUFValueType.FLOAT32
REFUSED: dict[str, tuple[str, Edit, str]] = {
    "mmproj": ("31b", set_value("general.architecture", "clip", STRING), "architecture 'clip'"),
    "drafter": (
        "31b",
        set_value("general.architecture", "gemma4-assistant", STRING),
        "architecture 'gemma4-assistant', expected 'gemma4'; give the file of a Gemma 4 target",
    ),
    "shard": ("31b", set_value("split.count", 3), "llama-gguf-split --merge"),
    "other packing": (
        "31b",
        add("blk.9.attn_v.weight", (8, 256), Type.Q5_1),
        "tensor blk.9.attn_v.weight is stored as Q5_1, which is not read; use a Q4_0",
    ),
    "packed norm": (
        "31b",
        add("blk.9.attn_norm.weight", (128,), Type.Q8_0),
        "blk.9.attn_norm.weight is packed as Q8_0, expected F32",
    ),
    "packed scale": (
        "26b",
        add("blk.9.ffn_gate_inp.scale", (2, 128), Type.Q8_0),
        "blk.9.ffn_gate_inp.scale is packed as Q8_0, expected F32",
    ),
    "vision": ("31b", add("v.blk.0.ln1.weight", (8,)), "tensor v.blk.0.ln1.weight does not belong"),
    "unknown": ("31b", add("blk.0.attn_sinks", (8,)), "tensor blk.0.attn_sinks does not belong"),
    "fused and split": ("26b", add("blk.0.ffn_up_exps.weight", (8, 64, 128)), "twice"),
    "odd fused": (
        "31b",
        add("blk.0.ffn_gate_up_exps.weight", (8, 63, 128)),
        r"blk.0.ffn_gate_up_exps.weight has shape \[8, 63, 128\]",
    ),
    "flat fused": (
        "31b",
        add("blk.0.ffn_gate_up_exps.weight", (64, 128)),
        r"blk.0.ffn_gate_up_exps.weight has shape \[64, 128\]",
    ),
    "some full layers with values": (
        "31b",
        add("blk.3.attn_v.weight", (64, 128)),
        "attn_v in some of its full layers only",
    ),
    "no rotation": ("31b", drop_tensor("rope_freqs.weight"), "no float32 tensor rope_freqs"),
    "no embedding": ("31b", drop_tensor("token_embd.weight"), "no tensor token_embd.weight"),
    "scaled rotation": (
        "31b",
        set_value("gemma4.rope.scaling.type", "yarn", STRING),
        "says 'yarn' for gemma4.rope.scaling.type, expected none",
    ),
    "part of a sliding head": (
        "31b",
        set_value("gemma4.rope.dimension_count_swa", 8),
        "says 8 for gemma4.rope.dimension_count_swa, expected the length of a head",
    ),
    "no layers": ("31b", drop_value("gemma4.block_count"), "says nothing for gemma4.block_count"),
    "countless layers": (
        "31b",
        set_value("gemma4.block_count", 2**32 - 1),
        "says 4294967295 for gemma4.block_count, expected no more than its",
    ),
    "too few layers": (
        "31b",
        set_value("gemma4.block_count", 7),
        "attention.sliding_window_pattern, expected 7 whole numbers",
    ),
    "period": (
        "31b",
        set_value("gemma4.attention.sliding_window_pattern", 6),
        "says 6 for gemma4.attention.sliding_window_pattern, expected layers of both kinds",
    ),
    "odd key heads": (
        "31b",
        set_value("gemma4.attention.head_count_kv", [4, 4, 2, 2, 4, 4, 4, 2], ARRAY),
        "head_count_kv, expected one number for each kind of layer",
    ),
    "key heads by kind": (
        "e4b",
        set_value("gemma4.attention.head_count_kv", [2, 2, 1, 2, 2, 1, 2, 2, 1], ARRAY),
        "head_count_kv, expected one number where full layers have values",
    ),
    "odd heads": (
        "31b",
        set_value("gemma4.attention.head_count", [8] * 7 + [4], ARRAY),
        "head_count, expected the same number in every layer",
    ),
    "odd widths": (
        "e2b",
        set_value("gemma4.feed_forward_length", [192] * 9 + [384], ARRAY),
        "feed_forward_length, expected one width, doubled where keys are shared",
    ),
    "all shared": ("31b", set_value("gemma4.attention.shared_kv_layers", 8), "shared_kv_layers"),
    "values of another length": (
        "31b",
        set_value("gemma4.attention.value_length_swa", 32),
        "says 32 for gemma4.attention.value_length_swa, expected 16, as for keys",
    ),
    "no epsilon": (
        "31b",
        set_value("gemma4.attention.layer_norm_rms_epsilon", 0.0, FLOAT),
        "layer_norm_rms_epsilon, expected a positive number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_target_is_refused(tmp_path: Path, case: str) -> None:
    family, edit, message = REFUSED[case]
    path, _ = write(tmp_path, family, edit=edit)
    with pytest.raises(ValueError, match=message) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "divisors, message",
    [
        ([1, 1, 2, 2] + [1e30] * 12, "scales positions"),
        ([1e30, 1] + [1e30] * 14, "not that of a Gemma 4"),
        ([1] * 8, "not that of a Gemma 4"),
    ],
)
def test_another_rotation_is_refused(tmp_path: Path, divisors: list[float], message: str) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        del writer.tensors[0]["rope_freqs.weight"]
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))

    path, _ = write(tmp_path, "31b", edit=edit)
    with pytest.raises(ValueError, match=message):
        GgufFile(path)
