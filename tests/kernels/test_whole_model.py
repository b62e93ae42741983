"""Whole models through their kernels' Metal text: the same tokens at any depth, right logits."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from gemma_mtp_mlx import Pair, SamplingParams, hub, load
from gemma_mtp_mlx.cache import Cache, Seat, seat_size
from gemma_mtp_mlx.readers import VerifyReader
from gemma_mtp_mlx.target import Target
from tests.checkpoints import FAMILIES
from tests.conftest import LoadPair
from tests.metal.executor import Executor
from tests.quantised import decoded, quantised_pair

PROMPTS = [[7, 8, 9], [50] * 30, [11, 3, 5, 90, 17]]  # the second one past the window
MIXED = [
    SamplingParams(max_tokens=16),
    SamplingParams(max_tokens=16, temperature=1.0, seed=3),
    SamplingParams(max_tokens=16, temperature=0.8, top_p=0.9, seed=4),
]
CODE = "class Stack:\n    def __init__(self):\n"


@pytest.fixture(scope="module")
def builtin() -> Pair:
    return load(hub.builtin())


def tokens_of(pair: Pair, params: list[SamplingParams], k: int) -> list[list[int]]:
    """What a batch of the prompts says."""
    return [r.tokens for r in pair.generate_batch(PROMPTS, params, num_draft_tokens=k)]


def test_the_built_in_pair_says_the_same_with_and_without_drafts(
    metal: Executor, builtin: Pair
) -> None:
    metal.mode = "fast"
    prompt = builtin.encode(CODE, template=False)
    plain, drafted = (
        builtin.generate(prompt, SamplingParams(max_tokens=64), num_draft_tokens=k) for k in (0, 4)
    )
    assert len(plain.tokens) == 64
    assert drafted.tokens == plain.tokens
    assert drafted.stats.draft_n_accepted > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_says_the_same_at_any_depth_and_in_any_company(
    metal: Executor, tiny_pair: LoadPair, family: str
) -> None:
    metal.mode = "fast"
    pair = tiny_pair(family, "bfloat16")
    together = tokens_of(pair, MIXED, 4)
    assert together == tokens_of(pair, MIXED, 0)
    for prompt, params, tokens in zip(PROMPTS, MIXED, together, strict=True):
        assert pair.generate(prompt, params, num_draft_tokens=0).tokens == tokens


@pytest.mark.parametrize("family", ["e4b", "26b"])
def test_tokens_are_those_of_written_logits(
    metal: Executor, tiny_pair: LoadPair, family: str
) -> None:
    """A row that asks for log-probabilities has its tokens drawn from logits, others have not."""
    metal.mode = "fast"
    pair = tiny_pair(family, "bfloat16")
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_tokens=16, temperature=temperature, seed=5)
        bare = pair.generate(PROMPTS[0], params, num_draft_tokens=2)
        assert "choose_rows" in {launch.kernel for launch in metal.launches}
        metal.launches.clear()
        written = SamplingParams(max_tokens=16, temperature=temperature, seed=5, logprobs=0)
        assert pair.generate(PROMPTS[0], written, num_draft_tokens=2).tokens == bare.tokens
        metal.launches.clear()


def text_of(target: Target) -> list[int]:
    """Tokens for two blocks."""
    return [i * 37 % target.config.vocab_size for i in range(1, 25)]


def logits_of(target: Target, tokens: list[int]) -> np.ndarray:
    """Logits [L, V] of a text verified in two blocks."""
    size = seat_size(len(tokens))
    cache = Cache(target.config, 1, size, target.dtype)
    found = []
    for start in range(0, len(tokens), 12):
        block = mx.array([tokens[start : start + 12]])
        rows = cache.rows([Seat(0, size, 0)], mx.array([start]), [start])
        reader = VerifyReader(cache, rows, block.shape[1])
        logits = target.logits(target.verify(block, reader))
        mx.eval(logits, reader.blocks)
        cache.commit(reader.blocks, rows)
        found.append(np.array(logits[0]))
    return np.concatenate(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_references(
    request: pytest.FixtureRequest, tiny_pair: LoadPair, family: str
) -> None:
    """No further from a float32 model's than twice what MLX's operations are in bfloat16."""
    target = tiny_pair(family, "bfloat16").target
    tokens = text_of(target)
    exact = Target(target.config)
    weights = tree_map(lambda weight: weight.astype(mx.float32), target.parameters())
    exact.update(weights)
    wanted, plain = logits_of(exact, tokens), logits_of(target, tokens)
    metal: Executor = request.getfixturevalue("metal")
    found = logits_of(target, tokens)
    assert metal.launches
    assert np.abs(found - wanted).max() <= 2 * np.abs(plain - wanted).max()


@pytest.mark.parametrize(
    "family, scales", [("e4b", (mx.float16, mx.bfloat16)), ("26b", (mx.float16,))]
)
def test_scales_may_be_of_other_dtypes(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, scales: tuple[mx.Dtype, ...]
) -> None:
    """Logits are those of decoded weights; tokens the same at any depth and in any company."""
    pair = quantised_pair(tmp_path, family, scales)
    tokens = text_of(pair.target)
    wanted, plain = (
        logits_of(decoded(pair.target, dtype), tokens) for dtype in (mx.float32, mx.bfloat16)
    )
    metal: Executor = request.getfixturevalue("metal")
    metal.mode = "fast"
    found = logits_of(pair.target, tokens)
    assert np.abs(found - wanted).max() <= 2 * np.abs(plain - wanted).max()
    params = [SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, temperature=1.0, seed=3)]
    together, again = (
        [r.tokens for r in pair.generate_batch(PROMPTS[::2], params, num_draft_tokens=k)]
        for k in (4, 0)
    )
    assert together == again
    for prompt, one, alone in zip(PROMPTS[::2], params, together, strict=True):
        assert pair.generate(prompt, one, num_draft_tokens=0).tokens == alone
