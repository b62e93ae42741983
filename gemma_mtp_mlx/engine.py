"""The engine: requests join between rounds, rounds run over all rows, rows leave when done.

Token ids in, token ids out. One step reads the round in flight, lets rows leave and join, runs at
most one chunk of prompts and launches the next round. Each prompt is prefilled alone, in chunks
that end at multiples of the chunk size from position 0, so its keys and values do not depend on
who else is there. While the device runs a round, the host builds the graph of the next one; it
waits once per round, in `_read`, and once more where the host has a say in a row's tokens.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.attention import Rows
from gemma_mtp_mlx.cache import MAX_BLOCK, Cache, position_bytes, ring_size, window_bytes
from gemma_mtp_mlx.depth import AutoDepth, FixedDepth
from gemma_mtp_mlx.host import host_rules
from gemma_mtp_mlx.memory import Limits, plan, wire_memory
from gemma_mtp_mlx.outcome import Logprob, Outcome, unpack
from gemma_mtp_mlx.penalties import context_size
from gemma_mtp_mlx.prompt_cache import PromptCache
from gemma_mtp_mlx.readers import PromptReader
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import (
    MAX_DRAFTS,
    DecodeState,
    Models,
    Round,
    Settings,
    begin,
    build_round,
    decide,
    draft_block,
    first_tokens,
    settings_of,
    verify_block,
)
from gemma_mtp_mlx.seating import Row, Seating

CUT_SHORT = ("cancelled", "error")


@dataclass(frozen=True, slots=True)
class Event:
    """New tokens of a request. finish_reason: set in its last event, which may have no tokens."""

    request: Request
    tokens: list[int]
    logprobs: list[Logprob]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What an engine holds: rows, positions of the full layers' pools, bytes of keys and values.

    Used is what running rows hold; what is kept for later prompts makes room when it is needed.
    """

    running: int
    waiting: int
    positions: int
    positions_used: int
    bytes: int
    bytes_used: int


class Engine:
    """Requests in one running batch.

    depth: how many tokens to draft; limits: rows, memory, chunk size.
    Raises: ValueError if the memory asked for is not there.
    """

    def __init__(
        self, models: Models, depth: AutoDepth | FixedDepth, limits: Limits | None = None
    ) -> None:
        limits = limits or Limits()
        target = models.target
        spent = plan(target.config, target.dtype, limits)
        wire_memory()
        self.models = models
        self.depth = depth
        self.chunk = limits.chunk
        self.cache = Cache(target.config, spent.slots, spent.positions, target.dtype)
        self.seating = Seating(self.cache, spent, limits.chunk)
        self.queue: deque[Request] = deque()
        self.prefilling: Row | None = None  # whose prompt is being taken
        self.running: list[Row] = []
        self.syncs = 0  # how often the host waited for the device to read tokens
        self._current: Round | None = None
        self._ahead: Round | None = None  # built on top of the current round, for the same rows
        self._state: DecodeState | None = None
        self._settings: Settings | None = None
        self._spent_s = 0.0  # on the current round so far, between steps not counted
        self._ended: list[Event] = []  # of requests that ended outside a step

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return any((self.queue, self.prefilling is not None, self.running, self._ended))

    @property
    def occupancy(self) -> Occupancy:
        """What is held now. From another thread, what was held a moment ago."""
        seating, config = self.seating, self.models.target.config
        rows = len(self.running) + (self.prefilling is not None)
        dtype = self.models.target.dtype
        of_position = position_bytes(config, dtype)
        of_row = window_bytes(config, dtype, ring_size(config))
        return Occupancy(
            running=rows,
            waiting=len(self.queue),
            positions=seating.positions,
            positions_used=seating.positions_used,
            bytes=self.cache.nbytes,
            bytes_used=seating.positions_used * of_position + rows * of_row,
        )

    def submit(self, request: Request) -> Request:
        """Put a request into the queue. Returns it: it is its own handle.

        Raises: ValueError with the numbers if it can never fit into the memory budget.
        """
        self.seating.check(request)
        request.submitted(time.perf_counter())
        self.queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request. Its memory is free before the next round."""
        if request.finish_reason is None:
            request.end("cancelled")
            if request in self.queue:
                self.queue.remove(request)
                self._ended.append(Event(request, [], [], request.finish_reason))

    def step(self) -> list[Event]:
        """Run until the next tokens are there, or a chunk of prompts is done. Returns them."""
        began = time.perf_counter()
        events, self._ended = self._ended, []
        if self._current is not None:
            events += self._finish_round(began)
        events += self._leave()
        began = time.perf_counter()
        if self.prefilling is not None or self.queue:
            events += self._prefill()
            events += self._leave()
            began = time.perf_counter()
        self._launch()
        self._spent_s = time.perf_counter() - began
        return events

    def run(self) -> list[Event]:
        """Step until nothing is left to do. Returns all events."""
        events = []
        while self.busy:
            events += self.step()
        return events

    def save_prompt(self, tokens: list[int]) -> PromptCache | None:
        """Copy what is there of a prompt, up to its last whole chunk; None if nothing is."""
        return self.seating.copy_prompt(tokens, self.running)

    def load_prompt(self, saved: PromptCache) -> None:
        """Take in a saved prompt, for prompts that begin with it. Call between steps."""
        self.seating.keep_prompt(saved)

    def _finish_round(self, began: float) -> list[Event]:
        """Read the round in flight and hand out its tokens."""
        current, rows, settings = self._current, self.running, self._settings
        assert current is not None and settings is not None
        self._current, self._state = None, current.state
        length = current.block.shape[1]
        self.cache.commit(current.blocks, current.rows)
        others = self.prefilling is not None or (self.queue and self.seating.free_slots)
        if not others and not self._host_decides(2 * MAX_BLOCK):
            self._ahead = self._build(length)
        report = self._read(current.report)
        seconds = self._spent_s + time.perf_counter() - began
        outcomes = unpack(report, length, settings.top_logprobs)
        self._observe(length - 1, seconds, outcomes)
        return self._emit(rows, outcomes, length - 1)

    def _read(self, report: mx.array) -> np.ndarray:
        """Wait for the device and bring an array to the host: the one host sync of a round."""
        self.syncs += 1
        return np.array(report)

    def _observe(self, k: int, seconds: float, outcomes: Sequence[Outcome]) -> None:
        if self.models.drafter is None:
            return
        limits = [row.request.params.num_draft_tokens for row in self.running]
        self.depth.observe(
            len(outcomes),
            k,
            seconds,
            [outcome.accepted for outcome in outcomes],
            [k if limit is None else min(k, limit) for limit in limits],
        )

    def _emit(self, rows: Sequence[Row], outcomes: Sequence[Outcome], k: int) -> list[Event]:
        """Hand out tokens. k: drafts of the round, -1 for the tokens after prompts."""
        now = time.perf_counter()
        events = []
        for row, outcome in zip(rows, outcomes, strict=True):
            request = row.request
            if request.finish_reason is not None:  # cancelled, or failed on the host
                continue
            try:
                tokens = request.extend(outcome.tokens, outcome.logprobs)
            except Exception as error:  # whatever a request's own text or rules raise is its own
                request.end("error", error)
                continue
            request.stats.peak_memory_bytes = mx.get_peak_memory()
            request.emitted(now)
            if k >= 0:
                limit = request.params.num_draft_tokens
                drafted = k if limit is None else min(k, limit)
                request.record_round(drafted, min(outcome.accepted, len(tokens)))
            added = request.logprobs[-len(tokens) :] if request.logprobs else []
            events.append(Event(request, tokens, added, request.finish_reason))
        return events

    def _leave(self) -> list[Event]:
        """Let rows go whose request has ended. Returns the last events of those cut short."""
        rows = self.running if self.prefilling is None else [*self.running, self.prefilling]
        gone = [row for row in rows if row.request.finish_reason]
        alive = [i for i, row in enumerate(self.running) if row not in gone]
        if len(alive) < len(self.running):
            self._ahead = self._settings = None
            assert self._state is not None
            self._state = self._state.keep(alive) if alive else None
            self.running = [self.running[i] for i in alive]
        if self.prefilling in gone:
            self.prefilling = None
        for row in gone:
            self.seating.leave(row)
        requests = [row.request for row in gone]
        return [Event(r, [], [], r.finish_reason) for r in requests if r.finish_reason in CUT_SHORT]

    def _prefill(self) -> list[Event]:
        """Run one chunk's worth of prompts, in order. Rows whose prompt is complete join."""
        room = self.chunk
        hidden: list[mx.array] = []
        joining: list[Row] = []
        while (row := self.prefilling or self._seat_next(joining)) is not None:
            prompt, start = row.request.prompt, row.position
            end = min((start // self.chunk + 1) * self.chunk, len(prompt))
            if end - start > room:
                break
            room -= end - start
            self._ahead = None  # it would hold the cache while the prompt is written
            try:
                last = self._prefill_chunk(row, prompt[start:end])
            except RuntimeError as error:  # memory, most of all
                row.request.end("error", error)
                break
            if last is not None:
                hidden.append(last)
                joining.append(row)
                self.prefilling = None
        return self._join(joining, mx.concatenate(hidden)) if joining else []

    def _seat_next(self, joining: Sequence[Row]) -> Row | None:
        """Seat the first request of the queue, so that its prompt is next; None if it waits."""
        if not self.queue:
            return None
        row = self.seating.seat(self.queue[0], [*self.running, *joining])
        if row is not None:
            self.queue.popleft()
            row.request.admitted(time.perf_counter())
            self.prefilling = row
        return row

    def _prefill_chunk(self, row: Row, tokens: list[int]) -> mx.array | None:
        """Run a chunk and commit it. Returns the last position's hidden state [1, E] at the end."""
        start, last = row.position, row.position + len(tokens) == len(row.request.prompt)
        hidden, blocks = self._run_chunk(row, tokens, last)
        mx.eval(hidden if last else None, list(blocks.values()))
        self.cache.commit_prompt(blocks, row.seat, start)
        row.position += len(tokens)
        self.seating.note(row)
        return hidden

    def _run_chunk(
        self, row: Row, tokens: list[int], last: bool
    ) -> tuple[mx.array | None, dict[int, mx.array]]:
        # The reader, which holds views of the cache, must be gone before the chunk is committed.
        reader = PromptReader(self.cache, row.seat, row.position, len(tokens))
        hidden = self.models.target.prefill(mx.array([tokens]), reader, last=last)
        return hidden, reader.blocks

    def _join(self, rows: list[Row], hidden: mx.array) -> list[Event]:
        """Draw the tokens after these rows' prompts and let the rows join the batch."""
        requests = [row.request for row in rows]
        target = self.models.target
        settings = self._settings_of(rows)
        width = context_size([request.params for request in requests])
        width = min(width, max(request.positions for request in requests))
        recent = [([-1] * width + r.prompt)[len(r.prompt) :] for r in requests]
        state = DecodeState(
            tokens=mx.zeros(len(rows), mx.int32),
            hidden=hidden,
            lengths=mx.array([row.position for row in rows]),
            recent=mx.array(recent, mx.int32).reshape(len(rows), width),
        )
        rules = host_rules(requests, np.zeros((len(rows), 0), np.int32), target.config.vocab_size)
        report, state = first_tokens(target, state, settings, rules.edit, rules.masks)
        outcomes = unpack(self._read(report), 1, settings.top_logprobs)
        self._state = state if self._state is None else self._state.join(state)
        self.running += rows
        self._settings = None
        return self._emit(rows, outcomes, -1)

    def _launch(self) -> None:
        """Start the next round on the device."""
        if not self.running:
            return
        built = self._ahead or self._build(0)
        self._ahead = None
        mx.async_eval(built.report, *built.state)
        self._current = built

    def _build(self, ahead: int) -> Round:
        """Build the next round. ahead: tokens that a round not read yet may have committed."""
        assert self._state is not None
        requests = [row.request for row in self.running]
        committed = [len(r.prompt) + len(r.tokens) - 1 for r in requests]  # all but the bonus token
        bounds = [length + ahead for length in committed]
        rows = self.cache.rows([row.seat for row in self.running], self._state.lengths, bounds)
        if self._settings is None:
            self._settings = self._settings_of(self.running)
        k = self._choose_depth()
        if self._host_decides(k + 1):
            return self._build_with_host(rows, k)
        return build_round(self.models, self.cache, rows, self._state, self._settings, k)

    def _build_with_host(self, rows: Rows, k: int) -> Round:
        """Build a round in which the host has a say: it reads the drafts while verify runs."""
        assert self._state is not None and self._settings is not None
        turn = begin(self.models, rows, self._state, self._settings, k, host_decides=True)
        block = draft_block(self.models, self.cache, turn, k)
        mx.async_eval(block)
        verified = verify_block(self.models, self.cache, turn, block)
        drafts = self._read(block)[:, 1:] if k else np.zeros((len(self.running), 0), np.int32)
        mx.async_eval(verified.logits)
        requests = [row.request for row in self.running]
        rules = host_rules(requests, drafts, self.models.target.config.vocab_size)
        return decide(self.models.target, verified, turn, rules.edit, rules.masks)

    def _choose_depth(self) -> int:
        """How many tokens to draft: as the costs say, but no more than any row could use."""
        if self.models.drafter is None:
            return 0
        requests = [row.request for row in self.running]
        useful = max(r.max_tokens - len(r.tokens) - 1 for r in requests)
        own = [r.params.num_draft_tokens for r in requests]
        most = max(MAX_DRAFTS if limit is None else limit for limit in own)
        return min(self.depth.choose(len(requests)), max(useful, 0), most)

    def _host_decides(self, length: int) -> bool:
        return any(row.request.host_decides(length) for row in self.running)

    def _settings_of(self, rows: Sequence[Row]) -> Settings:
        params = [row.request.params for row in rows]
        seeds = [row.request.seed for row in rows]
        return settings_of(params, seeds, self.models.target.config.vocab_size)
