"""What `bench.soak_serve` asks, and that it notices a wrong text and a leak."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from bench.serving import jobs, leaks
from bench.serving.answers import Answer, difference
from bench.serving.jobs import Job
from bench.serving.leaks import Sample
from bench.serving.visitors import Ledger, Visitor
from bench.soak_serve import parse_arguments, soak
from tests.scripted_server import ScriptedServer, streamed


def test_jobs_are_the_same_again_and_reach_everything() -> None:
    made = jobs.make_jobs(200, "m", ollama=True)
    assert made == jobs.make_jobs(200, "m", ollama=True)
    assert Counter(job.path for job in made) == dict.fromkeys(jobs.OPENAI + jobs.OLLAMA, 50)
    assert {job.path for job in jobs.make_jobs(8, "m", ollama=False)} == set(jobs.OPENAI)
    used = Counter(name for job in made for name in {**job.body, **job.body.get("options", {})})
    wanted = {"n", "stop", "logprobs", "logit_bias", "response_format", "format", "top_p"}
    assert wanted | {"presence_penalty", "seed"} <= used.keys()
    assert all("stream" not in job.body for job in made)


LEAKS = (("running", 1), ("waiting", 2), ("kv_bytes", 65.0), ("fds", 21), ("threads", 50))
JOB = Job(3, "/v1/chat/completions", {"model": "m", "messages": []})


def wanted_answer(text: str = "abc") -> Answer:
    return Answer({0: text}, {0: "length"}, {}, 5, 4, complete=True)


def visited(server: ScriptedServer, behaviour: str, wanted: Answer) -> Ledger:
    ledger = Ledger()

    async def visit(port: int) -> None:
        visitor = Visitor(port, {3: wanted}, [("/v1/none", {})], ledger, 1)
        await visitor.visit([JOB], behaviour)

    server.run(visit)
    return ledger


@pytest.mark.parametrize("behaviour", ["stream", "slow", "leave"])
def test_a_planted_wrong_text_is_noticed(behaviour: str) -> None:
    server = ScriptedServer(lambda path, body: (200, "text/event-stream", streamed(list("abc"), 4)))
    right = visited(server, behaviour, wanted_answer())
    assert not right.wrong and not right.errors
    wrong = visited(server, behaviour, wanted_answer("xbc"))
    assert wrong.counts["wrong"] == 1 and "'xbc'" in wrong.wrong[0] and not wrong.errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"texts": {0: "abcd"}}, "choice 0 is 'abcd'"),
        ({"texts": {0: "ab"}}, "choice 0 is 'ab'"),
        ({"texts": {0: "abc", 1: ""}}, "choice 1 was not asked for"),
        ({"texts": {}}, "a choice is missing"),
        ({"finishes": {0: "stop"}}, "finishes"),
        ({"completion_tokens": 5}, "completion_tokens"),
        ({"logprobs": {0: [-1.0]}}, "logprobs"),
        ({"texts": {0: "ab"}, "complete": False}, None),
        ({"texts": {0: "b"}, "complete": False}, "choice 0 is 'b'"),
    ],
)
def test_differences(change: dict[str, Any], words: str | None) -> None:
    found = difference(replace(wanted_answer(), **change), wanted_answer())
    assert found is None if words is None else words in (found or "")


def test_a_full_queue_is_tried_again() -> None:
    replies = [(429, "application/json", [{"error": {"message": "full"}}])]
    whole = {"choices": [{"index": 0, "message": {"content": "abc"}, "finish_reason": "length"}]}
    whole |= {"usage": {"prompt_tokens": 5, "completion_tokens": 4}}
    replies += [(200, "application/json", [whole])]
    ledger = visited(ScriptedServer(lambda path, body: replies.pop(0)), "whole", wanted_answer())
    assert ledger.counts == {"whole": 1, "429": 1, "completed": 1} and ledger.tokens == 4


@pytest.mark.parametrize(("status", "errors"), [(400, 0), (404, 0), (500, 1), (200, 1)])
def test_nonsense_has_to_be_refused(status: int, errors: int) -> None:
    server = ScriptedServer(lambda path, body: (status, "application/json", [{}]))
    assert len(visited(server, "nonsense", wanted_answer()).errors) == errors


def test_a_planted_leak_is_noticed() -> None:
    before = Sample(0.0, 0, 0, 64.0, 20, 9, 10**8)
    assert leaks.leaks(before, replace(before, at=9.0, rss_bytes=10**9), []) == []
    for name, value in LEAKS:
        (found,) = leaks.leaks(before, replace(before, **{name: value}), [])
        assert found.startswith(f"{name}: ")
    steady = [replace(before, at=float(n), rss_bytes=10**8 + n % 2 * 10**7) for n in range(100)]
    rising = [
        replace(found, rss_bytes=found.rss_bytes + 10**6 * n) for n, found in enumerate(steady)
    ]
    assert not leaks.leaks(before, before, steady) and abs(leaks.grown(steady)) < 10**6
    assert leaks.grown(rising) == pytest.approx(99e6, rel=0.02)
    (found,) = leaks.leaks(before, before, rising)
    assert "grew by 9" in found


def test_metrics_are_summed_over_labels() -> None:
    text = '# HELP a\na{engine="0",x="b c"} 1.5\na{engine="1"} 2\nb 3e2\n'
    assert leaks.read_metrics(text) == {"a": 3.5, "b": 300.0}
    with pytest.raises(ValueError, match="no vllm:x"):
        leaks.metric({}, "vllm:x")


def test_a_short_soak_of_the_real_server_is_sound() -> None:
    given = ["--minutes", "0.1", "--jobs", "4", "--clients", "6", "--burst-every", "2"]
    given += ["--batch", "4", "--queue", "4"]
    summary = asyncio.run(soak(parse_arguments(given)))
    assert [summary[name] for name in ("wrong", "errors", "leaks")] == [[], [], []]
    assert summary["sound"]
    assert summary["jobs"] == 4 and summary["requests"]["completed"] > 4
    assert summary["most"]["running"] > 1 and summary["idle"][-1]["accepted"] > 0
