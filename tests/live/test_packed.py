"""A packed folder is transformers' model with every packed weight replaced by what its codes mean.

Needs torch and transformers 5.22.2, which CI installs. Codes are decoded by tests/formats.py, not
by MLX. Checkpoints are of float32, so that what differs is rounding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if transformers.__version__ != "5.22.2":
    pytest.skip("the oracle is transformers 5.22.2", allow_module_level=True)

from gemma_mtp_mlx.convert import Quantization, convert  # noqa: E402
from tests import checkpoints, passes, q4_0  # noqa: E402
from tests.goldens import oracle  # noqa: E402
from tests.live import runs  # noqa: E402

TOLERANCE = 1e-3
SEED = 3
FORMATS = [
    *(
        Quantization("affine", bits, group)
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (32, 64, 128)
    ),
    *(Quantization(mode) for mode in ("mxfp4", "mxfp8", "nvfp4", "qat")),
]


class Source(NamedTuple):
    """A pair of folders, and what transformers loads from them."""

    target: Path
    assistant: Path
    model: Any
    drafter: Any


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    """Keep torch to one thread, as tiny matrices gain nothing from more, and loading quiet."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    """Return a function: family, on_grid -> Source, made once."""

    @cache
    def get(family: str, on_grid: bool) -> Source:
        pair = checkpoints.write_pair(tmp_path_factory.mktemp(family), family, seed=SEED)
        if on_grid:
            for folder in pair:
                q4_0.put_on_grid(folder, mx.float32)
        return Source(*pair, *map(oracle.load, pair))

    return get


def said(quantization: Quantization) -> str:
    return f"{quantization.mode}-{quantization.bits}-{quantization.group_size}"


@pytest.mark.parametrize("quantization", FORMATS, ids=said)
@pytest.mark.parametrize("family", ["e2b", "26b"])
def test_every_format(source, family: str, quantization: Quantization, tmp_path: Path) -> None:
    given, out = source(family, quantization.mode == "qat"), tmp_path / "out"
    convert(str(given.target), out, quantization=quantization)
    count = sum(parameter.numel() for parameter in given.model.parameters())
    with runs.replaced(given.model, out) as packed:
        assert packed > count / 2
        run = runs.clear_run(given.model, tokens=20)
    plain = oracle.prefill(given.model, run.ids).logits.numpy()
    moved = passes.relative(run.prefill.logits.numpy(), plain)
    assert moved == 0 if quantization.mode == "qat" else moved > 10 * TOLERANCE
    found = runs.difference(out, run)
    print(said(quantization), found, f"moved by {moved:.2g}")
    assert found.target < TOLERANCE
    want = run.text.tokens.tolist()
    assert runs.our_text(out, run) == want
    assert runs.mlx_lm_text(out, run) == want


@pytest.mark.parametrize("mode", ["affine", "nvfp4"])
@pytest.mark.parametrize("family", list(checkpoints.FAMILIES))
def test_every_family_with_its_drafter(source, family: str, mode: str, tmp_path: Path) -> None:
    given, out = source(family, False), tmp_path / "out"
    convert(
        str(given.target), out, draft_source=str(given.assistant), quantization=Quantization(mode)
    )
    with (
        runs.replaced(given.model, out) as packed,
        runs.replaced(given.drafter, out / "drafter") as drafting,
    ):
        assert packed and drafting
        run = runs.clear_run(given.model, given.drafter)
    found = runs.difference(out, run)
    print(mode, found)
    assert found.target < TOLERANCE
    assert found.drafter < TOLERANCE
    want = run.text.tokens.tolist()
    assert runs.our_text(out, run) == want
    assert runs.mlx_lm_text(out, run) == want
