"""QAT checkpoints come back weight for weight from the q4_0 grid, and what is not on it is said."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.convert import Quantization, convert
from tests import formats, q4_0
from tests.checkpoints import FAMILIES, write_pair
from tests.families import ORDERED

QAT = Quantization("qat")


def on_grid(folder: Path, family: str, dtype: mx.Dtype, *, half: bool = True) -> tuple[Path, Path]:
    """Write a pair whose weights are on the grid, with scales of float16 or float32."""
    pair = write_pair(folder, family)
    for model in pair:
        q4_0.put_on_grid(model, dtype, half=half)
    return pair


def written_weights(out: Path, dtype: mx.Dtype) -> dict[str, np.ndarray]:
    """Return OUT's packed weights as transformers names them, rounded to the source's type."""
    found = formats.as_transformers(formats.packed_weights(out, read_config(out)))
    return {name: q4_0.rounded(value, dtype) for name, value in found.items()}


def assert_comes_back(source: Path, out: Path, dtype: mx.Dtype) -> None:
    want = formats.numpy_arrays(source)
    got = written_weights(out, dtype)
    kept = formats.numpy_arrays(out)
    for name, value in want.items():
        if name in got:
            assert np.array_equal(got[name], value), name
        else:
            assert np.array_equal(kept[name], value), name
    assert got.keys() <= want.keys() and len(got) > 20


@pytest.mark.parametrize(
    "family, dtype", [*((family, mx.bfloat16) for family in FAMILIES), ("26b", mx.float32)]
)
def test_every_weight_comes_back(tmp_path: Path, family: str, dtype: mx.Dtype) -> None:
    source, draft_source = on_grid(tmp_path, family, dtype)
    out = tmp_path / "out"
    report = convert(str(source), out, draft_source=str(draft_source), quantization=QAT)
    assert report.drafter is not None
    assert report.target.equal == report.drafter.equal == 1.0
    assert report.target.off_grid == report.drafter.off_grid == report.target.kept == ()
    head = {"model.embed_tokens", "masked_embedding.centroids"} if family in ORDERED else set()
    assert set(report.drafter.kept) == head
    block = read_config(out)["quantization"]
    assert block == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert_comes_back(source, out, dtype)
    noted = json.loads((out / "conversion.json").read_text())
    assert noted["equal_on_grid"] == 1.0
    assert noted["off_grid"] == []


def test_scales_between_those_of_float16_lose_no_step(tmp_path: Path) -> None:
    """llama.cpp's scales are of float16, as those written are; here none of the source's is."""
    source, _ = on_grid(tmp_path, "31b", mx.bfloat16, half=False)
    report = convert(str(source), tmp_path / "out", quantization=QAT)
    got, want = written_weights(tmp_path / "out", mx.bfloat16), formats.numpy_arrays(source)
    equal = sum(int((value == want[name]).sum()) for name, value in got.items())
    assert report.target.equal == equal / sum(value.size for value in got.values()) > 0.985
    for name, value in got.items():  # what differs is the neighbour among bfloat16
        assert np.all(np.abs(value - want[name]) <= 2.0**-7 * np.abs(want[name])), name


@pytest.mark.parametrize("family", ["e2b", "26b"])
def test_a_source_off_the_grid_is_refused(tmp_path: Path, family: str) -> None:
    source, _ = write_pair(tmp_path / "in", family)
    with pytest.raises(
        ValueError, match=r"was not trained for the q4_0 grid: \d+ of \d+ m"
    ) as raised:
        convert(str(source), tmp_path / "out", quantization=QAT)
    assert "\n" not in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("family", ["e2b", "26b"])
def test_what_was_not_trained_gets_eight_bits_and_is_named(tmp_path: Path, family: str) -> None:
    source, _ = write_pair(tmp_path, family)
    q4_0.put_on_grid(source, mx.bfloat16, off=lambda name: "model.embed_tokens" in name)
    out = tmp_path / "out"
    report = convert(str(source), out, quantization=QAT)
    names = ["model.embed_tokens", "model.embed_tokens_per_layer"][: 1 + (family == "e2b")]
    assert sorted(report.target.off_grid) == names
    assert json.loads((out / "conversion.json").read_text())["off_grid"] == list(
        report.target.off_grid
    )
    assert report.target.equal == 1.0
    block = read_config(out)["quantization"]
    fine = {path: params for path, params in block.items() if isinstance(params, dict)}
    assert sorted(fine) == names
    assert all(params["bits"] == 8 for params in fine.values())
    want = formats.numpy_arrays(source)
    decoded = formats.packed_weights(out, read_config(out))
    for name in names:
        off = np.abs(decoded[name] - want[f"{name}.weight"]).max()
        assert off == report.target.errors[name].largest
        assert off < np.ptp(want[f"{name}.weight"]) / 255 * 1.1
