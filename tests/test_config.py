"""config.json: every field has a type and bounds, and what breaks them is said in one line."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_mtp_mlx.config import FULL, SLIDING, DrafterConfig, ModelConfig
from tests.families import FAMILIES, assistant_config, target_config

LAYERS = [SLIDING, FULL]
NUMBERS = (
    *("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_hidden_layers", "intermediate_size", "sliding_window", "max_position_embeddings"),
    *("global_head_dim", "num_kv_shared_layers", "vocab_size_per_layer_input"),
    *("hidden_size_per_layer_input", "num_experts", "top_k_experts", "moe_intermediate_size"),
)


def _text(**changes: Any) -> dict[str, Any]:
    return {**target_config("26b", "text", "published", "float32"), **changes}


def _refused(config: dict[str, Any], *words: str, drafter: bool = False) -> None:
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        (DrafterConfig if drafter else ModelConfig).from_dict(config)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    for word in ("config.json", *words):
        assert word in message


@pytest.mark.parametrize("value", ["abc", "4", True, 1.0, -1, 2**25, 2**64, [1], {}, float("nan")])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_bounds(name: str, value: Any) -> None:
    _refused(_text(**{name: value}), f"{name} is {value!r}", "whole number from")


def test_the_message_has_value_and_bounds() -> None:
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        ModelConfig.from_dict(_text(hidden_size="abc"))
    want = "config.json: hidden_size is 'abc'; it must be a whole number from 1 to 1048576"
    assert str(caught.value) == want


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_what_must_be_there(name: str) -> None:
    _refused(_text(**{name: None}), f"has no {name}", "incomplete")


@pytest.mark.parametrize("value", ["1", True, -1.0, float("nan"), float("inf"), 10**400, [1.0]])
def test_a_number_that_is_not_finite(value: Any) -> None:
    _refused(_text(rms_norm_eps=value), "rms_norm_eps", "a number from")
    _refused(_text(final_logit_softcapping=value), "final_logit_softcapping", "a number from")
    for name in ("rope_theta", "partial_rotary_factor"):
        _refused(_text(rope_parameters={FULL: {name: value}}), f"{FULL}: {name}")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": ["gemma4"]}, ["model_type ['gemma4']", "expected one of"]),
        ({"text_config": []}, ["text_config: []", "not an object"]),
        ({"text_config": "a\nb"}, [r"text_config: 'a\nb'"]),
        ({"text_config": None}, ["text_config: it has no hidden_size"]),
        ({"enable_moe_block": "yes"}, ["enable_moe_block is 'yes'", "true or false"]),
        ({"attention_k_eq_v": 1}, ["attention_k_eq_v is 1"]),
        ({"use_double_wide_mlp": []}, ["use_double_wide_mlp is []"]),
        ({"attention_bias": 0}, ["attention_bias is 0"]),
        ({"hidden_activation": ["x"] * 9999}, ["hidden_activation", "gelu_pytorch_tanh"]),
        ({"layer_types": "sliding_attention"}, ["layer_types is", "a list of 6"]),
        ({"layer_types": [SLIDING] * 5}, ["layer_types", "a list of 6"]),
        ({"layer_types": [SLIDING] * 7}, ["layer_types", "a list of 6"]),
        ({"layer_types": [*[SLIDING] * 5, "mamba"]}, ["layer_types"]),
        ({"layer_types": [[], *[SLIDING] * 5]}, ["layer_types"]),
        ({"layer_types": [FULL] * 6}, ["both kinds"]),
        ({"num_kv_shared_layers": 7}, ["num_kv_shared_layers is 7", "at most num_hidden_layers"]),
        ({"num_kv_shared_layers": 6}, ["0 layers with keys", "both kinds"]),
        ({"num_kv_shared_layers": 4}, ["2 layers with keys", "both kinds"]),
        ({"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
        ({"head_dim": 17}, ["heads of 17", "odd"]),
        ({"top_k_experts": 9}, ["top_k_experts is 9", "at most num_experts, 8"]),
        ({"per_layer_config": []}, ["per_layer_config: []", "not an object"]),
        ({"per_layer_config": {"6": {}}}, ["per_layer_config: 6 is", "0 to 5"]),
        ({"per_layer_config": {"-1": {}}}, ["per_layer_config: -1 is"]),
        ({"per_layer_config": {"x\ny": {}}}, [r"per_layer_config: x\ny is"]),
        ({"per_layer_config": {"9" * 5000: {}}}, ["per_layer_config: 999"]),
        ({"per_layer_config": {"1": {}, "01": {}}}, ["per_layer_config: 01 is", "once"]),
        ({"per_layer_config": {"1": 5}}, ["per_layer_config: 1: 5 is not an object"]),
        ({"per_layer_config": {"1": {"head_dim": "8"}}}, ["per_layer_config: 1: head_dim is '8'"]),
        ({"per_layer_config": {"1": {"head_dim": 64}}}, ["differ from each other", "layer 1"]),
        ({"per_layer_config": {"1": {"intermediate_size": 8}}}, ["intermediate_size is 8"]),
        ({"rope_parameters": 5}, ["rope_parameters: 5"]),
        ({"rope_parameters": {"rope_theta": 5}}, ["rope_parameters: rope_theta is 5", "inside"]),
        ({"rope_parameters": {FULL: []}}, [f"rope_parameters: {FULL}: []"]),
        ({"rope_parameters": {FULL: {"rope_type": "yarn"}}}, ["rope_type is 'yarn'"]),
        ({"rope_parameters": {FULL: {"factor": 8.0}}}, ["factor is 8.0"]),
        ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 0}, ["above 0"]),
    ],
)
def test_values_that_mean_no_model(changes: dict[str, Any], words: list[str]) -> None:
    _refused(_text(**changes), *words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text_config": 5}, ["text_config: 5"]),
        ({"backbone_hidden_size": 0}, ["backbone_hidden_size is 0"]),
        ({"use_ordered_embeddings": 1}, ["use_ordered_embeddings is 1"]),
        ({"num_centroids": 0}, ["num_centroids is 0", "a divisor"]),
        ({"num_centroids": 7}, ["num_centroids is 7", "a divisor of the vocab_size 128"]),
        ({"centroid_intermediate_top_k": 17}, ["centroid_intermediate_top_k is 17", "16"]),
        ({"centroid_intermediate_top_k": 0}, ["centroid_intermediate_top_k is 0"]),
    ],
)
def test_values_that_mean_no_drafter(changes: dict[str, Any], words: list[str]) -> None:
    config = {**assistant_config("e2b", "published", "float32"), **changes}
    _refused(config, *words, drafter=True)


@pytest.mark.parametrize("layout", ["published", "per_layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_null_is_as_good_as_absent(family: str, layout: str) -> None:
    for make, read in ((_target, ModelConfig.from_dict), (_assistant, DrafterConfig.from_dict)):
        config = make(family, layout)
        empty = copy.deepcopy(config)
        text = empty.get("text_config", empty)
        for name in [name for name, value in text.items() if value is None]:
            if name not in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
                del text[name]
        assert read(empty) == read(config)


def _target(family: str, layout: str) -> dict[str, Any]:
    return target_config(family, "text", layout, "float32")


def _assistant(family: str, layout: str) -> dict[str, Any]:
    return assistant_config(family, layout, "float32")


LARGEST = """
from gemma_mtp_mlx.config import _BOUNDS, FULL, SLIDING, ModelConfig
from gemma_mtp_mlx.target import Target
from tests.hostile_folders import peak_bytes
most = {name: high for name, (_, high) in _BOUNDS.items()}
most.update(model_type="gemma4_text", enable_moe_block=True, num_kv_shared_layers=0)
most.update(layer_types=[SLIDING, FULL] * (most["num_hidden_layers"] // 2))
before = peak_bytes()
target = Target(ModelConfig.from_dict(most))
print(len(target.model.layers), peak_bytes() - before)
"""


def test_the_largest_model_that_is_allowed_takes_no_memory_for_weights() -> None:
    command = [sys.executable, "-c", LARGEST]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=root)
    layers, grown = map(int, re.findall(r"\d+", done.stdout))
    assert layers == 1000
    assert grown < 500 << 20
