"""QAT checkpoints, unpacked and as w4a16: what is written is what transformers computes on them.

Needs torch, transformers 5.22.2 and compressed-tensors, which CI installs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if transformers.__version__ != "5.22.2":
    pytest.skip("the oracle is transformers 5.22.2", allow_module_level=True)

from gemma_mtp_mlx.checkpoint import read_config  # noqa: E402
from gemma_mtp_mlx.convert import Quantization, convert  # noqa: E402
from tests import checkpoints, formats, passes, q4_0  # noqa: E402
from tests.goldens import oracle  # noqa: E402
from tests.live import runs  # noqa: E402

TOLERANCE = 1e-4
QAT = Quantization("qat")


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    """Keep torch to one thread, as tiny matrices gain nothing from more, and loading quiet."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("family", list(checkpoints.FAMILIES))
def test_the_grid_is_the_model_that_was_trained(family: str, tmp_path: Path) -> None:
    """In bfloat16 it is about as far from transformers in float32 as what it was made from."""
    target, assistant = checkpoints.write_pair(tmp_path, family)
    for folder in (target, assistant):
        q4_0.put_on_grid(folder, mx.bfloat16)
    model, drafter = oracle.load(target), oracle.load(assistant)
    run = runs.clear_run(model, drafter)
    drafts = str(assistant)
    exact = convert(
        str(target), tmp_path / "exact", draft_source=drafts, quantization=QAT, dtype="float32"
    )
    plain = convert(str(target), tmp_path / "plain", draft_source=drafts)
    packed = convert(str(target), tmp_path / "packed", draft_source=drafts, quantization=QAT)
    assert exact.target.equal == packed.target.equal == 1.0
    assert packed.target.bytes_out < 0.4 * plain.target.bytes_out
    own, found = (
        runs.difference(tmp_path / kind, run, passes.rms_relative) for kind in ("plain", "packed")
    )
    unrounded = tmp_path / "exact"
    with runs.replaced(model, unrounded), runs.replaced(drafter, unrounded / "drafter"):
        exact_run = runs.clear_run(model, drafter)
    wide = runs.difference(unrounded, exact_run)
    print(family, "exact", wide, "bfloat16", own, "packed", found)
    assert found.target < 2 * own.target
    assert found.drafter < 2 * own.drafter
    assert wide.target < TOLERANCE
    assert wide.drafter < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize(
    "family, layout", [("e2b", "conditional"), ("12b", "unified"), ("26b", "text")]
)
def test_transformers_unpacks_the_same_weights(
    family: str, layout: str, group: int | None, dtype: mx.Dtype, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    checkpoints.write_checkpoint(tmp_path / "in", family, layout=layout)
    paths = q4_0.write_compressed(tmp_path / "in", group, dtype)
    model = decompressed(tmp_path / "in")
    out = tmp_path / "out"
    report = convert(str(tmp_path / "in"), out)
    packed = formats.as_transformers(formats.packed_weights(out, read_config(out)))
    assert report.target.taken == len(packed) > 0.8 * len(paths)
    theirs = {
        name.replace("model.language_model.", "model."): value
        for name, value in model.named_parameters()
    }
    for name, value in packed.items():
        want = theirs[name].detach()
        assert str(want.dtype).rpartition(".")[2] == str(dtype).rpartition(".")[2]
        assert np.array_equal(q4_0.rounded(value, dtype), want.float().numpy()), name
    if dtype == mx.float32:
        run = runs.clear_run(model)
        found = runs.difference(out, run)
        print(family, group, found)
        assert found.target < TOLERANCE
        assert runs.our_text(out, run) == run.text.tokens.tolist() == runs.mlx_lm_text(out, run)


def decompressed(folder: Path) -> Any:
    """Load a packed folder as transformers does, with compressed-tensors unpacking it."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(
        folder,
        dtype="auto",
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.mark.parametrize("group", [32, None])
def test_codes_are_packed_as_compressed_tensors_does(group: int | None) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    weight = np.random.RandomState(0).standard_normal((6, 96)).astype(np.float32)
    codes, _ = q4_0.quantise(weight, group or 96)
    theirs = compressors.pack_to_int32(torch.tensor(codes.astype(np.int8) - 8), 4)
    assert np.array_equal(theirs.numpy(), q4_0.pack(codes))
