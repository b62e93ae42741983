"""Pairs that cannot work are refused with every reason, pairs that work badly are called so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx import load, pairing
from gemma_mtp_mlx.checkpoint import Folder, read_config
from gemma_mtp_mlx.config import DrafterConfig, LayerConfig, ModelConfig
from gemma_mtp_mlx.convert import Quantization, convert, doubts_of, prepare, write
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.pairing import Kind, check_pair, doubts, kind_of
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import drafter_names, target_names
from gemma_mtp_mlx.weights import plan_weights
from tests import q4_0
from tests.checkpoints import FAMILIES, write_pair

LIKE = {"26b": "31b", "31b": "26b"}  # as tiny ones, their drafters have the same shapes


def configs(folder: Path, family: str) -> tuple[ModelConfig, DrafterConfig]:
    target, drafter = write_pair(folder, family)
    configs = (
        ModelConfig.from_dict(read_config(target)),
        DrafterConfig.from_dict(read_config(drafter)),
    )
    return configs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_own_drafter_fits_and_no_other_does(tmp_path: Path, family: str) -> None:
    target, own = configs(tmp_path / family, family)
    check_pair(target, own)
    for other in FAMILIES:
        _, drafter = configs(tmp_path / other, other)
        if other not in (family, LIKE.get(family)):
            with pytest.raises(ValueError, match=r"does not belong to this target: .*assistant"):
                check_pair(target, drafter)


def with_layer(drafter: DrafterConfig, index: int, **changes: Any) -> DrafterConfig:
    layers = [
        replace(layer, **changes) if layer.index == index else layer
        for layer in drafter.text.layers
    ]
    return replace(drafter, text=replace(drafter.text, layers=tuple(layers)))


def only_full(config: ModelConfig) -> ModelConfig:
    def full(layer: LayerConfig) -> LayerConfig:
        return replace(layer, sliding=False)

    return replace(config, layers=tuple(map(full, config.layers)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: replace(d, backbone_hidden_size=64), "hidden size 64, the target has 128"),
        (lambda d: replace(d, text=replace(d.text, vocab_size=64)), "vocabulary 64, target 128"),
        (lambda d: replace(d, text=replace(d.text, sliding_window=8)), "window 8, target 16"),
        (lambda d: with_layer(d, 3, head_dim=16), r"layer 3 reads heads of 16, .* layer 7 keeps"),
        (
            lambda d: with_layer(d, 0, num_key_value_heads=2),
            r"layer 0 reads 2 key/value heads, the target's layer 6 keeps 4",
        ),
        (
            lambda d: replace(d, text=replace(d.text, num_attention_heads=6)),
            "6 query heads do not divide over the target's 4",
        ),
    ],
)
def test_every_difference_is_named(tmp_path: Path, change: Any, message: str) -> None:
    target, drafter = configs(tmp_path, "31b")
    with pytest.raises(ValueError, match=message):
        check_pair(target, change(drafter))


def test_a_kind_of_layer_that_the_target_lacks(tmp_path: Path) -> None:
    target, drafter = configs(tmp_path, "31b")
    with pytest.raises(ValueError, match=r"layer 0 reads a sliding-attention layer, .* keeps none"):
        check_pair(only_full(target), drafter)


def test_all_differences_are_said_at_once(tmp_path: Path) -> None:
    target, drafter = configs(tmp_path, "31b")
    wrong = replace(drafter, backbone_hidden_size=64)
    wrong = replace(wrong, text=replace(wrong.text, vocab_size=64))
    with pytest.raises(ValueError, match=r"hidden size 64.*; vocabulary 64"):
        check_pair(target, wrong)


def on_the_grid(folder: Path) -> None:
    """Replace a checkpoint's matrices by weights on the q4_0 grid."""
    file = folder / "model.safetensors"
    tensors: Any = mx.load(str(file))
    for name, value in tensors.items():
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            groups = value.astype(mx.float32).reshape(-1, 32)
            largest = mx.abs(groups).max(axis=1, keepdims=True)
            scales = (largest / 8).astype(mx.bfloat16).astype(mx.float32)
            steps = mx.clip(mx.round(groups / scales), -8, 7)
            tensors[name] = (steps * scales).reshape(value.shape).astype(value.dtype)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)


def target_kind(folder: Path, name: str = "model") -> Kind:
    checkpoint = Folder(folder)
    config = ModelConfig.from_dict(checkpoint.config)
    return kind_of(plan_weights(Target(config), checkpoint, target_names(config)), name)


def drafter_kind(folder: Path, name: str = "drafter") -> Kind:
    checkpoint = Folder(folder)
    module = Drafter(DrafterConfig.from_dict(checkpoint.config))
    return kind_of(plan_weights(module, checkpoint, drafter_names()), name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qat_is_seen_in_the_weights(tmp_path: Path, dtype: str) -> None:
    target, drafter = write_pair(tmp_path / "pair", "31b", dtype=dtype)
    assert target_kind(target) == Kind(qat=False)
    assert drafter_kind(drafter) == Kind(qat=False)
    on_the_grid(target)
    on_the_grid(drafter)
    assert target_kind(target) == Kind(qat=True)
    assert drafter_kind(drafter) == Kind(qat=True)
    convert(str(target), tmp_path / "kept", quantization=Quantization("qat"))
    assert target_kind(tmp_path / "kept") == Kind(qat=True)
    plans = prepare(str(target), quantization=Quantization(group_size=32))
    [line] = doubts_of(plans)
    assert "6.2% (rms)" in line and "--q-mode qat" in line
    write(plans, tmp_path / "lost")
    assert target_kind(tmp_path / "lost") == Kind(qat=False, packed=("affine", 4, 32))
    assert doubts_of(prepare(str(target), quantization=Quantization("qat"))) == []
    assert doubts_of(prepare(str(target))) == doubts_of(prepare(str(tmp_path / "kept"))) == []


@pytest.mark.parametrize(
    "name, qat",
    [
        ("mlx-community/gemma-4-12B-it-qat-4bit", True),
        ("google/gemma-4-12B-it-qat-q4_0-unquantized", True),
        ("mlx-community/gemma-4-12B-it-4bit", False),
        ("aqatic", False),
    ],
)
def test_qat_is_seen_in_the_name(tmp_path: Path, name: str, qat: bool) -> None:
    target, _ = write_pair(tmp_path, "31b")
    assert target_kind(target, name).qat == qat


def test_doubts_have_numbers() -> None:
    plain, qat = Kind(qat=False), Kind(qat=True)
    assert doubts(plain, None) == doubts(qat, None) == []
    assert doubts(plain, plain) == doubts(qat, qat) == []
    [line] = doubts(qat, plain)
    assert "57%" in line and "92%" in line and "-qat-q4_0-unquantized-assistant" in line
    [line] = doubts(plain, qat)
    assert "not measured" in line and "-it-assistant" in line
    [line] = doubts(replace(qat, packed=("affine", 4, 64)), qat)
    assert "7.1% (rms)" in line and "--q-mode qat" in line
    assert doubts(replace(plain, packed=("affine", 4, 64)), plain) == []


def test_what_packing_again_costs_is_measured() -> None:
    """The numbers in doubts, on normally distributed weights."""
    normal = np.random.default_rng(0).standard_normal((1024, 2048), np.float32) * 0.02
    exact = q4_0.values(*q4_0.quantise(normal))
    weights = mx.array(exact).astype(mx.bfloat16)
    wide = np.array(weights.astype(mx.float32))
    for (mode, bits, group_size), said in pairing._REPACKED.items():
        params = {"mode": mode, "bits": bits, "group_size": group_size}
        packed = mx.dequantize(*mx.quantize(weights, **params), **params)
        error = np.array(packed.astype(mx.float32)) - wide
        assert abs(np.linalg.norm(error) / np.linalg.norm(wide) - said) < 1e-3, params


def test_a_loaded_pair_says_its_doubts(tmp_path: Path) -> None:
    target, drafter = write_pair(tmp_path, "31b")
    on_the_grid(target)
    [note] = load(target, drafter=drafter).notes
    assert "57%" in note
    assert load(target, drafter=None).notes == []
    on_the_grid(drafter)
    assert load(target, drafter=drafter).notes == []


def test_a_foreign_drafter_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    target, _ = write_pair(tmp_path / "31b", "31b")
    _, drafter = write_pair(tmp_path / "12b", "12b")
    (drafter / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="does not belong to this target"):
        load(target, drafter=drafter)
    assert json.loads((drafter / "config.json").read_text())
