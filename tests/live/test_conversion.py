"""What the converter writes is the model that transformers has saved, to us, mlx_lm and mlx_vlm.

Needs torch, transformers 5.22.2 and mlx-vlm, which CI installs. Sources are files that
transformers itself writes, in shards; "published" ones have their config.json as the hub has it,
which transformers no longer writes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("mlx_vlm")
if transformers.__version__ != "5.22.2":
    pytest.skip("the oracle is transformers 5.22.2", allow_module_level=True)

from bench.peers.layout import write_conditional  # noqa: E402
from gemma_mtp_mlx.convert import convert  # noqa: E402
from tests import checkpoints  # noqa: E402
from tests.families import assistant_config, target_config  # noqa: E402
from tests.goldens import oracle  # noqa: E402
from tests.live import runs  # noqa: E402

TOLERANCE = 1e-4
SHARD = 400_000  # bytes
CASES = [
    (family, layout, config_layout)
    for family in checkpoints.FAMILIES
    for layout in checkpoints.layouts(family)
    for config_layout in ("published", "per_layer")
]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    """Keep torch to one thread, as tiny matrices gain nothing from more, and loading quiet."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Return a function: family, layout -> folder of models as transformers saves them, and run."""

    @cache
    def get(family: str, layout: str) -> tuple[Path, runs.Run]:
        folder = tmp_path_factory.mktemp(f"{family}-{layout}")
        target, assistant = checkpoints.write_pair(folder / "drawn", family, layout=layout)
        model, drafter = oracle.load(target), oracle.load(assistant)
        model.save_pretrained(folder / "target", max_shard_size=SHARD)
        drafter.save_pretrained(folder / "assistant", max_shard_size=SHARD)
        return folder, runs.clear_run(model, drafter)

    return get


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def converted(request: pytest.FixtureRequest, saved, tmp_path_factory):
    """Return a converted folder of each kind, and what transformers computes."""
    family, layout, config_layout = request.param
    folder, run = saved(family, layout)
    assert len(list((folder / "target").glob("*.safetensors"))) > 2
    written = json.loads((folder / "target" / "config.json").read_text())
    assert "per_layer_config" in written.get("text_config", written) or config_layout != "per_layer"
    if config_layout == "published":
        for name, config in (
            ("target", target_config(family, layout, "published", "float32")),
            ("assistant", assistant_config(family, "published", "float32")),
        ):
            source = folder / f"{name}-published"
            source.mkdir()
            for file in (folder / name).iterdir():
                (source / file.name).symlink_to(file)
            (source / "config.json").unlink()
            (source / "config.json").write_text(json.dumps(config))
    kind = "-published" if config_layout == "published" else ""
    out = tmp_path_factory.mktemp("out")
    convert(str(folder / f"target{kind}"), out, draft_source=str(folder / f"assistant{kind}"))
    return out, run


def test_our_logits_are_transformers(converted) -> None:
    out, run = converted
    found = runs.difference(out, run)
    print(found)
    assert found.target < TOLERANCE
    assert found.drafter < TOLERANCE


def test_every_runtime_writes_transformers_text(converted) -> None:
    out, run = converted
    want = run.text.tokens.tolist()
    assert len(want) >= 20
    assert runs.our_text(out, run) == want
    assert runs.mlx_lm_text(out, run) == want
    assert runs.mlx_vlm_text(out, run) == want


@pytest.mark.parametrize("family", list(checkpoints.FAMILIES))
def test_mlx_vlm_reads_the_layout_it_drafts_with(saved, family: str, tmp_path: Path) -> None:
    folder, run = saved(family, "text")
    convert(str(folder / "target"), tmp_path / "out")
    (tmp_path / "conditional").mkdir()
    write_conditional(tmp_path / "out", tmp_path / "conditional")
    assert runs.mlx_vlm_text(tmp_path / "conditional", run) == run.text.tokens.tolist()
