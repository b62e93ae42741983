"""The engine as a scheduler: who runs when, what it costs, what one request can do to others."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx import Pair, SamplingParams
from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.memory import Limits
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import Models
from tests.conftest import LoadPair
from tests.doubles import NO_EOS, Script, ScriptedEngine

CHUNK = 16
PROMPTS = [np.random.RandomState(n).randint(6, 128, 5 + 9 * n).tolist() for n in range(8)]


@pytest.fixture(scope="module")
def pair(tiny_pair: LoadPair) -> Pair:
    return tiny_pair("e4b")


def request_of(prompt: Sequence[int], max_tokens: int = 12, **settings: object) -> Request:
    return Request(prompt, SamplingParams(max_tokens=max_tokens, **settings), NO_EOS)  # type: ignore[arg-type]


def engine_of(pair: Pair, k: int = 0, drafter: object = None, **limits: object) -> ScriptedEngine:
    limits = {"max_batch": 4, "positions": 2000, "chunk": CHUNK} | limits
    return ScriptedEngine(Models(pair.target, drafter), k, Limits(**limits))  # type: ignore[arg-type]


def alone(pair: Pair, prompt: Sequence[int], **settings: object) -> list[int]:
    engine = engine_of(pair, prefix_share=0, max_batch=1)
    request = engine.submit(request_of(prompt, **settings))  # type: ignore[arg-type]
    engine.run()
    return request.tokens


def scripted(pair: Pair, requests: Sequence[Request], p: float) -> Script:
    script = Script(p, pair.target.config.vocab_size)
    for request in requests:
        script.add(request, alone(pair, request.prompt, max_tokens=request.max_tokens))
    return script


def test_a_row_joins_between_rounds_and_leaves_at_once(pair: Pair) -> None:
    engine = engine_of(pair)
    first = engine.submit(request_of(PROMPTS[0], 12))
    engine.step()
    second = engine.submit(request_of(PROMPTS[1], 4))
    for _ in range(6):  # its first token comes with the step that takes its prompt
        assert first in [event.request for event in engine.step()]
    assert second.finish_reason == "length"
    assert [row.request for row in engine.running] == [first]
    engine.run()
    engine.check_idle()


def test_a_long_prompt_stalls_others_for_one_chunk_at_most(pair: Pair) -> None:
    engine = engine_of(pair)
    running = engine.submit(request_of(PROMPTS[0], 60))
    engine.step()
    long = engine.submit(request_of([9] * 10 * CHUNK))
    for done in range(1, 10):
        assert [event.request for event in engine.step()] == [running]
        assert engine.prefilling.position == done * CHUNK
    assert {event.request for event in engine.step()} == {running, long}


def test_short_prompts_share_a_step(pair: Pair) -> None:
    engine = engine_of(pair)
    requests = [engine.submit(request_of([7 + n] * 5)) for n in range(4)]
    assert [event.request for event in engine.step()] == requests[:3]  # 15 tokens of 16


def test_requests_wait_in_order(pair: Pair) -> None:
    engine = engine_of(pair, max_batch=1)
    requests = [engine.submit(request_of(prompt, 3)) for prompt in PROMPTS[:4]]
    ended = [event.request for event in engine.run() if event.finish_reason]
    assert ended == requests
    assert requests[3].stats.queued_s > requests[1].stats.queued_s > 0


def test_a_row_joins_whose_penalties_look_further_back(pair: Pair) -> None:
    short = {"repetition_penalty": 1.8, "max_tokens": 24}
    long = {"frequency_penalty": 0.5, "frequency_context_size": 300, "max_tokens": 10}
    engine = engine_of(pair)
    first = engine.submit(request_of(PROMPTS[1], **short))  # type: ignore[arg-type]
    for _ in range(4):
        engine.step()
    second = engine.submit(request_of([9, 10] * 30, **long))  # type: ignore[arg-type]
    engine.run()
    assert first.tokens == alone(pair, first.prompt, **short)
    assert second.tokens == alone(pair, second.prompt, **long)


def test_a_small_request_does_not_overtake_one_that_waits_for_room(pair: Pair) -> None:
    size = seat_size(30)
    engine = engine_of(pair, positions=2 * size)
    engine.submit(request_of([5] * 10, 20))
    large = engine.submit(request_of([6] * 30, 2 * size - 30 - 16))
    small = engine.submit(request_of([7] * 3, 2))
    ended = [event.request for event in engine.run() if event.finish_reason]
    assert ended.index(small) > 0 and large.stats.queued_s <= small.stats.queued_s
    engine.check_idle()


def test_a_request_that_never_fits_is_refused_with_the_numbers(pair: Pair) -> None:
    engine = engine_of(pair, positions=100)
    with pytest.raises(
        ValueError, match=r"60 tokens and 30 new ones need 106 .* has 100"
    ) as caught:
        engine.submit(request_of([5] * 60, 30))
    assert "\n" not in str(caught.value)
    assert not engine.busy
    engine.submit(request_of([5] * 60, 24))


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"kv_bytes": 10**16}, r"10000000.00 GB .* asked for and .* left .* lower the budget"),
        ({"kv_bytes": 1000, "positions": None}, r"4 rows need at least .* budget is 0.00 GB"),
    ],
)
def test_a_budget_that_is_not_there_is_refused(pair: Pair, limits: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(pair, **limits)


def test_a_cancelled_request_frees_its_memory_before_the_next_round(pair: Pair) -> None:
    engine = engine_of(pair, max_batch=1)
    running = engine.submit(request_of(PROMPTS[0], 50))
    queued = [engine.submit(request_of(prompt, 3)) for prompt in PROMPTS[:2]]
    engine.step()
    engine.step()
    engine.cancel(running)
    engine.cancel(queued[0])
    events = engine.step()
    assert {event.request for event in events} == {running, *queued}
    assert running.finish_reason == queued[0].finish_reason == "cancelled"
    assert [row.request for row in engine.running] == [queued[1]]
    engine.run()
    engine.cancel(running)  # of no consequence
    assert not engine.busy
    engine.check_idle()


def test_a_row_is_cancelled_while_its_prompt_is_taken(pair: Pair) -> None:
    engine = engine_of(pair)
    long = engine.submit(request_of([9] * 10 * CHUNK))
    engine.step()
    engine.cancel(long)
    assert [event.request for event in engine.step()] == [long]
    assert not engine.busy
    engine.check_idle()


def raising(tokens: mx.array, logits: mx.array) -> mx.array:
    if len(tokens) > len(PROMPTS[1]) + 3:
        raise KeyError("a bug of the user's")
    return logits


def misshapen(tokens: mx.array, logits: mx.array) -> mx.array:
    return logits[0]


@pytest.mark.parametrize(
    "processor, kept, error", [(raising, 4, KeyError), (misshapen, 0, ValueError)]
)
@pytest.mark.parametrize("k", [0, 4])
def test_what_a_request_raises_ends_that_request(
    pair: Pair, k: int, processor: object, kept: int, error: type[Exception]
) -> None:
    requests = [request_of(PROMPTS[0]), request_of(PROMPTS[1], logits_processors=(processor,))]
    engine = engine_of(pair, k, scripted(pair, requests, 0.6))
    for request in requests:
        engine.submit(request)
    events = engine.run()
    assert requests[1].finish_reason == "error" and isinstance(requests[1].error, error)
    assert requests[1].tokens == alone(pair, PROMPTS[1])[: len(requests[1].tokens)]
    assert len(requests[1].tokens) <= kept
    assert requests[0].tokens == alone(pair, PROMPTS[0])
    assert [e.finish_reason for e in events if e.request is requests[1]].count("error") == 1
    engine.check_idle()


def test_a_prompt_that_cannot_be_computed_ends_its_request(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(pair)
    other = engine.submit(request_of(PROMPTS[0]))
    engine.step()
    bad = engine.submit(request_of(PROMPTS[2]))

    def fail(*args: object) -> None:
        raise RuntimeError("[malloc] no memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_run_chunk", fail)
        engine.step()
    engine.run()
    assert bad.finish_reason == "error" and "no memory" in str(bad.error)
    assert other.tokens == alone(pair, PROMPTS[0])
    engine.check_idle()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("k", [0, 4])
def test_one_wait_per_round(pair: Pair, k: int, rows: int) -> None:
    requests = [request_of([7 + n, 8, 9][: 1 + n % 3], 30) for n in range(rows)]
    engine = engine_of(pair, k, scripted(pair, requests, 0.6), max_batch=8, chunk=512)
    for request in requests:
        engine.submit(request)
    engine.run()
    rounds = max(request.stats.draft_rounds for request in requests)
    assert engine.syncs == rounds + 1  # and one for the first tokens, all in one step


def test_the_next_round_is_built_ahead_though_others_wait(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(pair, max_batch=1)
    for prompt in PROMPTS[:2]:
        engine.submit(request_of(prompt, 10))
    build, ahead = engine._build, []
    monkeypatch.setattr(engine, "_build", lambda n: ahead.append(n) or build(n))
    for _ in range(8):
        engine.step()
    assert engine.queue and ahead == [0] + [1] * 7


def same(tokens: mx.array, logits: mx.array) -> mx.array:
    return logits


@pytest.mark.parametrize("k, waits", [(0, 1), (4, 2)])
def test_two_waits_while_the_host_has_a_say(pair: Pair, k: int, waits: int) -> None:
    requests = [request_of(PROMPTS[0], 30), request_of(PROMPTS[0], 6, logits_processors=(same,))]
    engine = engine_of(pair, k, scripted(pair, requests, 0.6), chunk=512)
    for request in requests:
        engine.submit(request)
    engine.run()
    plain, hosted = (request.stats.draft_rounds for request in requests)
    assert engine.syncs == 1 + waits * hosted + (plain - hosted)


@pytest.mark.parametrize("p", [0.5, 0.75])
def test_a_row_gets_as_many_tokens_per_round_in_a_batch_of_8(pair: Pair, p: float) -> None:
    def rounds(together: int) -> list[int]:
        counts = []
        for begin in range(0, 8, together):
            requests = [request_of(prompt, 60) for prompt in PROMPTS[begin : begin + together]]
            script = scripted(pair, requests, p)
            engine = engine_of(pair, 4, script, max_batch=8, prefix_share=0)
            for request in requests:
                engine.submit(request)
            engine.run()
            counts += [request.stats.draft_rounds for request in requests]
        return counts

    one, eight = rounds(1), rounds(8)
    assert one == eight  # not only within 2 %: no row's acceptance depends on its company
    assert 15 < min(one) < max(one) < 45


def test_a_request_keeps_to_its_own_limit_of_drafts(pair: Pair) -> None:
    requests = [
        request_of(PROMPTS[n], 40, num_draft_tokens=limit) for n, limit in [(0, 1), (1, None)]
    ]
    engine = engine_of(pair, 4, scripted(pair, requests, 1.0))
    for request in requests:
        engine.submit(request)
    events = engine.run()
    longest = {
        request: max(len(event.tokens) for event in events if event.request is request)
        for request in requests
    }
    assert longest == {requests[0]: 2, requests[1]: 5}
    assert requests[0].stats.draft_n <= requests[0].stats.draft_rounds
    assert requests[0].tokens == alone(pair, PROMPTS[0], max_tokens=40)


def test_no_more_is_drafted_than_any_row_could_use(pair: Pair) -> None:
    requests = [request_of(PROMPTS[n], 20, num_draft_tokens=1 + n) for n in range(2)]
    script = scripted(pair, requests, 1.0)
    engine = engine_of(pair, 8, script)
    for request in requests:
        engine.submit(request)
    engine.run()
    assert max(script.depths) == 2


def test_no_request_changes_what_memory_the_rounds_take(pair: Pair) -> None:
    """Rounds beside kept prompts and a saved copy grow memory by less than one layer's keys."""
    engine = engine_of(pair, positions=12_000, kv_bytes=200_000_000)
    engine.submit(request_of([9] * 64, 4))
    engine.run()
    running = engine.submit(request_of([9] * 64 + PROMPTS[1], 150))
    engine.step()
    mx.reset_peak_memory()
    baseline = mx.get_active_memory()
    while engine.busy:
        engine.step()
    assert running.stats.cached_tokens == 64
    layer = pair.target.config.last_owner(sliding=False).index
    assert mx.get_peak_memory() - baseline < engine.cache.storage[layer].nbytes / 2
