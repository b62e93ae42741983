"""What prompts have left behind for prompts that begin alike.

A prompt is cut into chunks that end at multiples of the chunk size; each such multiple has a
digest of all tokens before it. Up to a multiple a later prompt may take over what an earlier one
has computed, because both compute it in the same chunks. Full layers: the earlier row's segment,
while it runs and for as long as its room is not needed after that. Sliding layers: a copy of
the last W + 1 positions at that multiple. Only what prefill has computed is ever reused.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

Digest = bytes
Window = dict[int, mx.array]  # of Cache.copy_window


@dataclass(eq=False, slots=True)
class Segment:
    """A row's part of the pools and what of a prompt lies there, one digest per whole chunk."""

    start: int
    size: int
    chain: list[Digest]


@dataclass(frozen=True, slots=True)
class Hit:
    """What a prompt may take over: the first `position` positions of a segment, and a window."""

    position: int
    segment: Segment
    window: Window


def digests(tokens: Sequence[int], chunk: int) -> list[Digest]:
    """Return a digest of everything before each multiple of `chunk`."""
    state = hashlib.sha256()
    found = []
    for end in range(chunk, len(tokens) + 1, chunk):
        state.update(np.array(tokens[end - chunk : end], np.int64).tobytes())
        found.append(state.digest())
    return found


class PrefixCache:
    """Finished rows' segments and copied windows; the least recently used are given up first.

    window_bytes: most bytes of copied windows; 0 keeps nothing at all.
    """

    def __init__(self, chunk: int, window_bytes: int) -> None:
        self.chunk = chunk
        self.window_bytes = window_bytes
        self.used_bytes = 0
        self.segments: list[Segment] = []  # of finished rows, least recently used first
        self._windows: OrderedDict[Digest, tuple[Window, int]] = OrderedDict()  # with its bytes

    def find(self, wanted: Sequence[Digest], running: Iterable[Segment]) -> Hit | None:
        """Return the longest prefix that a segment holds and a window is there for."""
        best: Hit | None = None
        for segment in [*self.segments, *running]:
            common = _common(wanted, segment.chain)
            for count in range(common, 0, -1):
                kept = self._windows.get(wanted[count - 1])
                if kept is not None:
                    if best is None or count * self.chunk > best.position:
                        best = Hit(count * self.chunk, segment, kept[0])
                    break
        if best is not None:
            self._windows.move_to_end(wanted[best.position // self.chunk - 1])
            if best.segment in self.segments:
                self.segments.remove(best.segment)
                self.segments.append(best.segment)
        return best

    def wants(self, digest: Digest, nbytes: int) -> bool:
        """Whether a window of so many bytes is to be copied at this place."""
        if digest in self._windows:
            self._windows.move_to_end(digest)
            return False
        return nbytes <= self.window_bytes

    def add(self, digest: Digest, window: Window) -> None:
        """Keep a window; older ones make room for it."""
        nbytes = sum(kv.nbytes for kv in window.values())
        while self._windows and self.used_bytes + nbytes > self.window_bytes:
            self.used_bytes -= self._windows.popitem(last=False)[1][1]
        self._windows[digest] = window, nbytes
        self.used_bytes += nbytes

    def keep(self, segment: Segment) -> bool:
        """Keep a finished row's segment if it is of use to anybody. Returns whether it is kept."""
        chain = segment.chain
        known = any(_common(chain, other.chain) == len(chain) for other in self.segments)
        if known or not any(digest in self._windows for digest in chain):
            return False
        self.segments.append(segment)
        return True

    def give_up(self, spared: Segment | None = None) -> Segment | None:
        """Give up the least recently used segment, but not the spared one. Returns it, or None."""
        for segment in self.segments:
            if segment is not spared:
                self.segments.remove(segment)
                return segment
        return None


def _common(wanted: Sequence[Digest], chain: Sequence[Digest]) -> int:
    """Chunks that two prompts have in common: digests cover all before, so bisect would do too."""
    count = 0
    while count < min(len(wanted), len(chain)) and wanted[count] == chain[count]:
        count += 1
    return count
