"""Recipes: what is packed how by default, by rules of one's own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.convert import Quantization, Rule, convert, read_rules
from gemma_mtp_mlx.convert.recipe import MODES, Recipe, default_recipe
from tests.checkpoints import FAMILIES, write_pair
from tests.families import ORDERED

FOUR = {"group_size": 64, "bits": 4, "mode": "affine"}
EIGHT = {**FOUR, "bits": 8}


def packed(folder: Path) -> dict[str, dict[str, Any]]:
    """Return how each module that differs from a folder's usual packing is packed."""
    block = read_config(folder)["quantization"]
    return {path: params for path, params in block.items() if isinstance(params, dict)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_default_recipe(tmp_path: Path, family: str, bits: int) -> None:
    """Eight bits for what decides much, four for the drafter whatever the target has."""
    source, draft_source = write_pair(tmp_path / "in", family)
    out = tmp_path / "out"
    convert(str(source), out, draft_source=str(draft_source), quantization=Quantization(bits=bits))
    block = read_config(out)["quantization"]
    assert {name: block[name] for name in FOUR} == {**FOUR, "bits": bits}
    fine = {path for path, params in packed(out).items() if params == EIGHT}
    expected = {"model.embed_tokens"}
    if family == "26b":
        expected |= {f"model.layers.{i}.router.proj" for i in range(6)}
    if family in ORDERED:
        expected |= {"model.embed_tokens_per_layer"}
    assert fine == (expected if bits == 4 else set())
    drafter = read_config(out / "drafter")["quantization"]
    assert {name: drafter[name] for name in FOUR} == FOUR
    assert packed(out / "drafter") == {}


@pytest.mark.parametrize(
    "mode, drafter",
    [
        ("mxfp4", {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
        ("nvfp4", {"group_size": 16, "bits": 4, "mode": "nvfp4"}),
        ("mxfp8", FOUR),
    ],
)
def test_a_drafter_has_four_bits_of_the_target_s_kind(
    tmp_path: Path, mode: str, drafter: dict[str, Any]
) -> None:
    source, draft_source = write_pair(tmp_path / "in", "31b")
    out = tmp_path / "out"
    convert(str(source), out, draft_source=str(draft_source), quantization=Quantization(mode))
    block = read_config(out)["quantization"]
    assert block["mode"] == mode and packed(out) == {"model.embed_tokens": EIGHT}
    block = read_config(out / "drafter")["quantization"]
    assert {name: block[name] for name in drafter} == drafter


def test_rules_decide_before_the_default_and_in_order(tmp_path: Path) -> None:
    source, draft_source = write_pair(tmp_path / "in", "26b")
    file = tmp_path / "recipe.json"
    rules = {
        "model.layers.0.mlp.down_proj": None,
        "*.mlp.down_proj": {"bits": 6, "group_size": 32},
        "*.experts.*": {"mode": "mxfp4"},
        "drafter/model.layers.?.self_attn.*": {"bits": 8},
    }
    file.write_text(json.dumps(rules))
    out = tmp_path / "out"
    report = convert(
        str(source),
        out,
        draft_source=str(draft_source),
        quantization=Quantization(),
        rules=read_rules(file),
    )
    found = packed(out)
    assert "model.layers.0.mlp.down_proj" in report.target.kept
    assert "model.layers.0.mlp.down_proj" not in found
    assert found["model.layers.1.mlp.down_proj"] == {**FOUR, "bits": 6, "group_size": 32}
    expert = found["model.layers.1.experts.switch_glu.up_proj"]
    assert expert == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert found["model.embed_tokens"] == EIGHT
    assert found["model.layers.0.router.proj"] == EIGHT
    drafter = packed(out / "drafter")
    assert drafter["model.layers.3.self_attn.q_proj"] == EIGHT
    assert "model.layers.3.mlp.up_proj" not in drafter
    written = json.loads((out / "conversion.json").read_text())["recipe"]
    assert list(written)[:4] == list(rules) and written["*.mlp.down_proj"]["bits"] == 6
    again = tmp_path / "again.json"
    again.write_text(json.dumps(written))
    assert [rule.pattern for rule in read_rules(again)] == list(written)


def test_rules_alone_pack_what_they_say(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path / "in", "31b")
    out = tmp_path / "out"
    report = convert(str(source), out, rules=[Rule("*.mlp.*", Quantization(bits=8))])
    assert report.target.packed == 3 * 8
    assert all(".mlp." not in path for path in report.target.kept)
    assert read_config(out)["quantization"] == EIGHT


def test_errors_are_there_for_every_packed_module_worst_first(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path / "in", "e2b")
    out = tmp_path / "out"
    report = convert(str(source), out, quantization=Quantization())
    relative = [error.relative for error in report.target.errors.values()]
    assert relative == sorted(relative, reverse=True) and relative[0] > 0.02
    errors = json.loads((out / "conversion.json").read_text())["errors"]
    assert list(errors) == list(report.target.errors)
    assert len(errors) == report.target.packed
    assert errors["model.embed_tokens"]["relative_rms"] < 0.02 < relative[0]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_usual_bits_and_group(mode: str) -> None:
    quantization = Quantization(mode)
    bits, group_size = quantization.bits, quantization.group_size
    assert Quantization(mode, bits, group_size) == quantization
    assert quantization.params["mode"] == ("affine" if mode == "qat" else mode)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("int4",), "mode is 'int4'; it must be one of affine, mxfp4, mxfp8, nvfp4, qat"),
        (("affine", 7), "bits is 7; with mode affine it must be 2, 3, 4, 5, 6 or 8"),
        (("affine", 4, 48), "group_size is 48; with mode affine it must be 32, 64 or 128"),
        (("mxfp4", 8), "bits is 8; with mode mxfp4 it must be 4"),
        (("nvfp4", 4, 32), "group_size is 32; with mode nvfp4 it must be 16"),
        (("qat", 8), "bits is 8; with mode qat it must be 4"),
        (("affine", True), "bits is True"),
        (("affine", "4"), "bits is '4'"),
    ],
)
def test_what_mlx_cannot_pack_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantization(*arguments)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "is damaged"),
        ('["*"]', "does not hold a JSON object"),
        ('{"*": 4}', r"recipe.json, \*: 4 is no quantisation; give an object of mode, bits"),
        ('{"*": {"bit": 4}}', r"\*: .* is no quantisation"),
        ('{"*": {"bits": 7}}', r"recipe.json, \*: bits is 7"),
        ('{"*": null, "*": null}', r"\* occurs twice"),
    ],
)
def test_a_wrong_recipe_file(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rules(file)


def test_a_rule_that_fits_nothing_is_misspelt(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path / "in", "31b")
    rules = [Rule("*.mlp.down", None)]
    with pytest.raises(ValueError, match=r"rule '\*\.mlp\.down' fits no module; modules are calle"):
        convert(str(source), tmp_path / "out", quantization=Quantization(), rules=rules)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_first_rule_decides() -> None:
    recipe = Recipe(default_recipe(Quantization(bits=2), centroid_head=True))
    assert recipe.choose("drafter/model.embed_tokens") is None
    assert recipe.choose("drafter/masked_embedding.centroids") is None
    chosen = {
        path: quantization.bits
        for path in ("drafter/pre_projection", "model.embed_tokens", "model.layers.0.mlp.up_proj")
        if (quantization := recipe.choose(path))
    }
    assert list(chosen.values()) == [4, 8, 2]


def test_the_command_takes_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, draft_source = write_pair(tmp_path / "in", "31b")
    file = tmp_path / "recipe.json"
    file.write_text('{"*.mlp.*": {"bits": 3}}')
    out = tmp_path / "out"
    argv = ["convert", "--hf-path", str(source), "--draft-hf-path", str(draft_source), "-q"]
    argv += ["--mlx-path", str(out), "--q-mode", "mxfp8", "--q-recipe", str(file)]
    assert main(argv) == 0
    assert read_config(out)["quantization"]["mode"] == "mxfp8"
    said = capsys.readouterr().err
    assert "Errors, relative (rms), rms and greatest, worst first" in said
    assert ".mlp." in said.split("worst first")[1].splitlines()[1]
