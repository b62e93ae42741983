"""Everything composes with the drafter: what a setting gives does not depend on depth or company.

Each setting runs alone without a drafter first. Then, drafting or not, alone or among eight rows of
other settings, it must give the same tokens, text, log-probabilities and end.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.utils import load_model

from gemma_mtp_mlx import Pair, Result, SamplingParams, hub, load
from gemma_mtp_mlx.constraint import Thinking, constraint_for, grammar_tokenizer
from gemma_mtp_mlx.depth import FixedDepth
from gemma_mtp_mlx.engine import Engine
from gemma_mtp_mlx.memory import Limits
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import Models
from gemma_mtp_mlx.sampling import derived_seed
from tests.conftest import LoadPair
from tests.text_model import write_text_model

PROMPT = (Path(__file__).parents[1] / "bench" / "prompts" / "code.txt").read_text()
NEW = 28


def no_echo(tokens: mx.array, logits: mx.array) -> mx.array:
    """Forbid the token two places back: a processor that needs exactly the right tokens."""
    banned = tokens[-2] if len(tokens) > 1 else tokens[-1]
    return mx.where(mx.arange(logits.shape[-1]) == banned, -mx.inf, logits)


def by_length(tokens: mx.array, logits: mx.array) -> mx.array:
    """Favour another token at every position."""
    return logits.at[:, (len(tokens) * 37) % logits.shape[-1]].add(6.0)


SETTINGS = {
    "greedy": SamplingParams(),
    "repetition": SamplingParams(repetition_penalty=1.4),
    "presence": SamplingParams(presence_penalty=1.5, presence_context_size=7),
    "frequency": SamplingParams(frequency_penalty=0.8, frequency_context_size=400),
    "bias": SamplingParams(logit_bias={11: -100.0, 12: 3.5, 300: 4.0}),
    "min-p": SamplingParams(temperature=1.0, min_p=0.1, seed=1),
    "top-k": SamplingParams(temperature=1.0, top_k=5, seed=2),
    "top-p": SamplingParams(temperature=1.0, top_p=0.7, seed=3),
    "logprobs": SamplingParams(temperature=0.7, seed=4, logprobs=4, repetition_penalty=1.2),
    "processors": SamplingParams(logits_processors=(no_echo, by_length), logprobs=1),
    "stop": SamplingParams(stop=("self.", "\n    def", "return")),
    "schema": SamplingParams(
        json_schema={
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        }
    ),
    "regex": SamplingParams(regex=r"def [a-z]{1,8}\(self\):", temperature=0.9, seed=5),
    "grammar": SamplingParams(grammar='start: ("x" | "yz")+ "."', temperature=0.5, seed=6),
    "everything": SamplingParams(
        temperature=0.9,
        top_p=0.95,
        min_p=0.02,
        seed=7,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        logit_bias={20: 1.0},
        logprobs=2,
        stop=("zzz",),
        num_draft_tokens=2,
        logits_processors=(no_echo,),
    ),
}
SETTINGS = {name: replace(params, max_tokens=NEW) for name, params in SETTINGS.items()}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load(hub.builtin())


@pytest.fixture(scope="module")
def prompts(pair: Pair) -> list[list[int]]:
    ids = pair.encode(PROMPT, template=False)
    return [ids[:n] for n in (120, 7, 300, 1, 64, 33, 200, 15)]


@pytest.fixture(scope="module")
def alone(pair: Pair, prompts: list[list[int]]) -> dict[str, Result]:
    return {
        name: pair.generate(prompts[number % 8], params, num_draft_tokens=0)
        for number, (name, params) in enumerate(SETTINGS.items())
    }


def facts(result: Result) -> tuple[object, ...]:
    return result.tokens, result.text, result.finish_reason, result.logprobs


@pytest.mark.parametrize("name", SETTINGS)
def test_with_a_drafter_alone(
    pair: Pair, prompts: list[list[int]], alone: dict[str, Result], name: str
) -> None:
    number = list(SETTINGS).index(name)
    result = pair.generate(prompts[number % 8], SETTINGS[name], num_draft_tokens=4)
    assert facts(result) == facts(alone[name])
    assert result.stats.draft_n_accepted <= len(result.tokens)


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("k", [0, 4])
def test_among_eight(
    pair: Pair, prompts: list[list[int]], alone: dict[str, Result], k: int, first: int
) -> None:
    names = list(SETTINGS)[first : first + 8]
    rows = [prompts[(first + row) % 8] for row in range(8)]
    results = pair.generate_batch(rows, [SETTINGS[name] for name in names], num_draft_tokens=k)
    for name, result in zip(names, results, strict=True):
        assert facts(result) == facts(alone[name]), name


def test_settings_do_what_they_say(alone: dict[str, Result]) -> None:
    assert len({tuple(result.tokens) for result in alone.values()}) >= len(alone) - 1
    assert json.loads(alone["schema"].text)["a"] in (1, 2)
    assert re.fullmatch(r"def [a-z]{1,8}\(self\):", alone["regex"].text)
    assert re.fullmatch(r"(x|yz)+\.?", alone["grammar"].text)
    assert alone["stop"].finish_reason == "stop"
    assert not any(stop in alone["stop"].text for stop in SETTINGS["stop"].stop)
    assert 11 not in alone["bias"].tokens


def test_logprobs_are_of_the_tokens_that_were_emitted(alone: dict[str, Result]) -> None:
    for name in ("logprobs", "processors", "everything"):
        result = alone[name]
        assert len(result.logprobs) == len(result.tokens)
        for token, (logprob, top) in zip(result.tokens, result.logprobs, strict=True):
            assert len(top) == SETTINGS[name].logprobs
            assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
            assert logprob <= top[0][1] <= 0
            assert dict(top).get(token, logprob) == logprob


def test_answers_to_one_prompt_have_seeds_of_their_own(
    pair: Pair, prompts: list[list[int]]
) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=9)
    choices = params.choices(4)
    assert [choice.seed for choice in choices] == [derived_seed(9, number) for number in range(4)]
    together = pair.generate_batch([prompts[0]] * 4, choices, num_draft_tokens=4)
    assert together[0].tokens == pair.generate(prompts[0], params, num_draft_tokens=0).tokens
    for choice, result in zip(choices, together, strict=True):
        assert result.tokens == pair.generate(prompts[0], choice, num_draft_tokens=0).tokens
    assert len({tuple(result.tokens) for result in together}) == 4


@pytest.mark.parametrize("rows, budget", [(1, 0), (8, 3), (1, 9)])
def test_a_thinking_budget_ends_thinking_alike(
    pair: Pair, prompts: list[list[int]], rows: int, budget: int
) -> None:
    thinking = Thinking(start=(40, 41), end=(50, 51, 52))
    params = SamplingParams(max_tokens=NEW, thinking_budget=budget)
    tokenizer = grammar_tokenizer(pair.tokenizer, pair.target.config.vocab_size, pair.prompts.eos)

    def run(prompts: Sequence[list[int]], k: int) -> list[list[int]]:
        models = Models(pair.target, pair.drafter)
        engine = Engine(models, FixedDepth(k), Limits(8, positions=4000))
        requests = []
        for prompt in prompts:
            ruled = constraint_for(params, prompt, tokenizer, thinking)
            requests.append(Request(prompt, params, pair.prompts.eos, constraint=ruled))
            engine.submit(requests[-1])
        engine.run()
        return [request.tokens for request in requests]

    asked = [[*prompt, *thinking.start] for prompt in prompts[:rows]]
    wanted = [run([prompt], 0)[0] for prompt in asked]
    assert run(asked, 4) == run(asked, 0) == wanted
    for tokens in wanted:
        assert tokens[budget : budget + 3] == list(thinking.end)


@pytest.mark.parametrize("k", [0, 4])
def test_penalties_see_what_mlx_lm_lets_them_see(tmp_path: Path, k: int) -> None:
    folder = write_text_model(tmp_path)
    pair = load(folder)
    model, _ = load_model(folder)
    prompt = np.random.RandomState(3).randint(6, 120, 30).tolist()
    params = SamplingParams(
        max_tokens=40,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        frequency_context_size=50,
        logit_bias={9: 0.7},
        logprobs=0,
    )
    processors = make_logits_processors(
        {9: 0.7}, 1.3, 20, presence_penalty=0.4, frequency_penalty=0.2, frequency_context_size=50
    )
    steps = list(
        generate_step(mx.array(prompt), model, max_tokens=40, logits_processors=processors)
    )
    result = pair.generate(prompt, params, num_draft_tokens=k)
    assert result.tokens == [int(token) for token, _ in steps]
    wanted = [float(logprobs[token]) for token, logprobs in steps]
    assert np.allclose([logprob for logprob, _ in result.logprobs], wanted, atol=1e-4)


def test_a_failed_request_raises_in_the_api(tiny_pair: LoadPair) -> None:
    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny_pair("31b").generate([7, 8], SamplingParams(logits_processors=(fail,)))
