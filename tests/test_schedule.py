"""Any schedule gives any request what it gets alone: joins, leaves, cancels, prefixes, settings.

Hypothesis draws requests (shared beginnings, settings, limits), when they come, which are
cancelled and when, and how much room there is. Every request that ends by itself must have the
tokens and log-probabilities that it has alone, without a drafter; a cancelled one the beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gemma_mtp_mlx import SamplingParams
from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.memory import Limits
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import Models
from tests.conftest import LoadPair
from tests.doubles import NO_EOS, Script, ScriptedEngine

CHUNK = 16  # as wide as the tiny families' window
NEW = 14
SETTINGS = [
    SamplingParams(max_tokens=NEW),
    SamplingParams(max_tokens=NEW, temperature=1.0, seed=11, logprobs=2),
    SamplingParams(max_tokens=5, temperature=0.8, top_p=0.9, top_k=40, seed=12),
    SamplingParams(max_tokens=NEW, repetition_penalty=1.5, num_draft_tokens=2),
    SamplingParams(max_tokens=NEW, presence_penalty=0.6, frequency_penalty=0.3, logprobs=0),
    SamplingParams(max_tokens=3, temperature=1.2, min_p=0.05, seed=13, logit_bias={9: 2.0}),
    SamplingParams(max_tokens=1),
]
BEGINNINGS = [np.random.RandomState(n).randint(6, 128, 70).tolist() for n in range(2)]


@dataclass(frozen=True, slots=True)
class Job:
    """A request to come: beginning and how much of it, own tail, setting, when, cancelled when."""

    beginning: int
    shared: int
    tail: int
    setting: int
    arrives: int
    cancelled: int | None

    @property
    def prompt(self) -> list[int]:
        own = np.random.RandomState(1000 + self.tail).randint(6, 128, self.tail).tolist()
        return BEGINNINGS[self.beginning][: self.shared] + own

    @property
    def params(self) -> SamplingParams:
        return SETTINGS[self.setting]


JOBS = st.builds(
    Job,
    beginning=st.integers(0, 1),
    shared=st.sampled_from([0, 16, 33, 48, 70]),
    tail=st.integers(1, 20),
    setting=st.integers(0, len(SETTINGS) - 1),
    arrives=st.integers(0, 20),
    cancelled=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 25)),
)


class Case:
    """A pair and what each job gives alone."""

    def __init__(self, pair: object) -> None:
        self.target = pair.target  # type: ignore[attr-defined]
        self.alone = cache(self._alone)

    def _alone(self, prompt: tuple[int, ...], setting: int) -> Request:
        request = Request(prompt, SETTINGS[setting], NO_EOS)
        positions = seat_size(request.positions)
        limits = Limits(1, positions=positions, prefix_share=0, chunk=CHUNK)
        engine = ScriptedEngine(Models(self.target, None), 0, limits)
        engine.submit(request)
        engine.run()
        return request

    def wanted(self, job: Job) -> Request:
        return self.alone(tuple(job.prompt), job.setting)

    def check(self, jobs: Sequence[Job], rows: int, room: int, k: int) -> None:
        """Play a schedule. room: pool positions beyond the largest request's."""
        requests = [Request(job.prompt, job.params, NO_EOS) for job in jobs]
        largest = max(seat_size(request.positions) for request in requests)
        limits = Limits(rows, positions=largest + room, chunk=CHUNK)
        script = Script(0.7, self.target.config.vocab_size)
        for job, request in zip(jobs, requests, strict=True):
            script.add(request, self.wanted(job).tokens)
        engine = ScriptedEngine(Models(self.target, script), k, limits)  # type: ignore[arg-type]
        seen: dict[Request, list[int]] = {request: [] for request in requests}
        ended: list[Request] = []
        step = 0
        while engine.busy or any(job.arrives >= step for job in jobs):
            for job, request in zip(jobs, requests, strict=True):
                if job.arrives == step:
                    engine.submit(request)
                if job.cancelled is not None and step == job.arrives + job.cancelled:
                    engine.cancel(request)
            for event in engine.step():
                seen[event.request] += event.tokens
                if event.finish_reason is not None:
                    ended.append(event.request)
            step += 1
            assert step < 1000, "the engine does not come to an end"
        assert sorted(map(id, ended)) == sorted(map(id, requests)), "one last event each"
        for job, request in zip(jobs, requests, strict=True):
            wanted = self.wanted(job)
            assert seen[request] == request.tokens
            if request.finish_reason == "cancelled":
                assert request.tokens == wanted.tokens[: len(request.tokens)]
            else:
                assert request.finish_reason == wanted.finish_reason == "length"
                assert request.tokens == wanted.tokens
                assert request.logprobs == wanted.logprobs
        engine.check_idle()


@pytest.fixture(scope="module", params=["e4b", "26b"])
def case(request: pytest.FixtureRequest, tiny_pair: LoadPair) -> Case:
    return Case(tiny_pair(request.param))


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # an example takes too long to shrink thousands
    suppress_health_check=list(HealthCheck),
)
@given(
    jobs=st.lists(JOBS, min_size=1, max_size=10),
    rows=st.integers(1, 4),
    room=st.sampled_from([0, 60, 400]),
    k=st.sampled_from([0, 1, 4]),
)
def test_every_request_is_as_alone(
    case: Case, jobs: list[Job], rows: int, room: int, k: int
) -> None:
    case.check(jobs, rows, room, k)
