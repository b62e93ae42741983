"""How a contender is named, the record of a run, the clock that is the same for all.

An adapter is a class with `versions`, `ways(batch)` and `run(prompts, max_tokens, way, clock)`. It
takes token ids, decodes greedily, never stops before max_tokens, makes no text, and tells the clock
about tokens at the moment it has them on the host.
"""

import re
import time
from dataclasses import asdict, dataclass, field
from typing import Any

DEFAULT_RUNS = ("ours-k0", "ours-auto", "ours-k3", "mlx_lm", "mlx_vlm", "transformers")
DEFAULT_DRAFTS = 3
_NAME = re.compile(r"(ours|mlx_lm|mlx_vlm|transformers)(?:-(auto|k\d+))?")


@dataclass(frozen=True, slots=True)
class Contender:
    """One program at one depth. drafts: per round; 0 decodes plainly, None lets it choose."""

    name: str
    program: str
    drafts: int | None

    @classmethod
    def parse(cls, name: str) -> "Contender":
        """Read "ours-k3", "ours-auto", "mlx_lm", "mlx_vlm" (3 drafts), "mlx_vlm-k0" (plain)."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"there is no contender {name!r}; take ours, mlx_lm, mlx_vlm or transformers, "
                "and -k0 to -k15 or (ours) -auto behind it"
            )
        program, depth = match.groups()
        if program == "mlx_lm" and depth not in (None, "k0"):
            raise ValueError(f"{name}: mlx_lm cannot run this drafter; take mlx_lm")
        if depth == "auto" and program != "ours":
            raise ValueError(f"{name}: {program} does not choose its depth; take -k0 to -k15")
        if program == "mlx_lm":
            return cls(name, program, 0)
        if program == "ours" and depth in (None, "auto"):
            return cls(name, program, None)
        drafts = DEFAULT_DRAFTS if depth is None else int(depth[1:])
        if drafts > 15:
            raise ValueError(f"{name}: at most 15 drafts per round")
        return cls(name, program, drafts)


@dataclass(slots=True)
class Drafting:
    """What drafts were worth, summed over rows.

    rounds: verify passes times the rows in them; by_position: in how many of these the first,
    second, ... draft was emitted.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: list[int] = field(default_factory=list)

    def add_round(self, drafted: int, accepted: int, rows: int = 1) -> None:
        """Count one verify pass in which each of `rows` rows emitted `accepted` drafts."""
        self.rounds += rows
        self.drafted += drafted * rows
        self.accepted += accepted * rows
        self.by_position += [0] * (drafted - len(self.by_position))
        for position in range(accepted):
            self.by_position[position] += rows

    def add(self, other: "Drafting") -> None:
        """Add another's counts."""
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.by_position += [0] * (len(other.by_position) - len(self.by_position))
        for position, count in enumerate(other.by_position):
            self.by_position[position] += count


class Clock:
    """Writes down when which row got how many tokens, in seconds from its making."""

    def __init__(self, rows: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.events: list[tuple[float, int, int]] = []
        self._start = time.perf_counter()

    def emit(self, row: int, tokens: list[int]) -> None:
        """Take a row's next tokens."""
        if tokens:
            self.events.append((time.perf_counter() - self._start, row, len(tokens)))
            self.tokens[row] += tokens

    def missing(self, max_tokens: int) -> int:
        """Count the tokens that rows still lack."""
        return sum(max_tokens - len(row) for row in self.tokens)

    def record(self, drafting: Drafting | None) -> dict[str, Any]:
        """Return the run as it is sent to the parent."""
        drafted = None if drafting is None or not drafting.rounds else asdict(drafting)
        return {"tokens": self.tokens, **rates(self.events), "drafting": drafted}


def rates(events: list[tuple[float, int, int]]) -> dict[str, float]:
    """Turn (seconds, row, tokens) events into speeds over all rows.

    decode_tps: tokens per second from the moment on when every row has its first token, to the
    last; some programs take all prompts before any row goes on, others between rounds. total_tps:
    all tokens per second from the start, prefill included. first_token_s: to the first.
    """
    rows = {row for _, row, _ in events}
    seen: set[int] = set()
    complete, later = None, 0
    for at, row, count in events:
        if complete is not None:
            later += count
        seen.add(row)
        if complete is None and seen == rows:
            complete = at
    first, last = events[0][0], events[-1][0]
    assert complete is not None
    return {
        "decode_tps": later / (last - complete) if last > complete else 0.0,
        "total_tps": sum(count for _, _, count in events) / last if last else 0.0,
        "first_token_s": first,
    }
