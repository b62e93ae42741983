"""Prompts that begin alike: taken over up to a whole chunk, within a budget, to the same text."""

import hashlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp_mlx import Pair
from gemma_mtp_mlx.cache import position_bytes, seat_size, window_bytes
from gemma_mtp_mlx.memory import Limits, Plan
from gemma_mtp_mlx.prefix import PrefixCache, Segment, digests
from gemma_mtp_mlx.prompt_cache import read_prompt_cache, write_prompt_cache
from gemma_mtp_mlx.round import Models
from gemma_mtp_mlx.seating import Seating
from gemma_mtp_mlx.segments import Segments
from tests.conftest import LoadPair
from tests.doubles import ScriptedEngine
from tests.test_engine import CHUNK, alone, engine_of, request_of

BEGINNING = np.random.RandomState(5).randint(6, 128, 5 * CHUNK).tolist()
OTHER = np.random.RandomState(6).randint(6, 128, 5 * CHUNK).tolist()


@pytest.fixture(scope="module")
def pair(tiny_pair: LoadPair) -> Pair:
    return tiny_pair("31b")


class CountingEngine(ScriptedEngine):
    """An engine that counts the prompt tokens it computes and the segments it copies."""

    computed = copied = 0

    def _run_chunk(self, row, tokens, last):  # type: ignore[no-untyped-def]
        self.computed += len(tokens)
        return super()._run_chunk(row, tokens, last)


def counting(pair: Pair, monkeypatch: pytest.MonkeyPatch, **limits: object) -> CountingEngine:
    limits = {"max_batch": 4, "positions": 2000, "chunk": CHUNK} | limits
    engine = CountingEngine(Models(pair.target, None), 0, Limits(**limits))  # type: ignore[arg-type]
    read = engine.cache.read_prompt

    def copy(start: int, count: int) -> object:
        engine.copied += 1
        return read(start, count)

    monkeypatch.setattr(engine.cache, "read_prompt", copy)
    return engine


@pytest.mark.parametrize("extra", [1, 7, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("chunks", [1, 3])
def test_only_what_follows_the_common_chunks_is_computed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, chunks: int, extra: int
) -> None:
    common = BEGINNING[: chunks * CHUNK]
    engine = counting(pair, monkeypatch)
    engine.submit(request_of([*common, 7, 8, 9]))
    engine.run()
    engine.computed = 0
    prompt = common + OTHER[:extra]
    request = engine.submit(request_of(prompt))
    engine.run()
    assert (engine.computed, request.stats.cached_tokens) == (extra, len(common))
    assert request.tokens == alone(pair, prompt)


def test_equal_prompts_that_come_together_are_computed_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = counting(pair, monkeypatch)
    prompt = [*BEGINNING[: 2 * CHUNK], 7]
    requests = [engine.submit(request_of(prompt)) for _ in range(4)]
    engine.run()
    assert engine.computed == len(prompt) + 3
    assert {tuple(request.tokens) for request in requests} == {tuple(alone(pair, prompt))}
    assert [len(kept.chain) for kept in engine.seating.prefixes.segments] == [2]  # and kept once


def test_the_last_token_of_a_prompt_is_always_computed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = counting(pair, monkeypatch)
    for computed in (2 * CHUNK, CHUNK):
        engine.computed = 0
        request = engine.submit(request_of(BEGINNING[: 2 * CHUNK]))
        engine.run()
        assert engine.computed == computed
        assert request.tokens == alone(pair, BEGINNING[: 2 * CHUNK])


def test_tokens_that_were_generated_are_not_reused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = counting(pair, monkeypatch)
    first = engine.submit(request_of(BEGINNING[:CHUNK], 2 * CHUNK))
    engine.run()
    prompt = first.prompt + first.tokens + [9]
    request = engine.submit(request_of(prompt))
    engine.run()
    assert request.stats.cached_tokens == CHUNK
    assert request.tokens == alone(pair, prompt)


def test_a_running_row_is_copied_from_and_a_finished_one_taken_over(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = counting(pair, monkeypatch)
    running = engine.submit(request_of(BEGINNING[: CHUNK + 1], 30))
    engine.step()
    engine.step()
    second = engine.submit(request_of(BEGINNING[: CHUNK + 5], 4))
    engine.step()
    assert second.stats.cached_tokens == CHUNK and engine.copied == 1
    engine.run()
    third = engine.submit(request_of(BEGINNING[: CHUNK + 9], 4))
    engine.run()
    assert third.stats.cached_tokens == CHUNK and engine.copied == 1
    for request in (running, second, third):
        assert request.tokens == alone(pair, request.prompt, max_tokens=request.max_tokens)
    engine.check_idle()


def test_a_longer_prompt_is_kept_when_a_part_of_it_is_wanted(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = counting(pair, monkeypatch)
    engine.submit(request_of(BEGINNING, 2))
    engine.run()
    for prompt, cached in (
        ([*BEGINNING[:CHUNK], 7, 8], CHUNK),
        ([*BEGINNING, 9], len(BEGINNING)),
    ):
        request = engine.submit(request_of(prompt, 3))
        engine.run()
        assert request.stats.cached_tokens == cached
        assert request.tokens == alone(pair, prompt, max_tokens=3)
        engine.check_idle()


def test_kept_prompts_make_room_for_others(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    size = seat_size(3 * CHUNK + 1 + 4)
    engine = counting(pair, monkeypatch, positions=2 * size)
    for number in range(6):
        prompt = [10 + number] * 3 * CHUNK + [7]
        request = engine.submit(request_of(prompt, 4))
        engine.run()
        assert request.tokens == alone(pair, prompt, max_tokens=4)
        engine.check_idle()
    again = engine.submit(request_of([15] * 3 * CHUNK + [9], 4))
    gone = engine.submit(request_of([10] * 3 * CHUNK + [9], 4))
    engine.run()
    assert (again.stats.cached_tokens, gone.stats.cached_tokens) == (3 * CHUNK, 0)


def test_copied_windows_stay_within_their_budget(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dtype = pair.target.config, pair.target.dtype
    one = window_bytes(config, dtype, config.sliding_window + 1)
    engine = counting(pair, monkeypatch)
    engine.seating.prefixes = prefixes = PrefixCache(CHUNK, 3 * one)
    for number in range(5):
        engine.submit(request_of([10 + number] * 2 * CHUNK, 2))
        engine.run()
        assert prefixes.used_bytes <= 3 * one
    engine.computed = 0
    last = engine.submit(request_of([14] * 3 * CHUNK, 2))
    first = engine.submit(request_of([10] * 3 * CHUNK, 2))
    engine.run()
    assert (last.stats.cached_tokens, first.stats.cached_tokens) == (2 * CHUNK, 0)
    assert first.tokens == alone(pair, first.prompt, max_tokens=2)


@pytest.mark.parametrize("position", [CHUNK, 3 * CHUNK])
def test_a_drafter_finds_all_it_may_see_after_a_hit(pair: Pair, position: int) -> None:
    """The last W + 1 positions of the rings: one more than the target itself ever looks at."""
    prompt = [*BEGINNING[:position], 7]

    def window(engine: ScriptedEngine) -> list[np.ndarray]:
        engine.submit(request_of(prompt, 9))
        while not engine.running:
            engine.step()
        (row,) = engine.running
        assert row.request.stats.cached_tokens in (0, position)
        cache, seen = engine.cache, min(position, pair.target.config.sliding_window + 1)
        places = row.seat.slot * cache.ring + np.arange(position - seen, position) % cache.ring
        sliding = [layer for layer in pair.target.config.layers if layer.sliding and layer.owns_kv]
        stored = [cache.storage[layer.index] for layer in sliding]
        return [np.array(kv)[:, places] for kv in stored]

    warm = engine_of(pair)
    for other in ([*BEGINNING[:position], 9], OTHER):  # the second leaves its own in the ring
        warm.submit(request_of(other, 2))
        warm.run()
    hit, fresh = window(warm), window(engine_of(pair, prefix_share=0))
    assert all(np.array_equal(*both) for both in zip(hit, fresh, strict=True))


def test_without_a_budget_nothing_is_kept(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = counting(pair, monkeypatch, prefix_share=0)
    for _ in range(2):
        engine.computed = 0
        engine.submit(request_of(BEGINNING, 2))
        engine.run()
        assert engine.computed == len(BEGINNING)
    assert engine.seating._segments.free == 2000


def test_a_kept_window_is_a_copy(pair: Pair) -> None:
    """What is kept holds no storage: rounds stay in place, and what they write is not seen."""
    engine = engine_of(pair, positions=20_000, kv_bytes=400_000_000)
    engine.submit(request_of(BEGINNING, 2))
    engine.run()
    ((window, _),) = list(engine.seating.prefixes._windows.values())[-1:]
    before = [np.array(kv) for kv in window.values()]
    engine.submit(request_of(OTHER, 100))
    mx.reset_peak_memory()
    baseline = mx.get_active_memory()
    engine.run()
    after = [np.array(kv) for kv in window.values()]
    assert all(np.array_equal(*both) for both in zip(before, after, strict=True))
    largest = max(kv.nbytes / 2 for kv in engine.cache.storage.values())
    assert mx.get_peak_memory() - baseline < largest


def test_a_prompt_cache_survives_on_disk(pair: Pair, tmp_path: Path) -> None:
    engine, file = engine_of(pair), tmp_path / "prompt.safetensors"
    engine.submit(request_of(BEGINNING, 1))
    engine.run()
    saved = engine.save_prompt([*BEGINNING, 9, 9])
    assert saved is not None and list(saved.tokens) == BEGINNING
    write_prompt_cache(file, saved, "model")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    fresh = engine_of(pair)
    fresh.load_prompt(read_prompt_cache(file, "model", pair.target.config, CHUNK))
    prompt = [*BEGINNING, 11, 12]
    request = fresh.submit(request_of(prompt))
    fresh.run()
    assert request.stats.cached_tokens == len(BEGINNING)
    assert request.tokens == alone(pair, prompt)
    fresh.check_idle()


def test_a_prompt_cache_of_another_model_is_refused(pair: Pair, tmp_path: Path) -> None:
    engine, file = engine_of(pair), tmp_path / "prompt.safetensors"
    engine.submit(request_of(BEGINNING, 1))
    engine.run()
    saved = engine.save_prompt(BEGINNING)
    assert saved is not None and engine.save_prompt(OTHER) is None
    write_prompt_cache(file, saved, "model")
    config = pair.target.config
    with pytest.raises(ValueError, match="another model"):
        read_prompt_cache(file, "other", config, CHUNK)
    with pytest.raises(ValueError, match="another model"):
        read_prompt_cache(file, "model", config, 2 * CHUNK)
    file.write_bytes(hashlib.sha256(b"").digest())
    with pytest.raises(ValueError, match="is not a prompt cache"):
        read_prompt_cache(file, "model", config, CHUNK)
    with pytest.raises(ValueError, match="holds 80 positions and the budget has 60"):
        engine_of(pair, positions=60).load_prompt(saved)


def test_a_digest_covers_all_that_is_before_it() -> None:
    tokens = list(range(40))
    assert len(digests(tokens, 16)) == 2
    assert digests(tokens, 16) == digests(tokens[:32], 16)
    changed = [99, *tokens[1:]]
    assert not set(digests(tokens, 16)) & set(digests(changed, 16))


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "give", "shrink", "extend"]), st.integers(1, 40)),
        max_size=60,
    )
)
def test_segments_never_overlap(steps: list[tuple[str, int]]) -> None:
    pool, held = Segments(100), dict[int, int]()
    for action, number in steps:
        if action == "take":
            start = pool.take(number)
            if start is not None:
                held[start] = number
        elif held:
            start = sorted(held)[number % len(held)]
            size = held[start]
            if action == "give":
                pool.give(start, held.pop(start))
            elif action == "shrink":
                held[start] = size // 2
                pool.give(start + size // 2, size - size // 2)
            elif pool.extend(start, size, size + number):
                held[start] = size + number
        held = {start: size for start, size in held.items() if size}
        ordered = sorted(held.items())
        ends = [start + size for start, size in ordered]
        assert all(end <= start for end, (start, _) in zip(ends, ordered[1:], strict=False))
        assert not ends or ends[-1] <= 100
        assert pool.free == 100 - sum(held.values())


def test_bytes_are_what_the_cache_reserves(pair: Pair) -> None:
    engine = engine_of(pair)
    config, dtype, cache = pair.target.config, pair.target.dtype, engine.cache
    assert cache.nbytes == 2000 * position_bytes(config, dtype) + window_bytes(
        config, dtype, 4 * cache.ring
    )


def test_seating_gives_up_the_least_recently_used(pair: Pair) -> None:
    seating = Seating(engine_of(pair).cache, Plan(4, 2000, 10**9), CHUNK)
    kept = [Segment(start, 10, [bytes([start])]) for start in (0, 10, 20)]
    for segment in kept:
        seating.prefixes.add(segment.chain[0], {})
        assert seating.prefixes.keep(segment)
    hit = seating.prefixes.find([bytes([0])], [])
    assert hit is not None and hit.segment is kept[0]
    assert [seating.prefixes.give_up(kept[2]) for _ in range(3)] == [kept[1], kept[0], None]
