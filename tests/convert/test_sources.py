"""GGUF files and compressed-tensors folders become folders like any other."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from mlx_lm import utils as mlx_lm_utils

from gemma_mtp_mlx import SamplingParams, load
from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.convert import Quantization, convert
from tests.checkpoints import FAMILIES, write_assistant, write_pair
from tests.gguf_files import add_tokenizer, mostly, write

PROMPT = [2, *range(7, 60, 2)]


def greedy(folder: Path, **options: object) -> list[int]:
    pair = load(folder, **options)  # type: ignore[arg-type]
    pair.prompts.eos = frozenset()
    return pair.generate(PROMPT, SamplingParams(max_tokens=16), num_draft_tokens=4).tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [Type.F32, Type.Q4_0, Type.Q8_0])
def test_a_gguf_file_becomes_a_folder(tmp_path: Path, family: str, packed: Type) -> None:
    """The codes and the float16 scales are the file's, the rest is bfloat16."""
    file, _ = write(tmp_path / "in", family, mostly(packed), edit=add_tokenizer)
    write_assistant(tmp_path / "drafter", family, dtype="bfloat16")
    out = tmp_path / "out"
    report = convert(str(file), out, draft_source=str(tmp_path / "drafter"))
    assert bool(report.target.taken) == (packed is not Type.F32)
    tensors = mx.load(str(out / "model.safetensors"))
    assert isinstance(tensors, dict)
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in tensors.items()}
    assert kinds["weight"] in (mx.uint32, mx.bfloat16)
    scales = {value.dtype for name, value in tensors.items() if name.endswith(".scales")}
    assert scales == ({mx.float16} if report.target.taken else set())
    others = {v.dtype for n, v in tensors.items() if v.ndim == 1 and not n.endswith("es")}
    assert others == {mx.bfloat16}
    assert read_config(out)["dtype"] == "bfloat16"
    assert len(greedy(out)) == 16
    assert greedy(out) == greedy(out, drafter=None)
    record = json.loads((out / "conversion.json").read_text())
    assert list(record["source"]["files"]) == [file.name]
    assert (out / "tokenizer.json").is_file()


def test_what_a_gguf_file_has_not_packed_is_packed_by_a_recipe(tmp_path: Path) -> None:
    file, _ = write(tmp_path / "in", "26b", mostly(Type.Q4_0), edit=add_tokenizer)
    out = tmp_path / "out"
    report = convert(str(file), out, quantization=Quantization(group_size=32))
    assert report.target.taken and report.target.packed
    block = read_config(out)["quantization"]
    assert block["model.layers.0.router.proj"]["bits"] == 8
    assert (block["bits"], block["group_size"]) == (4, 32)
    model, _ = mlx_lm_utils.load_model(out)
    theirs = np.array(model(mx.array([PROMPT]))[0, -1].astype(mx.float32))
    assert greedy(out, drafter=None)[0] == int(theirs.argmax())


def test_a_gguf_file_that_is_packed_already_is_not_packed_again(tmp_path: Path) -> None:
    file, _ = write(tmp_path / "in", "31b", mostly(Type.Q4_0), edit=add_tokenizer)
    with pytest.raises(ValueError, match="quantised already and would lose twice"):
        convert(str(file), tmp_path / "out", quantization=Quantization())
    assert not (tmp_path / "out").exists()


def test_of_a_pair_that_is_packed_in_part_the_rest_is_packed(tmp_path: Path) -> None:
    """A GGUF target with a plain drafter, and a plain target with a packed drafter."""
    file, _ = write(tmp_path / "in", "31b", mostly(Type.Q4_0), edit=add_tokenizer)
    target, drafter = write_pair(tmp_path / "pair", "31b", dtype="bfloat16")
    first, second = tmp_path / "first", tmp_path / "second"
    report = convert(str(file), first, draft_source=str(drafter), quantization=Quantization(bits=8))
    assert report.target.packed == 0 and report.target.taken
    assert report.drafter is not None and report.drafter.packed and not report.drafter.taken
    report = convert(
        str(target), second, draft_source=str(first / "drafter"), quantization=Quantization()
    )
    assert report.target.packed and not report.target.taken
    assert report.drafter is not None and report.drafter.taken and not report.drafter.packed
    assert len(greedy(second)) == 16


def test_a_gguf_file_is_on_the_grid_already(tmp_path: Path) -> None:
    """What of it is not packed, embeddings and routers, does not make it a plain model."""
    file, _ = write(tmp_path / "in", "26b", mostly(Type.Q4_0), edit=add_tokenizer)
    report = convert(str(file), tmp_path / "out", quantization=Quantization("qat"))
    assert report.target.taken and report.target.off_grid
    assert "model.layers.0.router.proj" in report.target.off_grid
