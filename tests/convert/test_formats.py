"""Packed weights mean what the recipe and conversion.json say, decoded here without MLX."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.convert import Quantization, convert, packing, stream
from gemma_mtp_mlx.convert.record import Written
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


class Case(NamedTuple):
    """A conversion. weights: of the source, by our paths; written: its report."""

    quantization: Quantization
    weights: dict[str, np.ndarray]
    out: Path
    written: Written


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


@pytest.fixture(
    params=[*(("26b", each) for each in FORMATS), *(("e2b", each) for each in FORMATS[-4:])],
    ids=lambda case: f"{case[0]}-{name_of(case[1])}",
    scope="module",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, quantization = request.param
    folder = tmp_path_factory.mktemp(family)
    source, _ = write_pair(folder / "in", family)
    report = convert(str(source), folder / "out", quantization=quantization)
    return Case(quantization, drawn(source), folder / "out", report.target)


def test_codes_and_scales_mean_the_weights_as_closely_as_is_said(case: Case) -> None:
    quantization, weights, out, written = case
    config = read_config(out)
    packed = formats.packed_weights(out, config)
    said = {path: config["quantization"].get(path, config["quantization"]) for path in packed}
    fine = {path for path in packed if path.endswith(("embed_tokens", "router.proj", "_per_layer"))}
    for path, params in said.items():
        bits, mode = (8, "affine") if path in fine else (quantization.bits, quantization.mode)
        assert (params["bits"], params["mode"]) == (bits, mode), path
    assert set(written.kept) == weights.keys() - packed.keys()
    for path in written.kept:
        assert weights[path].shape[-1] % (quantization.group_size or 1), path
    count = sum(value.size for value in weights.values())
    assert sum(weights[path].size for path in packed) > count / 2
    noted = json.loads((out / "conversion.json").read_text())["errors"]
    assert noted.keys() == packed.keys() == written.errors.keys()
    for path, got in packed.items():
        off = got - weights[path]
        assert noted[path]["max"] == np.abs(off).max(), path
        assert noted[path]["rms"] == pytest.approx(rms(off), rel=1e-5), path
        relative = rms(off) / rms(weights[path])
        assert noted[path]["relative_rms"] == pytest.approx(relative, rel=1e-5), path


def test_every_code_is_the_nearest(case: Case) -> None:
    """No other code of its group is nearer to a weight."""
    quantization, weights, out, _ = case
    path = "model.layers.0.self_attn.q_proj"
    arrays, want = formats.numpy_arrays(out), weights[path][:16]
    params, bits = quantization.params, quantization.bits or 0
    words, scales = arrays[f"{path}.weight"][:16], arrays[f"{path}.scales"][:16]
    biases = arrays[f"{path}.biases"][:16] if params["mode"] == "affine" else None
    got = formats.decode(words, scales, biases, params)
    best = np.full(want.shape, np.inf, np.float32)
    for code in range(2**bits):
        stream = sum(code << at for at in range(0, 32 * bits, bits))
        period = np.frombuffer(stream.to_bytes(4 * bits, "little"), "<u4")
        filled = np.tile(period, (len(words), words.shape[-1] // bits))
        tried = np.abs(formats.decode(filled, scales, biases, params) - want)
        best = np.fmin(best, tried)
    assert np.all(np.abs(got - want) <= best * (1 + 1e-5) + 1e-6)


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
    with monkeypatch.context() as patch:
        patch.setattr(packing, "STRIP_BYTES", 20_000)
        convert(str(target), tmp_path / "elsewhere" / "strips", **kept)
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as alone:
        alone.submit(lambda: setattr(stream._local, "stream", mx.new_stream(mx.cpu))).result()
        patch.setattr(stream, "_workers", lambda: alone)
        convert(str(target), tmp_path / "alone", **kept)
    want = digests(tmp_path / "one")
    assert "drafter/conversion.json" in want
    for other in ("elsewhere/strips", "alone"):
        assert digests(tmp_path / other) == want, other
