"""Packed weights mean what the recipe and conversion.json say, decoded here without MLX."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.convert import Quantization, convert, packing
from tests import formats, q4_0
from tests.checkpoints import write_pair

FORMATS = [
    *(
        Quantization("affine", bits, group)
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (32, 64, 128)
    ),
    *(Quantization(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")),
]
FAMILIES = ("e2b", "26b")


def name_of(quantization: Quantization) -> str:
    return f"{quantization.mode}-{quantization.bits}-{quantization.group_size}"


def drawn(folder: Path) -> dict[str, np.ndarray]:
    """Return a text checkpoint's weights by the paths of the modules that have them here."""
    weights = {}
    for name, value in formats.numpy_arrays(folder).items():
        if name.endswith(".experts.gate_up_proj"):
            halves = np.split(value, 2, axis=-2)
            stem = name.replace("gate_up_proj", "switch_glu")
            weights |= {f"{stem}.gate_proj": halves[0], f"{stem}.up_proj": halves[1]}
        elif name.endswith(".experts.down_proj"):
            weights[name.replace("down_proj", "switch_glu.down_proj")] = value
        elif value.ndim > 1 and value.dtype == np.float32:
            weights[name.removesuffix(".weight")] = value
    return weights


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        made[family], _ = write_pair(tmp_path_factory.mktemp(family), family)
    return made


@pytest.mark.parametrize("quantization", FORMATS, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_and_scales_mean_the_weights_as_closely_as_is_said(
    tmp_path: Path, sources: dict[str, Path], family: str, quantization: Quantization
) -> None:
    out = tmp_path / "out"
    report = convert(str(sources[family]), out, quantization=quantization)
    config = read_config(out)
    weights, packed = drawn(sources[family]), formats.packed_weights(out, config)
    said = {path: config["quantization"].get(path, config["quantization"]) for path in packed}
    fine = {path for path in packed if path.endswith(("embed_tokens", "router.proj", "_per_layer"))}
    for path, params in said.items():
        bits, mode = (8, "affine") if path in fine else (quantization.bits, quantization.mode)
        assert (params["bits"], params["mode"]) == (bits, mode), path
    assert set(report.target.kept) == weights.keys() - packed.keys()
    for path in report.target.kept:
        assert weights[path].shape[-1] % (quantization.group_size or 1), path
    count = sum(value.size for value in weights.values())
    assert sum(weights[path].size for path in packed) > count / 2
    noted = json.loads((out / "conversion.json").read_text())["errors"]
    assert noted.keys() == packed.keys() == report.target.errors.keys()
    for path, got in packed.items():
        off = got - weights[path]
        assert noted[path]["max"] == np.abs(off).max(), path
        assert noted[path]["rms"] == pytest.approx(rms(off), rel=1e-5), path
        relative = rms(off) / rms(weights[path])
        assert noted[path]["relative_rms"] == pytest.approx(relative, rel=1e-5), path


@pytest.mark.parametrize("quantization", FORMATS, ids=name_of)
def test_every_code_is_the_nearest(
    tmp_path: Path, sources: dict[str, Path], quantization: Quantization
) -> None:
    """No other code of its group is nearer to a weight, but where the scale cuts off."""
    out = tmp_path / "out"
    convert(str(sources["26b"]), out, quantization=quantization)
    path = "model.layers.0.self_attn.q_proj"
    arrays, weights = formats.numpy_arrays(out), drawn(sources["26b"])[path]
    params, bits = quantization.params, quantization.bits or 0
    scales, biases = arrays[f"{path}.scales"], arrays.get(f"{path}.biases")
    got = formats.decode(arrays[f"{path}.weight"], scales, biases, params)
    every = np.arange(2**bits, dtype=np.uint32)
    best = np.full(weights.shape, np.inf, np.float32)
    for code in every:
        row = np.full((*weights.shape[:-1], weights.shape[-1] * bits // 32), 0, np.uint32)
        row += _filled(int(code), bits, row.shape[-1])
        tried = np.abs(formats.decode(row, scales, biases, params) - weights)
        best = np.fmin(best, tried)
    assert np.all(np.abs(got - weights) <= best * (1 + 1e-5) + 1e-6)


def _filled(code: int, bits: int, words: int) -> np.ndarray:
    """Return the words of a row that holds nothing but one code."""
    stream = sum(code << at for at in range(0, 32 * words, bits))
    return np.frombuffer(stream.to_bytes(4 * words, "little"), "<u4")


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("mode", [None, "affine", "nvfp4", "qat"])
def test_the_same_input_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    """Wherever, on whatever number of cores, and however it is cut into strips."""
    target, assistant = write_pair(tmp_path / "in", "26b")
    quantization = None if mode is None else Quantization(mode)
    if mode == "qat":
        for folder in (target, assistant):
            q4_0.put_on_grid(folder, mx.bfloat16)
    kept: dict[str, Any] = {"draft_source": str(assistant), "quantization": quantization}
    convert(str(target), tmp_path / "one", **kept)
    convert(str(target), tmp_path / "elsewhere" / "two", **kept)
    monkeypatch.setattr(packing, "STRIP_BYTES", 20_000)
    convert(str(target), tmp_path / "strips", **kept)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    convert(str(target), tmp_path / "alone", **kept)
    want = digests(tmp_path / "one")
    assert "drafter/conversion.json" in want
    for other in ("elsewhere/two", "strips", "alone"):
        assert digests(tmp_path / other) == want, other
