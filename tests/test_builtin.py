"""The built-in pair: small, trained, wired right, and as true to its own plain text as any other.

The acceptance floor is what notices a drafter input that is wrong: nothing else would.
"""

from itertools import cycle, islice
from pathlib import Path

import pytest

from bench.acceptance import first_draft_agreement, held_out_files
from gemma_mtp_mlx import Pair, Result, SamplingParams, hub, load

PROMPT = (Path(__file__).parents[1] / "bench" / "prompts" / "code.txt").read_text()
NEW = 40
SETTINGS = [
    SamplingParams(max_tokens=NEW),
    SamplingParams(max_tokens=NEW, temperature=1.0, seed=3),
    SamplingParams(max_tokens=NEW, temperature=0.8, top_p=0.9, seed=4),
]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load(hub.builtin())


@pytest.fixture(scope="module")
def rows(pair: Pair) -> list[tuple[list[int], SamplingParams]]:
    """Eight prompts of mixed lengths, up to more than three windows, and their settings."""
    ids = pair.encode(PROMPT, template=False)
    window = pair.target.config.sliding_window
    lengths = [window + 60, 5, 3 * window + 7, 1, window, 40, 2 * window, 17]
    return [(ids[:n], s) for n, s in zip(lengths, islice(cycle(SETTINGS), 8), strict=True)]


@pytest.fixture(scope="module")
def alone(pair: Pair, rows: list[tuple[list[int], SamplingParams]]) -> list[Result]:
    return [pair.generate(ids, params, num_draft_tokens=0) for ids, params in rows]


def test_it_is_small_enough_to_ship() -> None:
    files = [file for file in hub.builtin().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("k", [0, 1, 2, 4, 8, 15])
def test_same_tokens_with_the_trained_drafter(
    pair: Pair,
    rows: list[tuple[list[int], SamplingParams]],
    alone: list[Result],
    k: int,
    size: int,
) -> None:
    batch = rows[:size]
    results = pair.generate_batch(
        [ids for ids, _ in batch], [params for _, params in batch], num_draft_tokens=k
    )
    for result, expected in zip(results, alone, strict=False):
        assert result.tokens == expected.tokens
        assert result.text == expected.text
        assert result.finish_reason == expected.finish_reason
    if size == 8 and k:
        assert any(0 < result.stats.acceptance_rate < 1 for result in results)


def test_the_first_draft_is_the_targets_choice_where_nobody_has_trained(pair: Pair) -> None:
    """On held-out code. All its files together give 0.69; a wrong input costs far more."""
    agreement = []
    for file in held_out_files()[:4]:
        ids = pair.encode(file.read_text(), template=False)[:600]
        agreement += first_draft_agreement(pair, ids)
    assert len(agreement) > 1500
    assert sum(agreement) / len(agreement) >= 0.65


def test_a_chat_prompt_is_answered_in_python(pair: Pair) -> None:
    result = pair.generate(
        [{"role": "user", "content": "Write the function `add`: Return the sum."}],
        SamplingParams(max_tokens=60),
    )
    assert "def " in result.text
