"""Loading: every layout gives the same parameters, and whatever does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from gemma_mtp_mlx import weights
from gemma_mtp_mlx.checkpoint import read_config, stored_tensors
from gemma_mtp_mlx.config import DrafterConfig, ModelConfig
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import (
    SHARED_KV,
    TIED_HEAD,
    drafter_names,
    target_names,
)
from tests.checkpoints import FAMILIES, layouts, write_assistant, write_checkpoint
from tests.families import ORDERED

Arrays = dict[str, mx.array]
LAYOUTS = [
    (family, layout, config_layout)
    for family in FAMILIES
    for layout in layouts(family)
    for config_layout in ("published", "per_layer")
]


def load_target(folder: Path) -> tuple[Arrays, weights.Plan]:
    config = ModelConfig.from_dict(read_config(folder))
    target = Target(config)
    plan = weights.load_weights(target, folder, target_names(config))
    return parameters(target), plan


def load_drafter(folder: Path) -> tuple[Arrays, weights.Plan]:
    drafter = Drafter(DrafterConfig.from_dict(read_config(folder)))
    plan = weights.load_weights(drafter, folder, drafter_names())
    return parameters(drafter), plan


def read(file: str) -> Arrays:
    return cast(Arrays, mx.load(file))


def parameters(module: nn.Module) -> Arrays:
    return dict(tree_flatten(module.parameters()))


def assert_same(got: Arrays, want: Arrays) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert mx.array_equal(got[name], value).item(), name


def edit(folder: Path, change: Callable[[Arrays], object]) -> None:
    """Change the tensors of a checkpoint's only file."""
    file = folder / "model.safetensors"
    tensors = read(str(file))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(file), tensors)


def edit_config(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.fixture
def e2b(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, "e2b")
    return tmp_path


@pytest.mark.parametrize("family, layout, config_layout", LAYOUTS)
def test_no_layout_changes_a_parameter(
    tmp_path: Path, family: str, layout: str, config_layout: str
) -> None:
    write_checkpoint(tmp_path / "plain", family)
    write_checkpoint(tmp_path / "other", family, layout=layout, config_layout=config_layout)
    plain, _ = load_target(tmp_path / "plain")
    other, plan = load_target(tmp_path / "other")
    assert_same(other, plain)
    used = {piece.stored for piece in plan.pieces.values()}
    assert len(used) + sum(plan.skipped.values()) == len(stored_tensors(tmp_path / "other"))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_config_layout_changes_a_drafter(tmp_path: Path, family: str) -> None:
    write_assistant(tmp_path / "plain", family)
    write_assistant(tmp_path / "other", family, config_layout="per_layer")
    plain, _ = load_drafter(tmp_path / "plain")
    assert_same(load_drafter(tmp_path / "other")[0], plain)
    integers = [v.dtype for v in plain.values() if mx.issubdtype(v.dtype, mx.integer)]
    assert integers == [mx.int32] * (family in ORDERED)  # stored as int64


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["language_model.model.", "model."])
def test_folders_with_other_prefixes_load(tmp_path: Path, family: str, prefix: str) -> None:
    """mlx_lm and mlx-vlm put `language_model.model.` first and towers at the top level."""
    write_checkpoint(tmp_path, family)
    plain, _ = load_target(tmp_path)

    def rename(tensors: Arrays) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["vision_tower.encoder.weight"] = mx.zeros((2, 2))
        tensors["audio_tower.encoder.weight"] = mx.zeros((2, 2))

    edit(tmp_path, rename)
    renamed, plan = load_target(tmp_path)
    assert_same(renamed, plain)
    assert plan.skipped == {"vision": 1, "audio": 1}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["model.", "model.language_model."])
def test_names_read_in_both_directions(tmp_path: Path, family: str, text: str) -> None:
    layout = "text" if text == "model." else layouts(family)[1]
    write_checkpoint(tmp_path, family, layout=layout)
    config = ModelConfig.from_dict(read_config(tmp_path))
    names = target_names(config)
    published = set()
    for name in parameters(Target(config)):
        piece = names.published(name, text)
        ours, skipped = names.read(piece.stored)
        assert not skipped
        assert (ours[piece.part], len(ours)) == (name, piece.parts)
        published.add(piece.stored)
    stored = {name for name in stored_tensors(tmp_path) if not names.read(name)[1]}
    assert published == stored


def test_unused_keys_and_values_are_counted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "e4b", layout="conditional")
    _, plan = load_target(tmp_path)
    assert plan.skipped == {"vision": 4, "audio": 2, SHARED_KV: 9}


def test_a_stored_tied_head_is_skipped(e2b: Path) -> None:
    edit(e2b, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    _, plan = load_target(e2b)
    assert plan.skipped == {TIED_HEAD: 1}


NORM = "model.layers.3.input_layernorm.weight"


def test_a_renamed_tensor_is_refused(e2b: Path) -> None:
    edit(e2b, lambda t: t.update({"model.layers.3.input_norm.weight": t.pop(NORM)}))
    with pytest.raises(ValueError, match=r"model\.layers\.3\.input_norm\.weight is not a param"):
        load_target(e2b)


def test_an_unknown_tensor_is_refused(e2b: Path) -> None:
    edit(e2b, lambda t: t.update({"transformer.h.0.weight": mx.zeros((1,))}))
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.weight"):
        load_target(e2b)


def test_missing_tensors_are_named_and_counted(e2b: Path) -> None:
    edit(e2b, lambda t: [t.pop(NORM), t.pop("model.norm.weight")])
    with pytest.raises(ValueError, match=rf"lacks 2 of \d+ parameters: .*{NORM}"):
        load_target(e2b)


def test_a_missing_expert_tensor_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "26b")
    edit(tmp_path, lambda t: t.pop("model.layers.1.experts.gate_up_proj"))
    with pytest.raises(ValueError, match=r"lacks 2 .*layers\.1\.experts\.switch_glu"):
        load_target(tmp_path)


@pytest.mark.parametrize(
    "family, name", [("e2b", NORM), ("26b", "model.layers.1.experts.gate_up_proj")]
)
def test_a_misshaped_tensor_is_refused(tmp_path: Path, family: str, name: str) -> None:
    write_checkpoint(tmp_path, family)
    edit(tmp_path, lambda t: t.update({name: mx.contiguous(t[name].swapaxes(0, -1)[:-1])}))
    with pytest.raises(ValueError, match=rf"{name} has shape \[.*\], expected \["):
        load_target(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(
    e2b: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.2.mlp.up_proj.weight"

    def spoil(tensors: Arrays) -> None:
        tensors[name][-1, -1] = value  # in the last of the strips that are tested

    edit(e2b, spoil)
    monkeypatch.setattr(weights, "_STRIP", 1000)
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        load_target(e2b)


def test_integers_where_weights_belong_are_refused(e2b: Path) -> None:
    edit(e2b, lambda t: t.update({NORM: t[NORM].astype(mx.int32)}))
    with pytest.raises(ValueError, match=f"{NORM} is stored as I32, expected F32"):
        load_target(e2b)


def test_a_parameter_stored_twice_is_refused(e2b: Path) -> None:
    name = NORM.replace("model.", "language_model.model.")
    edit(e2b, lambda t: t.update({name: t[NORM]}))
    with pytest.raises(ValueError, match="are the same parameter"):
        load_target(e2b)


def test_a_broken_token_ordering_is_refused(tmp_path: Path) -> None:
    write_assistant(tmp_path, "e2b")
    name = "masked_embedding.token_ordering"
    edit(tmp_path, lambda t: t.update({name: mx.zeros_like(t[name])}))
    with pytest.raises(ValueError, match=f"{name} is not an ordering of the 128 token ids"):
        load_drafter(tmp_path)


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_a_truncated_file_is_refused(e2b: Path, kept: int) -> None:
    file = e2b / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete.*again"):
        load_target(e2b)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\xff" * 64, "header does not fit into its 64 bytes"),
        ((8).to_bytes(8, "little") + b"not json", "header cannot be read"),
        ((2).to_bytes(8, "little") + b"{}tail", "announces 10"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(e2b: Path, content: bytes, reason: str) -> None:
    (e2b / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_target(e2b)


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin", "weights.pt"])
def test_other_formats_are_refused_with_the_reason(e2b: Path, name: str) -> None:
    (e2b / "model.safetensors").rename(e2b / name)
    with pytest.raises(ValueError, match=rf"{name} is not read: .*; use the safetensors"):
        load_target(e2b)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "31b", layout="conditional")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_target(tmp_path)


def test_another_quantiser_is_refused(e2b: Path) -> None:
    edit_config(e2b, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
    with pytest.raises(ValueError, match="quantised by gptq are not supported"):
        load_target(e2b)


@pytest.mark.parametrize(
    "family, layout",  # mlx_lm has no gemma4_unified_text
    [(family, layout) for family in FAMILIES for layout in layouts(family) if family != "12b"]
    + [("12b", "unified")],
)
@pytest.mark.parametrize("mode", [None, "affine", "mxfp4"])
def test_a_folder_written_by_mlx_lm_loads(
    tmp_path: Path, family: str, layout: str, mode: str | None
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, family, layout=layout)
    text = read_config(source).get("text_config", read_config(source))
    # mlx_lm takes the vocabulary of a multimodal model from the top level and defaults from E2B.
    edit_config(source, vocab_size=text["vocab_size"])
    if family == "12b":
        no_inputs = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        edit_config(source, text_config={**text, **no_inputs})
    model, config = mlx_lm_utils.load_model(source, lazy=True)
    if mode is not None:
        model, config = mlx_lm_utils.quantize_model(model, config, None, None, mode=mode)
    out.mkdir()
    mlx_lm_utils.save_model(out, model)
    mlx_lm_utils.save_config(config, out / "config.json")
    loaded, plan = load_target(out)
    written = {name.removeprefix("language_model."): v for name, v in parameters(model).items()}
    assert_same(loaded, written)
    assert bool(plan.quantization) == (mode is not None)
    if mode is None:
        assert_same(load_target(source)[0], written)  # we read the published file as mlx_lm does


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "31b")
    model, config = mlx_lm_utils.load_model(tmp_path, lazy=True)
    model, config = mlx_lm_utils.quantize_model(model, config, 64, 4)
    mlx_lm_utils.save_model(tmp_path, model)
    mlx_lm_utils.save_config(config, tmp_path / "config.json")
    name = "model.layers.0.mlp.up_proj.scales"
    edit(tmp_path, lambda t: t.update({name: mx.full(t[name].shape, mx.nan)}))
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        load_target(tmp_path)
