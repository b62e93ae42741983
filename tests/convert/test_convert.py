"""Conversion: the same model comes out, mlx_lm reads it too, and nothing is left half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.config import DrafterConfig, ModelConfig
from gemma_mtp_mlx.convert import Quantization, conversion, convert
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import drafter_names, target_names
from gemma_mtp_mlx.weights import load_weights
from tests import passes
from tests.checkpoints import FAMILIES, layouts, write_checkpoint, write_pair
from tests.families import ORDERED

Arrays = dict[str, mx.array]
LAYOUTS = [
    (family, layout, config_layout)
    for family in FAMILIES
    for layout in layouts(family)
    for config_layout in ("published", "per_layer")
]
PROMPT = [2, *range(7, 60, 2)]  # longer than the window


def load_target(folder: Path) -> Target:
    target = Target(ModelConfig.from_dict(read_config(folder)))
    load_weights(target, folder, target_names(target.config))
    return target


def load_drafter(folder: Path) -> Drafter:
    drafter = Drafter(DrafterConfig.from_dict(read_config(folder)))
    load_weights(drafter, folder, drafter_names())
    return drafter


def read(file: str) -> Arrays:
    return cast(Arrays, mx.load(file))


def parameters(module: nn.Module) -> Arrays:
    return dict(tree_flatten(module.parameters()))


def assert_same(got: nn.Module, want: nn.Module) -> None:
    ours, theirs = parameters(got), parameters(want)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert mx.array_equal(ours[name], value).item(), name


def logits(target: Target) -> np.ndarray:
    return passes.verify(target, PROMPT, 16)[1]


def mlx_lm_logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array([PROMPT]))[0].astype(mx.float32))


def greedy(step: Any, count: int) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(np.argmax(step(tokens))))
    return tokens


def assert_greedy_is_mlx_lms(folder: Path) -> None:
    target = load_target(folder)
    model, _ = mlx_lm_utils.load_model(folder)
    theirs = greedy(lambda ids: np.array(model(mx.array([ids]))[0, -1].astype(mx.float32)), 12)
    assert greedy(lambda ids: passes.verify(target, ids, 16)[1][-1], 12) == theirs


@pytest.mark.parametrize("family, layout, config_layout", LAYOUTS)
def test_the_same_model_comes_out(
    tmp_path: Path, family: str, layout: str, config_layout: str
) -> None:
    source, draft_source = write_pair(
        tmp_path / "in", family, layout=layout, config_layout=config_layout
    )
    report = convert(str(source), tmp_path / "out", draft_source=str(draft_source))
    out = tmp_path / "out"
    converted = load_target(out)
    assert np.array_equal(logits(converted), logits(load_target(source)))
    assert_same(converted, mlx_lm_utils.load_model(out)[0])
    assert_same(load_drafter(out / "drafter"), load_drafter(draft_source))
    assert report.target.bytes_out == report.target.bytes_in
    assert report.drafter is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_generates_the_same_tokens(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path / "in", family, layout=layouts(family)[1], config_layout="per_layer")
    convert(str(tmp_path / "in"), tmp_path / "out")
    assert_greedy_is_mlx_lms(tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_written_config_means_the_same_in_the_published_layout(
    tmp_path: Path, family: str
) -> None:
    source, draft_source = write_pair(
        tmp_path / "in", family, layout=layouts(family)[1], config_layout="per_layer"
    )
    convert(str(source), tmp_path / "out", draft_source=str(draft_source))
    plain = tmp_path / "plain"
    write_checkpoint(plain, family)
    written, published = read_config(tmp_path / "out"), read_config(plain)
    ours = {"architectures", "eos_token_id", "model_type", "vocab_size_per_layer_input"}
    for name in published.keys() - ours:
        assert written[name] == published[name], name
    inputs = published.get("hidden_size_per_layer_input")
    assert written["vocab_size_per_layer_input"] == (published["vocab_size"] if inputs else 0)
    assert written["model_type"] == "gemma4_text"
    assert written["eos_token_id"] == read_config(source)["eos_token_id"]
    drafter = read_config(tmp_path / "out" / "drafter")
    assert drafter["model_type"] == "gemma4_assistant"
    assert "per_layer_config" not in drafter["text_config"]
    assert drafter["text_config"]["global_head_dim"] == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_model_is_what_mlx_lm_reads(tmp_path: Path, family: str) -> None:
    source, draft_source = write_pair(tmp_path / "in", family)
    out = tmp_path / "out"
    report = convert(
        str(source),
        out,
        draft_source=str(draft_source),
        quantization=Quantization(group_size=32),
    )
    target = load_target(out)
    model, _ = mlx_lm_utils.load_model(out)
    assert_same(target, model)
    want = mlx_lm_logits(model)
    assert np.abs(logits(target) - want).max() <= 1e-3 * np.abs(want).max()
    modules = dict(target.named_modules())
    bits = {path: modules[path].bits for path in modules if "bits" in vars(modules[path])}
    assert len(bits) == report.target.packed > 0
    for path, value in bits.items():
        fine = path.endswith(("router.proj", "embed_tokens_per_layer", "embed_tokens"))
        assert value == (8 if fine else 4), path
        said = read_config(out)["quantization"].get(path)
        assert said == ({"group_size": 32, "bits": 8, "mode": "affine"} if fine else None), path
    assert report.target.bytes_out < 0.4 * report.target.bytes_in
    config = read_config(out)
    assert config["quantization"] == config["quantization_config"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_drafter_keeps_its_centroid_head(tmp_path: Path, family: str) -> None:
    source, draft_source = write_pair(tmp_path / "in", family)
    out = tmp_path / "out"
    convert(str(source), out, draft_source=str(draft_source), quantization=Quantization())
    got = parameters(load_drafter(out / "drafter"))
    want = parameters(load_drafter(draft_source))
    assert "model.layers.0.mlp.up_proj.scales" in got
    assert ("model.embed_tokens.scales" in got) == (family not in ORDERED)
    if family in ORDERED:
        head = ("model.embed_tokens.weight", "masked_embedding.centroids.weight")
        for name in (*head, "masked_embedding.token_ordering"):
            assert mx.array_equal(got[name], want[name]).item(), name


def test_a_module_that_does_not_divide_is_kept_and_reported(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path / "in", "e2b")
    report = convert(str(source), tmp_path / "out", quantization=Quantization(group_size=128))
    assert "model.layers.0.per_layer_projection" in report.target.kept  # its input is 64 wide
    assert "model.layers.0.self_attn.q_proj" not in report.target.kept
    load_target(tmp_path / "out")


def test_everything_but_integers_takes_the_dtype(tmp_path: Path) -> None:
    source, draft_source = write_pair(tmp_path / "in", "e2b")
    out = tmp_path / "out"
    convert(str(source), out, draft_source=str(draft_source), dtype="bfloat16")
    stored = read(str(out / "drafter" / "model.safetensors"))
    ordering = stored.pop("masked_embedding.token_ordering")
    original = read(str(draft_source / "model.safetensors"))
    assert ordering.dtype == mx.int64
    assert mx.array_equal(ordering, original["masked_embedding.token_ordering"]).item()
    target = read(str(out / "model.safetensors"))
    assert {v.dtype for v in (*stored.values(), *target.values())} == {mx.bfloat16}
    assert read_config(out)["dtype"] == read_config(out / "drafter")["dtype"] == "bfloat16"


def test_large_models_are_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = write_pair(tmp_path / "in", "26b")
    monkeypatch.setattr(conversion, "SHARD_BYTES", 300_000)
    out = tmp_path / "out"
    report = convert(str(source), out)
    shards = sorted(out.glob("*.safetensors"))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert len(shards) > 2 and [shard.name for shard in shards] == names
    for shard in shards:
        tensors = read(str(shard))
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 300_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.target.bytes_out
    assert_same(load_target(out), load_target(source))
    assert_same(load_target(out), mlx_lm_utils.load_model(out)[0])


def test_a_quantised_source_is_passed_through_but_never_packed_twice(tmp_path: Path) -> None:
    source, once, twice = tmp_path / "in", tmp_path / "once", tmp_path / "twice"
    write_checkpoint(source, "26b", layout="conditional")
    config = read_config(source)
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 128}))
    model, config = mlx_lm_utils.load_model(source, lazy=True)
    model, config = mlx_lm_utils.quantize_model(model, config, 64, 4)
    once.mkdir()
    mlx_lm_utils.save_model(once, model)
    mlx_lm_utils.save_config(config, once / "config.json")
    with pytest.raises(ValueError, match="quantised already"):
        convert(str(once), twice, quantization=Quantization())
    convert(str(once), twice)
    assert_same(load_target(twice), load_target(once))
    assert_same(load_target(twice), mlx_lm_utils.load_model(twice)[0])


def test_tokenizer_and_generation_files_are_copied(tmp_path: Path) -> None:
    source, draft_source = write_pair(tmp_path / "in", "31b")
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (source / name).write_text(name)
    out = tmp_path / "out"
    convert(str(source), out, draft_source=str(draft_source))
    assert {file.name for file in out.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "drafter",
        "README.md",
        "conversion.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    generation = json.loads((out / "drafter" / "generation_config.json").read_text())
    assert generation["num_assistant_tokens"] == 4


def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path / "in", "31b")
    out = tmp_path / "out"
    out.mkdir()
    convert(str(source), out)  # an empty one is taken
    before = (out / "config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="is not empty; remove it or choose another"):
        convert(str(source), out)
    assert (out / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change, message",
    [
        ("foreign drafter", "does not belong to this target"),
        ("damaged", "is damaged or incomplete"),
        ("drafter as target", "is a drafter"),
        ("target as drafter", "is not a Gemma 4 drafter"),
        ("dtype", "dtype is 'int8'"),
    ],
)
def test_a_bad_source_writes_nothing(tmp_path: Path, change: str, message: str) -> None:
    source, draft_source = write_pair(tmp_path / "in", "31b")
    options: dict[str, Any] = {"draft_source": str(draft_source)}
    if change == "foreign drafter":
        options["draft_source"] = str(write_pair(tmp_path / "other", "12b")[1])
    elif change == "damaged":
        file = source / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif change == "drafter as target":
        source = draft_source
    elif change == "target as drafter":
        options["draft_source"] = str(source)
    else:
        options["dtype"] = "int8"
    with pytest.raises(ValueError, match=message):
        convert(str(source), tmp_path / "out", **options)
    shutil.rmtree(tmp_path / "in")
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    assert list(tmp_path.iterdir()) == []


def test_layers_the_published_layout_cannot_say_are_refused(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path / "in", "31b", config_layout="per_layer")
    config = read_config(source)
    overrides = config["per_layer_config"]
    overrides["3"] = {**overrides["3"], "num_key_value_heads": 4}
    (source / "config.json").write_text(json.dumps(config))
    file = source / "model.safetensors"
    tensors = read(str(file))
    name = "model.layers.3.self_attn.k_proj.weight"
    mx.eval(tensors)
    tensors[name] = mx.concatenate([tensors[name], tensors[name]])
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(ValueError, match="differ from each other"):
        convert(str(source), tmp_path / "out")


@pytest.mark.parametrize("bits, group_size", [(1, 64), (7, 64), (4, 16), (4, 256)])
def test_what_mlx_cannot_pack_is_refused(bits: int, group_size: int) -> None:
    with pytest.raises(ValueError, match="it must be"):
        Quantization("affine", bits, group_size)
