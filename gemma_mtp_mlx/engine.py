"""The engine: prompts are prefilled row by row, rounds run over the batch, rows leave when done.

Token ids in, token ids out. Each prompt is prefilled alone, in chunks that end at multiples of
CHUNK from position 0, so its keys and values do not depend on who else is in the batch. Then one
round after another: while the device runs a round, the host builds the graph of the next one; the
only wait is `read`, once per round.
"""

import time
from collections.abc import Iterator, Sequence

import mlx.core as mx

from gemma_mtp_mlx.attention import KV
from gemma_mtp_mlx.cache import Cache
from gemma_mtp_mlx.readers import PromptReader
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.round import DecodeState, Models, Round, build_round
from gemma_mtp_mlx.sampling import Sampling, batch_sampling, draw, gumbel

CHUNK = 512


class Engine:
    """A batch of requests, from prefill to the last token.

    requests: their token lists and statistics grow in place. k: tokens drafted per round.
    """

    def __init__(self, models: Models, requests: Sequence[Request], k: int) -> None:
        self.models = models
        self.requests = requests
        self.k = k if models.drafter is not None else 0
        self.syncs = 0  # how often the host waited for the device while decoding
        capacities = [len(r.prompt) + r.max_tokens for r in requests]
        self.cache = Cache(models.target.config, capacities, models.target.dtype)

    def run(self) -> Iterator[list[tuple[int, list[int]]]]:
        """Yield the new tokens of each row, (row, tokens): the first ones, then once per round."""
        members = list(range(len(self.requests)))
        state = self._prefill(members)
        began = time.perf_counter()
        emitted = self._emit(self.read(state.tokens[:, None]), members, began)
        alive = self._alive(members)
        current = None
        if alive:
            members = [members[i] for i in alive]
            current = self._launch(self._build(state.keep(alive), members, 0))
        yield emitted
        while current is not None:
            self.cache.commit(current.blocks, current.rows)
            following: Round | None = self._build(current.state, members, self.k + 1)
            report = self.read(current.report)
            new_tokens = [row[: row[-1] + 1] for row in report]
            emitted = self._emit(new_tokens, members, began)
            self._record(report, emitted)
            alive = self._alive(members)
            if len(alive) < len(members):
                members = [members[i] for i in alive]
                following = self._build(current.state.keep(alive), members, 0) if members else None
            current = self._launch(following)
            yield emitted

    def read(self, report: mx.array) -> list[list[int]]:
        """Wait for the device and return a report's rows: the one host sync of a round."""
        self.syncs += 1
        rows: list[list[int]] = report.tolist()  # type: ignore[assignment]
        return rows

    def _prefill(self, members: list[int]) -> DecodeState:
        """Run every prompt; draw each row's first token."""
        target = self.models.target
        hidden = mx.concatenate([self._prefill_row(row) for row in members])
        lengths = mx.array([len(self.requests[row].prompt) for row in members])
        sampling = self._sampling(members)
        noise = gumbel(sampling, lengths[:, None], target.config.vocab_size)
        tokens = draw(target.logits(hidden[:, None]), noise, sampling)[:, 0]
        return DecodeState(tokens, hidden, lengths)

    def _prefill_row(self, row: int) -> mx.array:
        """Run one prompt in chunks. Returns the hidden state at its last position, [1, E]."""
        request = self.requests[row]
        began = time.perf_counter()
        for start in range(0, len(request.prompt), CHUNK):
            chunk = request.prompt[start : start + CHUNK]
            last = start + len(chunk) == len(request.prompt)
            hidden, blocks = self._prefill_chunk(row, start, chunk, last)
            mx.eval(hidden if last else None, list(blocks.values()))
            self.cache.commit_prompt(blocks, row, start)
        assert hidden is not None
        request.stats.prompt_s = time.perf_counter() - began
        return hidden

    def _prefill_chunk(
        self, row: int, start: int, chunk: list[int], last: bool
    ) -> tuple[mx.array | None, dict[int, KV]]:
        # The reader, which holds views of the cache, must be gone before the chunk is committed.
        reader = PromptReader(self.cache, row, start, len(chunk))
        hidden = self.models.target.prefill(mx.array([chunk]), reader, last=last)
        return hidden, reader.blocks

    def _build(self, state: DecodeState, members: list[int], ahead: int) -> Round:
        """Build a round. ahead: how many tokens a round not yet read may have committed."""
        bounds = [self._committed(row) + ahead for row in members]
        rows = self.cache.rows(members, state.lengths, bounds)
        return build_round(self.models, self.cache, rows, state, self._sampling(members), self.k)

    def _launch(self, built: Round | None) -> Round | None:
        if built is not None:
            mx.async_eval(built.report, *built.state)
        return built

    def _committed(self, row: int) -> int:
        """Positions of the row in the cache, as far as the host knows: all but the bonus token."""
        request = self.requests[row]
        return len(request.prompt) + len(request.tokens) - 1

    def _sampling(self, members: list[int]) -> Sampling:
        requests = [self.requests[row] for row in members]
        return batch_sampling([r.params for r in requests], [r.seed for r in requests])

    def _alive(self, members: list[int]) -> list[int]:
        """Places in `members` of the rows that go on."""
        return [i for i, row in enumerate(members) if self.requests[row].finish_reason is None]

    def _emit(
        self, new_tokens: list[list[int]], members: list[int], began: float
    ) -> list[tuple[int, list[int]]]:
        elapsed = time.perf_counter() - began
        emitted = []
        for row, tokens in zip(members, new_tokens, strict=True):
            emitted.append((row, self.requests[row].extend(tokens)))
            self.requests[row].stats.generation_s = elapsed
            self.requests[row].stats.peak_memory_bytes = mx.get_peak_memory()
        return emitted

    def _record(self, report: list[list[int]], emitted: list[tuple[int, list[int]]]) -> None:
        """Count the round in each row's statistics; a draft counts if it was emitted."""
        for (*_, accepted), (row, tokens) in zip(report, emitted, strict=True):
            self.requests[row].record_round(self.k, min(accepted, len(tokens)))
