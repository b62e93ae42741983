"""The promise: a row's tokens and logits depend on its prompt, settings and seed, on nothing else.

Every row of every batch, at every depth, with drafters of every quality, equals that prompt alone
without a drafter: the tokens, and bit for bit the logits they were drawn from (MLX's Linux CPU
backend computes a row alike in any company; on a GPU that needs kernels of our own).
"""

import numpy as np
import pytest

from gemma_mtp_mlx import SamplingParams
from gemma_mtp_mlx.round import Models
from tests.checkpoints import FAMILIES
from tests.conftest import LoadPair
from tests.doubles import ScriptedDrafter, run
from tests.families import WINDOW

NEW = WINDOW + 4
SETTINGS = [
    SamplingParams(max_tokens=NEW),
    SamplingParams(max_tokens=NEW, temperature=1.0, seed=11),
    SamplingParams(max_tokens=NEW, temperature=0.8, top_p=0.9, seed=12),
]
LENGTHS = [40, 1, 17, 80, 16, 33, 5, 64]  # the window is 16
DRAFTERS = ["random", "right", "wrong", "half"]
Reference = tuple[list[int], dict[int, np.ndarray]]


def _prompts() -> list[list[int]]:
    rng = np.random.RandomState(0)
    return [rng.randint(6, 128, n).tolist() for n in LENGTHS]


class Case:
    """One family's pair and what each prompt gives alone, without a drafter."""

    def __init__(self, get: LoadPair, family: str, dtype: str) -> None:
        self.pair = get(family, dtype)
        self._alone: dict[tuple[int, int], Reference] = {}

    def alone(self, prompt: int, setting: int) -> Reference:
        key = prompt, setting
        if key not in self._alone:
            models = Models(self.pair.target, None)
            engine = run(models, [_prompts()[prompt]], [SETTINGS[setting]], 0)
            logits = {position: found for (_, position), found in engine.logits().items()}
            self._alone[key] = engine.requests[0].tokens, logits
        return self._alone[key]

    def check(self, rows: list[tuple[int, int]], drafter: str | None, k: int) -> list[int]:
        """Run (prompt, setting) rows as one batch, compare each. Returns their rounds."""
        prompts = [_prompts()[prompt] for prompt, _ in rows]
        texts = [p + self.alone(*row)[0] for p, row in zip(prompts, rows, strict=True)]
        engine = run(
            Models(self.pair.target, self._drafter(drafter, texts)),  # type: ignore[arg-type]
            prompts,
            [SETTINGS[setting] for _, setting in rows],
            k,
        )
        logits = engine.logits()
        for row, key in enumerate(rows):
            tokens, alone = self.alone(*key)
            assert engine.requests[row].tokens == tokens, f"row {row}, {key}"
            first = len(prompts[row]) + 1
            for position in range(first, first + NEW - 1):
                assert np.array_equal(logits[row, position], alone[position]), f"{row} {position}"
        return [request.stats.draft_rounds for request in engine.requests]

    def _drafter(self, name: str | None, texts: list[list[int]]) -> object:
        if name is None:
            return None
        if name == "random":
            return self.pair.drafter
        p = {"right": 1.0, "wrong": 0.0, "half": 0.6}[name]
        return ScriptedDrafter(texts, p, self.pair.target.config.vocab_size)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tiny_pair: LoadPair) -> Case:
    return Case(tiny_pair, request.param, "float32")


@pytest.fixture(scope="module", params=FAMILIES)
def bf16_case(request: pytest.FixtureRequest, tiny_pair: LoadPair) -> Case:
    return Case(tiny_pair, request.param, "bfloat16")


def _batches(size: int) -> list[list[tuple[int, int]]]:
    """(prompt, setting) rows: alone, every setting in turn; together, mixed."""
    if size == 1:
        return [[(0, setting)] for setting in range(len(SETTINGS))]
    return [[(row, row % len(SETTINGS)) for row in range(size)]]


@pytest.mark.parametrize("size", [3, 8])
def test_without_a_drafter(case: Case, size: int) -> None:
    for rows in _batches(size):
        case.check(rows, None, 0)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("k", [1, 2, 4, 8, 15])
def test_with_a_drafter(case: Case, k: int, size: int, drafter: str) -> None:
    for rows in _batches(size):
        rounds = case.check(rows, drafter, k)
        fewest, most = -(-(NEW - 1) // (k + 1)), NEW - 1  # the first token needs no round
        if drafter == "right":
            assert set(rounds) == {fewest}
        elif drafter == "wrong":
            assert set(rounds) == {most}
        elif drafter == "half":
            assert all(fewest < count < most for count in rounds)


@pytest.mark.parametrize("drafter", ["random", "half"])
@pytest.mark.parametrize("k", [1, 4, 15])
def test_in_bfloat16(bf16_case: Case, k: int, drafter: str) -> None:
    for rows in (*_batches(1), *_batches(8)):
        bf16_case.check(rows, drafter, k)
