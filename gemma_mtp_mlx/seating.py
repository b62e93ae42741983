"""Who gets which memory: admission by budget, prefixes taken over, seats given back.

A row is seated when a ring is free and a segment of the pools that holds all it can ever commit.
Finished rows' segments stay as long as nobody needs the room.
"""

from collections.abc import Iterable

from gemma_mtp_mlx.cache import Cache, Seat, seat_size, window_bytes
from gemma_mtp_mlx.memory import Plan
from gemma_mtp_mlx.prefix import Digest, Hit, PrefixCache, Segment, digests
from gemma_mtp_mlx.prompt_cache import PromptCache
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.segments import Segments


class Row:
    """A seated request: its memory, and how much of its prompt is there."""

    def __init__(self, request: Request, segment: Segment, slot: int, chain: list[Digest]) -> None:
        self.request = request
        self.segment = segment
        self.seat = Seat(segment.start, segment.size, slot)
        self.chain = chain  # digests of the whole prompt
        self.position = 0  # prompt tokens in the cache


class Seating:
    """The cache of an engine and who sits where."""

    def __init__(self, cache: Cache, plan: Plan, chunk: int) -> None:
        self.cache = cache
        self.chunk = chunk
        self.prefixes = PrefixCache(chunk, plan.window_bytes)
        self._slots = list(range(plan.slots))[::-1]
        self._chain: tuple[Request | None, list[Digest]] = None, []  # of the request that waits
        self._segments = Segments(plan.positions)

    @property
    def free_slots(self) -> int:
        """Rows that could still be seated, memory allowing."""
        return len(self._slots)

    @property
    def positions(self) -> int:
        """Positions of the pools."""
        return self._segments.size

    @property
    def positions_used(self) -> int:
        """Positions that seated rows hold."""
        kept = sum(segment.size for segment in self.prefixes.segments)
        return max(self._segments.size - self._segments.free - kept, 0)

    def check(self, request: Request) -> None:
        """Raise ValueError with the numbers if the request can never be seated."""
        needed, there = seat_size(request.positions), self._segments.size
        if needed > there:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} new ones need "
                f"{needed} cache positions and the budget has {there}; shorten the prompt, lower "
                "max_tokens or raise the budget"
            )

    def seat(self, request: Request, running: Iterable[Row]) -> Row | None:
        """Seat a request, with what earlier prompts have left for it. Returns None if it waits."""
        if not self._slots:
            return None
        size = seat_size(request.positions)
        if self._chain[0] is not request:
            keeps = self.prefixes.window_bytes > 0
            self._chain = request, digests(request.prompt, self.chunk) if keeps else []
        chain = self._chain[1]
        usable = chain[: (len(request.prompt) - 1) // self.chunk]
        hit = self.prefixes.find(usable, (row.segment for row in running))
        segment = self._take_over(hit, size) or self._take(size, hit)
        if segment is None and hit is not None:
            hit, segment = None, self._take(size, None)
        if segment is None:
            return None
        row = Row(request, segment, self._slots.pop(), chain)
        if hit is not None:
            self._restore(hit, row)
        return row

    def leave(self, row: Row) -> None:
        """Give a row's memory back, or keep what is of use of it."""
        self._slots.append(row.seat.slot)
        segment = row.segment
        kept = len(segment.chain) * self.chunk if self.prefixes.keep(segment) else 0
        self._segments.give(segment.start + kept, segment.size - kept)
        segment.size = kept

    def note(self, row: Row) -> None:
        """Take note that prefill has reached row.position; copy the windows there if of use."""
        if row.position % self.chunk or not self.prefixes.window_bytes:
            return
        row.segment.chain = chain = row.chain[: row.position // self.chunk]
        config = self.cache.config
        dtype = next(iter(self.cache.storage.values())).dtype
        entries = min(row.position, config.sliding_window + 1)
        if self.prefixes.wants(chain[-1], window_bytes(config, dtype, entries)):
            self.prefixes.add(chain[-1], self.cache.copy_window(row.seat, row.position))

    def copy_prompt(self, tokens: list[int], running: Iterable[Row]) -> PromptCache | None:
        """Copy what is there of a prompt, up to its last whole chunk; None if nothing is."""
        hit = self.prefixes.find(digests(tokens, self.chunk), (row.segment for row in running))
        if hit is None:
            return None
        full = self.cache.read_prompt(hit.segment.start, hit.position)
        return PromptCache(tokens[: hit.position], self.chunk, full, hit.window)

    def keep_prompt(self, saved: PromptCache) -> None:
        """Take in a saved prompt as if it had just finished.

        Raises: ValueError if it does not fit into the budget.
        """
        size = len(saved.tokens)
        start = self._find_room(size, None)
        if start is None:
            raise ValueError(
                f"the prompt cache holds {size} positions and the budget has "
                f"{self._segments.free} free; raise the budget"
            )
        self.cache.write_prompt(saved.full, Seat(start, size, 0))
        chain = digests(saved.tokens, self.chunk)
        self.prefixes.add(chain[-1], saved.window)
        if not self.prefixes.keep(Segment(start, size, chain)):
            self._segments.give(start, size)

    def _restore(self, hit: Hit, row: Row) -> None:
        """Put a row where the hit ends. A prefix that lies in its own segment already stays."""
        if hit.segment.start != row.segment.start:
            copied = self.cache.read_prompt(hit.segment.start, hit.position)
            self.cache.write_prompt(copied, row.seat)
        self.cache.write_window(hit.window, row.seat, hit.position)
        row.position = hit.position
        row.segment.chain = row.chain[: hit.position // self.chunk]
        row.request.stats.cached_tokens = hit.position

    def _take_over(self, hit: Hit | None, size: int) -> Segment | None:
        """Take a finished segment itself if all of it is wanted and the room behind it is free."""
        if hit is None or hit.segment not in self.prefixes.segments:
            return None
        segment = hit.segment
        if hit.position != segment.size:
            return None
        if not self._segments.extend(segment.start, segment.size, size):
            return None
        self.prefixes.segments.remove(segment)
        return Segment(segment.start, size, [])

    def _take(self, size: int, hit: Hit | None) -> Segment | None:
        start = self._find_room(size, None if hit is None else hit.segment)
        return None if start is None else Segment(start, size, [])

    def _find_room(self, size: int, spared: Segment | None) -> int | None:
        """Take room in the pools; segments kept for later prompts make room if that helps."""
        start = self._segments.take(size)
        kept = sum(segment.size for segment in self.prefixes.segments)
        if start is None and self._segments.free + kept < size:
            return None
        while start is None:
            given_up = self.prefixes.give_up(spared)
            if given_up is None:
                return None
            self._segments.give(given_up.start, given_up.size)
            start = self._segments.take(size)
        return start
