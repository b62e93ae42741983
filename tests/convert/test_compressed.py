"""w4a16 folders of compressed-tensors mean the codes and scales that were packed, to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.convert import Quantization, convert
from tests import formats, q4_0
from tests.checkpoints import layouts, write_checkpoint

DTYPES = [mx.bfloat16, mx.float16, mx.float32]
CASES = [(family, layout) for family in ("e2b", "26b") for layout in layouts(family)]


def ours_of(path: str) -> str:
    return path.replace("model.language_model.", "model.")


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("family, layout", CASES)
def test_packed_codes_are_taken_as_they_are(
    tmp_path: Path, family: str, layout: str, group: int | None
) -> None:
    dtype = DTYPES[CASES.index((family, layout)) % 3]
    source, out = tmp_path / "in", tmp_path / "out"
    write_checkpoint(source, family, layout=layout)
    drawn = formats.numpy_arrays(source)
    paths = q4_0.write_compressed(source, group, dtype)
    report = convert(str(source), out)
    arrays = formats.numpy_arrays(out)
    used = [path for path in paths if f"{ours_of(path)}.weight" in arrays]
    assert report.target.taken == len(used) > 30
    assert all("self_attn" in path for path in set(paths) - set(used))  # of layers that share them
    assert report.target.packed == 0
    for path in used:
        weight, ours = drawn[f"{path}.weight"], ours_of(path)
        codes, scales = q4_0.quantise(weight, group or weight.shape[-1])
        scales = q4_0.rounded(scales, dtype)
        assert np.array_equal(formats.codes(arrays[f"{ours}.weight"], 4), codes), path
        wide = arrays[f"{ours}.scales"]
        assert np.array_equal(wide, np.repeat(scales, wide.shape[-1] // scales.shape[-1], -1)), path
        assert np.array_equal(arrays[f"{ours}.biases"], -8 * wide), path
    packed = formats.packed_weights(out, read_config(out))
    assert packed.keys() == set(map(ours_of, used))
    q4_0.decompress(source, mx.float32)
    plain = formats.numpy_arrays(source)
    for path in used:
        assert np.array_equal(packed[ours_of(path)], plain[f"{path}.weight"]), path


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("family", ["e2b", "31b"])
def test_packed_and_unpacked_weights_become_the_same_parameters(
    tmp_path: Path, family: str, dtype: mx.Dtype
) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    write_checkpoint(packed, family)
    paths = q4_0.write_compressed(packed, 32, dtype)
    shutil.copytree(packed, plain)
    q4_0.decompress(plain, dtype)
    convert(str(packed), tmp_path / "taken")
    report = convert(str(plain), tmp_path / "qat", quantization=Quantization("qat"))
    assert report.target.equal == 1.0
    assert set(paths) <= set(report.target.on_grid)
    taken, found = (
        mx.load(str(tmp_path / kind / "model.safetensors")) for kind in ("taken", "qat")
    )
    for path in paths:
        for what in ("weight", "scales", "biases"):
            one, other = taken[f"{path}.{what}"], found[f"{path}.{what}"]
            assert one.dtype == other.dtype and mx.array_equal(one, other).item(), (path, what)
