"""Our models against transformers 5.22.2: goldens made by tests/goldens/make.py, no torch needed.

Tiny random checkpoints of five families are written again from their recorded seed; the SHA-256
of their tensors proves they are the ones transformers ran. The goldens were chosen so that no
choice on a recorded path hangs on rounding, so tokens must be equal and floats within 1e-4 of the
largest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from gemma_mtp_mlx import SamplingParams, load, recomputation
from gemma_mtp_mlx.api import Pair
from gemma_mtp_mlx.convert import convert
from gemma_mtp_mlx.sampling import batch_sampling
from tests import checkpoints, passes
from tests.families import WINDOW

GOLDENS = Path(__file__).parent / "goldens"
INDEX = json.loads((GOLDENS / "index.json").read_text())
LENGTHS = INDEX["lengths"]
TOLERANCE = 1e-4
LAYOUTS = [
    (family, layout, config_layout)
    for family in checkpoints.FAMILIES
    for layout in checkpoints.layouts(family)
    for config_layout in ("published", "per_layer")
]


class Golden(NamedTuple):
    """A family: its index entry, its arrays, the folder of its checkpoints, the pair we loaded."""

    family: str
    entry: dict[str, Any]
    arrays: dict[str, np.ndarray]
    folder: Path
    pair: Pair

    def ids(self, length: int) -> list[int]:
        """Return the prompt of that length."""
        return [int(token) for token in self.arrays[f"{length}/prompt"]]

    def greedy(self, length: int) -> list[int]:
        """Return transformers' greedy continuation of that prompt."""
        return [int(token) for token in self.arrays[f"{length}/greedy"]]

    def shared(self, length: int) -> passes.Shared:
        """Return the K/V that transformers' assistant gets for that prompt."""
        return passes.Shared(*(self.arrays[f"{length}/{x}"] for x in passes.Shared._fields))


def _load(target: Path, assistant: Path) -> Pair:
    """Load a pair that never stops at an end of sequence, as the goldens did not."""
    pair = load(target, drafter=assistant)
    pair.prompts.eos = frozenset()
    return pair


@pytest.fixture(scope="module", params=list(checkpoints.FAMILIES))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Write a family's checkpoints from its recorded seed and load them with our loader."""
    family = request.param
    entry, folder = INDEX["families"][family], tmp_path_factory.mktemp(family)
    arrays = dict(np.load(GOLDENS / f"{family}.npz"))
    target, assistant = checkpoints.write_pair(folder, family, seed=entry["seed"])
    return Golden(family, entry, arrays, folder, _load(target, assistant))


def test_checkpoints_are_those_transformers_ran(golden: Golden) -> None:
    seed, folder = golden.entry["seed"], golden.folder
    written = checkpoints.write_checkpoint(folder / "again", golden.family, seed=seed)
    assert written == golden.entry["target_sha256"]
    written = checkpoints.write_assistant(folder / "again-assistant", golden.family, seed=seed)
    assert written == golden.entry["assistant_sha256"]


def test_goldens_hang_on_no_rounding(golden: Golden) -> None:
    assert golden.entry["min_gap"] >= 1e-3
    assert golden.entry["draft_gap"] >= 1e-3
    assert golden.entry.get("router_gap", 1.0) >= 1e-4
    assert max(LENGTHS) >= 5 * WINDOW


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block", [5, 16])
def test_verify_equals_transformers(golden: Golden, length: int, block: int) -> None:
    hidden, logits = passes.verify(golden.pair.target, golden.ids(length), block)
    at = golden.arrays[f"{length}/positions"]
    assert passes.relative(hidden[at], golden.arrays[f"{length}/hidden"]) < TOLERANCE
    assert passes.relative(logits[at], golden.arrays[f"{length}/logits"]) < TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk", [7, 512])
def test_prefill_equals_transformers(golden: Golden, length: int, chunk: int) -> None:
    hidden, logits, cache = passes.prefill(golden.pair.target, golden.ids(length), chunk)
    assert passes.relative(hidden, golden.arrays[f"{length}/hidden"][-1]) < TOLERANCE
    assert passes.relative(logits, golden.arrays[f"{length}/logits"][-1]) < TOLERANCE
    want = golden.shared(length)
    for name, got in passes.committed(cache, length)._asdict().items():
        last = getattr(want, name)[:, -got.shape[1] :]
        assert passes.relative(got, last) < TOLERANCE, name


@pytest.mark.parametrize("length", LENGTHS)
def test_drafter_equals_transformers_on_its_keys_and_values(golden: Golden, length: int) -> None:
    drafter = golden.pair.drafter
    assert drafter is not None
    drafts = golden.arrays[f"{length}/draft_tokens"]
    fed = [int(golden.arrays[f"{length}/bonus"]), *map(int, drafts[:-1])]
    hidden = golden.arrays[f"{length}/hidden"][-1]
    logits, states = passes.draft(golden.pair.target, drafter, golden.shared(length), hidden, fed)
    assert passes.relative(logits, golden.arrays[f"{length}/draft_logits"]) < TOLERANCE
    assert passes.relative(states, golden.arrays[f"{length}/draft_states"]) < TOLERANCE
    assert np.array_equal(logits.argmax(axis=-1), drafts)


@pytest.mark.parametrize("length", LENGTHS)
def test_recomputation_equals_transformers(golden: Golden, length: int) -> None:
    """What rounds are compared with: hidden states, keys and values, and drafts from them."""
    target, drafter, config = golden.pair.target, golden.pair.drafter, golden.pair.target.config
    assert drafter is not None
    at, want = golden.arrays[f"{length}/positions"], golden.shared(length)
    sliding, full = (want.sliding_keys, want.sliding_values), (want.full_keys, want.full_values)
    for second in (False, True):
        text = recomputation.compute(target, golden.ids(length), second=second)
        got = np.array(text.hidden)[at]
        assert passes.relative(got, golden.arrays[f"{length}/hidden"]) < TOLERANCE
        kv = {}
        for is_sliding, pair in ((True, sliding), (False, full)):
            layer = recomputation.right_layer(config, sliding=is_sliding)
            window = config.sliding_window if is_sliding else None
            kv[is_sliding] = recomputation.visible(text, layer, length, window)
            seen = kv[is_sliding].shape[1]
            both = np.concatenate([x[:, -seen:] for x in pair])
            assert passes.relative(np.array(kv[is_sliding]), both) < TOLERANCE
    drafts = golden.arrays[f"{length}/draft_tokens"].tolist()
    fed = [mx.array([token]) for token in (int(golden.arrays[f"{length}/bonus"]), *drafts[:-1])]
    positions = [[length]] * len(drafts)
    states = recomputation.draft_states(drafter, target, (text.hidden[-1:], fed), kv, positions)
    greedy = batch_sampling([SamplingParams()], [0])
    chosen = [drafter.choose(h, greedy, mx.array([[length]])).item() for h in states]
    assert chosen == drafts


@pytest.mark.parametrize("length", LENGTHS)
def test_first_round_drafts_what_transformers_drafts(
    golden: Golden, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert golden.pair.drafter is not None
    recorder = passes.Recorder(golden.pair.drafter)
    monkeypatch.setattr(golden.pair, "drafter", recorder)
    golden.pair.generate(golden.ids(length), SamplingParams(max_tokens=6), num_draft_tokens=4)
    assert recorder.proposals[0].tolist() == [golden.arrays[f"{length}/first_drafts"].tolist()]


@pytest.mark.parametrize("k", [0, 4])
def test_greedy_text_equals_transformers(golden: Golden, k: int) -> None:
    params = SamplingParams(max_tokens=200)
    prompts = [golden.ids(length) for length in LENGTHS]
    results = golden.pair.generate_batch(prompts, params, num_draft_tokens=k)
    for length, result in zip(LENGTHS, results, strict=True):
        assert result.tokens == golden.greedy(length), length
    alone = golden.pair.generate(golden.ids(17), SamplingParams(max_tokens=40), num_draft_tokens=k)
    assert alone.tokens == golden.greedy(17)[:40]


def test_greedy_text_ends_at_the_first_end_of_sequence(golden: Golden) -> None:
    target, prompts = golden.folder / "target", [golden.ids(length) for length in LENGTHS]
    ends = [golden.greedy(5)[10], golden.greedy(80)[25]]
    generation = {"eos_token_id": ends}
    (target / "generation_config.json").write_text(json.dumps(generation))
    pair = load(target, drafter=golden.folder / "assistant")
    results = pair.generate_batch(prompts, SamplingParams(max_tokens=60), num_draft_tokens=4)
    for length, result in zip(LENGTHS, results, strict=True):
        text = golden.greedy(length)[:60]
        end = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
        assert result.tokens == text[:end], length
        assert result.finish_reason == ("stop" if text[end - 1] in ends else "length")


@pytest.mark.parametrize("length", [17, 80])
def test_mlx_lm_gives_the_same_text_on_a_converted_folder(
    golden: Golden, length: int, tmp_path: Path
) -> None:
    source, drafter = str(golden.folder / "target"), str(golden.folder / "assistant")
    convert(source, tmp_path / "out", draft_source=drafter)
    model, _ = load_model(tmp_path / "out")
    states, tokens, text = model.make_cache(), golden.ids(length), []
    for _ in range(60):
        tokens = [int(model(mx.array([tokens]), cache=states)[0, -1].argmax())]
        text += tokens
    assert text == golden.greedy(length)[:60]


@pytest.mark.parametrize(("family", "layout", "config_layout"), LAYOUTS)
def test_every_layout_gives_the_same_model(
    family: str, layout: str, config_layout: str, tmp_path: Path
) -> None:
    seed = INDEX["families"][family]["seed"]
    pair = load(
        *checkpoints.write_pair(
            tmp_path, family, layout=layout, config_layout=config_layout, seed=seed
        )
    )
    arrays = np.load(GOLDENS / f"{family}.npz")
    ids = [int(token) for token in arrays["40/prompt"]]
    _, logits = passes.verify(pair.target, ids, 16)
    assert passes.relative(logits[arrays["40/positions"]], arrays["40/logits"]) < TOLERANCE
    pair.prompts.eos = frozenset()
    result = pair.generate(ids, SamplingParams(max_tokens=8))
    assert result.tokens == arrays["40/greedy"][:8].tolist()
