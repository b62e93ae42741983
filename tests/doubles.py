"""Drafters whose quality a test chooses, and an engine that keeps what its rounds computed."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.depth import FixedDepth
from gemma_mtp_mlx.drafter import Draw, Embed
from gemma_mtp_mlx.engine import Engine
from gemma_mtp_mlx.memory import Limits
from gemma_mtp_mlx.readers import SharedKV
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import Models, Round
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.seating import Row

NO_EOS: frozenset[int] = frozenset()


class ScriptedDrafter:
    """Knows each row's tokens and proposes the right one with probability p, else a wrong one."""

    def __init__(self, texts: Sequence[Sequence[int]], p: float, vocab_size: int) -> None:
        """texts: prompt and text of each row, by the slot it will sit in."""
        longest = max(map(len, texts)) + 64
        table = np.zeros((len(texts), longest), np.int32)
        for row, tokens in enumerate(texts):
            table[row, : len(tokens)] = tokens
        right = np.random.RandomState(len(texts)).random_sample(table.shape) < p
        self._table = mx.array(np.where(right, table, (table + 1) % vocab_size))

    def draft(
        self, tokens: mx.array, hidden: mx.array, shared: SharedKV, embed: Embed, draw: Draw, k: int
    ) -> mx.array:
        positions = shared.rows.lengths[:, None] + 1 + mx.arange(k)
        return self._table[shared.rows.slots[:, None], positions]


class Script:
    """A drafter that knows what each request will say and is right about a token with chance p.

    Whether it is right depends on the request's prompt and the position only, so a request has the
    same drafts in any company. The rows of its engine tell it who sits where.
    """

    def __init__(self, p: float, vocab_size: int) -> None:
        self._p, self._vocab_size = p, vocab_size
        self._texts: dict[Request, np.ndarray] = {}
        self._slots: dict[int, Request] = {}
        self.depths: list[int] = []  # how many drafts each round asked for

    def add(self, request: Request, tokens: Sequence[int]) -> None:
        """Learn what a request will say."""
        whole = np.zeros(len(request.prompt) + len(tokens) + 64, np.int32)
        whole[: len(request.prompt) + len(tokens)] = request.prompt + list(tokens)
        chance = np.random.RandomState(sum(request.prompt) % 2**32)
        right = chance.random_sample(len(whole)) < self._p
        self._texts[request] = np.where(right, whole, (whole + 1) % self._vocab_size)

    def sit(self, slot: int, request: Request) -> None:
        """Take note that a request sits in a slot from now on."""
        self._slots[slot] = request

    def draft(
        self, tokens: mx.array, hidden: mx.array, shared: SharedKV, embed: Embed, draw: Draw, k: int
    ) -> mx.array:
        self.depths.append(k)
        slots = max(self._slots) + 1
        longest = max(len(self._texts[request]) for request in self._slots.values())
        table = np.zeros((slots, longest), np.int32)
        for slot, request in self._slots.items():
            table[slot, : len(self._texts[request])] = self._texts[request]
        positions = shared.rows.lengths[:, None] + 1 + mx.arange(k)
        return mx.array(table)[shared.rows.slots[:, None], positions]


class ScriptedEngine(Engine):
    """An engine at a fixed depth that tells a scripted drafter who sits where."""

    def __init__(self, models: Models, k: int, limits: Limits) -> None:
        super().__init__(models, FixedDepth(k), limits)

    def _seat_next(self, joining: Sequence[Row]) -> Row | None:
        row = super()._seat_next(joining)
        if row is not None and isinstance(self.models.drafter, Script):
            self.models.drafter.sit(row.seat.slot, row.request)
        return row

    def check_idle(self) -> None:
        """Assert that nothing is left behind: all memory is free or kept for later prompts."""
        seating = self.seating
        kept = sum(segment.size for segment in seating.prefixes.segments)
        assert seating._segments.free + kept == seating._segments.size
        assert len(set(seating._slots)) == len(seating._slots) == self.cache_slots
        assert seating.prefixes.used_bytes <= seating.prefixes.window_bytes

    @property
    def cache_slots(self) -> int:
        """Rings of the cache."""
        layer = self.cache.config.last_owner(sliding=True).index
        return self.cache.storage[layer].shape[1] // self.cache.ring


class RecordingEngine(Engine):
    """An engine that remembers the logits behind every token of a round, by (request, position)."""

    def __init__(self, models: Models, k: int, limits: Limits) -> None:
        super().__init__(models, FixedDepth(k), limits)
        self.rounds: list[tuple[Round, list[Request]]] = []
        self.requests: list[Request] = []

    def _launch(self) -> None:
        super()._launch()
        if self._current is not None:
            self.rounds.append((self._current, [row.request for row in self.running]))

    def logits(self) -> dict[tuple[int, int], np.ndarray]:
        numbers = {request: number for number, request in enumerate(self.requests)}
        found = {}
        for done, requests in self.rounds:
            logits, report = np.array(done.logits), np.array(done.report)
            lengths = np.array(done.rows.lengths)
            for b, request in enumerate(requests):
                for offset in range(report[b, done.block.shape[1]] + 1):
                    found[numbers[request], int(lengths[b]) + 1 + offset] = logits[b, offset]
        return found


def run(
    models: Models,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    k: int,
    chunk: int = 512,
) -> RecordingEngine:
    """Generate to the end and return the engine."""
    requests = [Request(p, s, NO_EOS) for p, s in zip(prompts, params, strict=True)]
    positions = sum(seat_size(request.positions) for request in requests)
    limits = Limits(len(requests), positions=positions, prefix_share=0, chunk=chunk)
    engine = RecordingEngine(models, k, limits)
    engine.requests = [engine.submit(request) for request in requests]
    engine.run()
    return engine
