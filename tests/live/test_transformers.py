"""Our models against transformers running beside them, on checkpoints no golden knows.

Needs torch and transformers 5.22.2, which CI installs. Every family in every tensor layout and
both config layouts; the seed is the first one from SEED at which no choice hangs on rounding.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if transformers.__version__ != "5.22.2":
    pytest.skip("the oracle is transformers 5.22.2", allow_module_level=True)

from gemma_mtp_mlx import SamplingParams, load  # noqa: E402
from tests import checkpoints, passes  # noqa: E402
from tests.goldens import oracle  # noqa: E402

SEED, TOKENS, TOLERANCE = 1000, 40, 1e-4
GAP, ROUTER_GAP = 1e-3, 1e-4
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


class Oracle:
    """What transformers computes for one family: prefill, drafts and text of one prompt."""

    def __init__(self, folder: Path, family: str, seed: int) -> None:
        self.seed = seed
        target, assistant = checkpoints.write_pair(folder, family, seed=seed)
        self.model, self.assistant = oracle.load(target), oracle.load(assistant)
        size = self.model.config.vocab_size
        state = np.random.RandomState(seed)
        self.ids = (state.random_sample(45) * size).astype(int).tolist()
        self.prefill = oracle.prefill(self.model, self.ids)
        self.text = oracle.greedy(self.model, self.ids, TOKENS)
        bonus = int(self.text.tokens[0])
        self.drafted = oracle.draft(self.model, self.assistant, bonus, self.prefill)

    @property
    def clear(self) -> bool:
        """Whether no choice is closer than float32 rounding can turn."""
        return min(self.text.gap, self.drafted.gap) >= GAP and self.text.router_gap >= ROUTER_GAP


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory):
    """Return a function: family -> Oracle, made once per family."""

    @cache
    def get(family: str) -> Oracle:
        for seed in range(SEED, SEED + 20):
            made = Oracle(tmp_path_factory.mktemp(family), family, seed)
            if made.clear:
                return made
        raise AssertionError(f"{family}: no seed among 20 keeps the gaps")

    return get


@pytest.mark.parametrize(("family", "layout", "config_layout"), CASES)
def test_folder_means_the_same_to_both(wanted, family, layout, config_layout, tmp_path) -> None:
    want = wanted(family)
    target, assistant = checkpoints.write_pair(
        tmp_path, family, layout=layout, config_layout=config_layout, seed=want.seed
    )
    theirs = oracle.prefill(oracle.load(target), want.ids)
    assert torch.equal(theirs.logits, want.prefill.logits)
    ours = load(target, drafter=assistant)
    ours.prompts.eos = frozenset()
    hidden, logits = passes.verify(ours.target, want.ids, 5)
    assert passes.relative(hidden, theirs.hidden.numpy()) < TOLERANCE
    assert passes.relative(logits, theirs.logits.numpy()) < TOLERANCE
    for k in (0, 4):
        text = ours.generate(want.ids, SamplingParams(max_tokens=TOKENS), num_draft_tokens=k)
        assert text.tokens == want.text.tokens.tolist()


@pytest.mark.parametrize("config_layout", ["published", "per_layer"])
@pytest.mark.parametrize("family", list(checkpoints.FAMILIES))
def test_drafter_drafts_what_transformers_drafts(wanted, family, config_layout, tmp_path) -> None:
    want = wanted(family)
    target, assistant = checkpoints.write_pair(
        tmp_path, family, config_layout=config_layout, seed=want.seed
    )
    theirs = oracle.draft(
        want.model, oracle.load(assistant), int(want.text.tokens[0]), want.prefill
    )
    assert np.array_equal(theirs.logits, want.drafted.logits)
    pair = load(target, drafter=assistant)
    assert pair.drafter is not None
    kinds = (oracle.FULL, oracle.SLIDING)
    shared = passes.Shared(*(x[0].numpy() for kind in kinds for x in want.prefill.shared[kind]))
    fed = [int(want.text.tokens[0]), *theirs.tokens[:-1].tolist()]
    hidden = want.prefill.hidden[-1].numpy()
    logits, states = passes.draft(pair.target, pair.drafter, shared, hidden, fed)
    assert passes.relative(logits, theirs.logits) < TOLERANCE
    assert passes.relative(states, theirs.states) < TOLERANCE


@pytest.mark.parametrize("family", list(checkpoints.FAMILIES))
def test_per_layer_layout_is_what_transformers_saves(family: str, tmp_path: Path) -> None:
    for name, write in (
        ("target", checkpoints.write_checkpoint),
        ("assistant", checkpoints.write_assistant),
    ):
        write(tmp_path / name, family, config_layout="published")
        config = transformers.AutoConfig.from_pretrained(tmp_path / name)
        config.save_pretrained(tmp_path / "saved")
        write(tmp_path / "again", family, config_layout="per_layer")
        saved, ours = (
            json.loads((tmp_path / folder / "config.json").read_text())
            for folder in ("saved", "again")
        )
        theirs = saved.get("text_config", saved)
        assert "global_head_dim" not in theirs
        wrote = ours.get("text_config", ours)
        assert wrote["per_layer_config"] == theirs["per_layer_config"]
        assert {key: theirs[key] for key in wrote if key in theirs} == {
            key: wrote[key] for key in wrote if key in theirs
        }
