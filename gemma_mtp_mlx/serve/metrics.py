"""What a server counts, in the names that vLLM's dashboards know, for Prometheus."""

import copy
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gemma_mtp_mlx.engine import Occupancy
from gemma_mtp_mlx.request import Request, Stats
from gemma_mtp_mlx.serve.log import Entry, ending
from gemma_mtp_mlx.session import Chunk

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)


class Metrics:
    """One server's counters.

    waiting: how many answers wait; occupancy: what the engine holds.
    """

    def __init__(
        self, model: str, waiting: Callable[[], int], occupancy: Callable[[], Occupancy]
    ) -> None:
        self._registry = CollectorRegistry()
        self._model = model

        def counter(name: str, says: str) -> Counter:
            made = Counter(name, says, ["model_name"], registry=self._registry)
            return made.labels(model)

        def gauge(name: str, says: str, value: Callable[[], float]) -> None:
            made = Gauge(name, says, ["model_name"], registry=self._registry)
            made.labels(model).set_function(value)

        def histogram(name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, says, ["model_name"], registry=self._registry, buckets=buckets)
            return made.labels(model)

        self._drafts = counter("vllm:spec_decode_num_drafts", "Rounds of a row with drafts.")
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafts that were emitted."
        )
        self._per_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts that were emitted, by their place in the block.",
            ["model_name", "position"],
            registry=self._registry,
        )
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._generated = counter("vllm:generation_tokens", "Tokens generated.")
        self._ended = Counter(
            "vllm:request_success",
            "Answers by how they ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._first = histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first token.", _TTFT_S
        )
        self._between = histogram(
            "vllm:inter_token_latency_seconds",
            "Between tokens; those of one round share its time.",
            _TOKEN_S,
        )
        self._requests = Counter(
            "mlx_gemma_mtp:http_requests",
            "Requests by endpoint and status.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        gauge("vllm:num_requests_running", "Rows of the batch.", lambda: occupancy().running)
        gauge("vllm:num_requests_waiting", "Answers that wait for a row.", waiting)
        gauge(
            "vllm:kv_cache_usage_perc",
            "Part of the cache positions that running rows hold; 1 is all.",
            lambda: occupancy().positions_used / max(occupancy().positions, 1),
        )
        gauge(
            "mlx_gemma_mtp:kv_bytes_used",
            "Bytes of keys and values that running rows hold.",
            lambda: occupancy().bytes_used,
        )
        gauge("mlx_gemma_mtp:kv_bytes", "Bytes of keys and values.", lambda: occupancy().bytes)

    def prompt(self, tokens: int) -> None:
        """Count an accepted prompt."""
        self._prompt_tokens.inc(tokens)

    def request(self, endpoint: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(endpoint, str(status)).inc()

    def page(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self._registry)

    async def watch(
        self, chunks: AsyncIterable[Chunk], requests: Sequence[Request], entry: Entry
    ) -> AsyncGenerator[Chunk]:
        """Yield the chunks of a request's answers, and count what they bring."""
        last = [entry.began] * len(requests)
        seen = [copy.deepcopy(request.stats) for request in requests]
        try:
            async for chunk in chunks:
                index = chunk.index
                if chunk.tokens:
                    now = time.perf_counter()
                    first = last[index] == entry.began
                    self._count_tokens(len(chunk.tokens), now - last[index], first=first)
                    last[index] = now
                    entry.ttft_s = now - entry.began if entry.ttft_s is None else entry.ttft_s
                stats = copy.deepcopy(chunk.request.stats)
                self._count_drafts(seen[index], stats)
                seen[index] = stats
                yield chunk
        finally:
            for request in requests:
                self._ended.labels(self._model, ending(request)).inc()

    def _count_tokens(self, count: int, since_s: float, *, first: bool) -> None:
        """Count tokens that came since_s after the request, or after the tokens before them."""
        self._generated.inc(count)
        if first:
            self._first.observe(since_s)
        else:
            for _ in range(count):
                self._between.observe(since_s / count)

    def _count_drafts(self, before: Stats, now: Stats) -> None:
        """Count what a row's drafts were worth between two looks at its statistics."""
        self._drafts.inc(now.draft_blocks - before.draft_blocks)
        self._drafted.inc(now.draft_n - before.draft_n)
        self._accepted.inc(now.draft_n_accepted - before.draft_n_accepted)
        earlier = [*before.accepted_per_position, *[0] * len(now.accepted_per_position)]
        for position, count in enumerate(now.accepted_per_position):
            child = self._per_position.labels(self._model, str(position))
            child.inc(count - earlier[position])
