"""What `predict` prints: a line a figure, each of which says so, and one object for programs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from gemma_mtp_mlx.acceptances import KINDS
from gemma_mtp_mlx.chips import CHIPS, SHARE, Chip
from gemma_mtp_mlx.footprint import Room
from gemma_mtp_mlx.outline import Outline
from gemma_mtp_mlx.prediction import CONSTANTS, HELD_OUT_ERROR, Rounds, room
from gemma_mtp_mlx.workload import MLX, OURS, Runtime

RUNTIMES = {OURS: Runtime(OURS), MLX: Runtime(MLX)}
NAMES = {OURS: "our kernels", MLX: "MLX's kernels"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be predicted.

    kind: of prompts, None for a chance that was given. memory_bytes: what MLX may use, None for a
    share of the largest memory a chip is sold with; memory_of: whose that is, in words.
    """

    outline: Outline
    chips: tuple[Chip, ...]
    rows: tuple[int, ...]
    context: int
    kind: str | None
    chances: tuple[float, ...]
    memory_bytes: int | None
    memory_of: str

    def rounds(self, chip: Chip, rows: int, kernels: str) -> Rounds:
        """Return the rounds of one line."""
        return Rounds(self.outline, chip, RUNTIMES[kernels], rows, self.context)

    def room(self, chip: Chip) -> Room:
        """Return what fits on a chip."""
        return room(self.outline, self.memory_bytes or chip.usable_bytes)


def lines(asked: Asked) -> Iterator[str]:
    """Yield what is predicted."""
    chances = " ".join(f"{chance:.2f}" for chance in asked.chances)
    what = "every draft" if asked.kind is None else f"{asked.kind} prompts, drafts in turn"
    yield f"Gemma 4 {asked.outline.name}, {asked.outline.formats}; {asked.context} tokens a row"
    yield f"Acceptance, {what}: {chances}"
    yield (
        "Everything below is predicted by a cost model, nothing is measured; against published "
        f"speed-ups that it was not fitted to, its median error is {HELD_OUT_ERROR:.0%}."
    )
    for chip in asked.chips:
        yield ""
        yield f"{chip.name}: {_figures(chip)}"
        for rows in asked.rows:
            for kernels, name in NAMES.items():
                yield f"  {_row(asked.rounds(chip, rows, kernels), asked.chances, name)}"
        yield from _memory(asked, chip)


def _figures(chip: Chip) -> str:
    tensor = "" if chip.tensor_tflops is None else f", {chip.tensor_tflops:g} on tensor units"
    estimated = " (some figures are estimates)" if chip.estimates else ""
    others = [name for name in CHIPS if name.startswith(f"{chip.name} ") and "-core" in name]
    smaller = f"; with fewer GPU cores: {others[0]}" if others else ""
    return f"{chip.bandwidth_gbps:g} GB/s, {chip.tflops:g} TFLOPS{tensor}{estimated}{smaller}"


def _row(rounds: Rounds, chances: tuple[float, ...], name: str) -> str:
    plain, best = rounds.depths(chances)[0], rounds.best(chances)
    start = f"predicted, {_rows(rounds.rows)}, {name}: plain {_tps(plain.tps)}"
    if rounds.outline.drafter is None:
        return f"{start}; no drafter"
    least = rounds.least_acceptance()
    needed = "no acceptance pays" if least is None else f"pays from an acceptance of {least:.2f}"
    if best.k == 0:
        return f"{start}, best without drafts; drafting {needed}"
    ratio = best.tps / plain.tps
    return f"{start}, {_tps(best.tps)} with K = {best.k}: {ratio:.2f}x; drafting {needed}"


def _memory(asked: Asked, chip: Chip) -> Iterator[str]:
    found = asked.room(chip)
    of = asked.memory_of
    if asked.memory_bytes is None:
        of = f"of {chip.memory_gb} GB, the most sold"
    start = f"  predicted, memory: {found.memory_bytes / 1e9:.0f} GB for MLX {of};"
    for rows in asked.rows:
        spare, longest = found.spare_bytes(rows, asked.context), found.largest_context(rows)
        verdict = "room for" if spare >= 0 else f"{-spare / 1e9:.1f} GB too little for"
        most = f"at most {longest} tokens a row" if longest else "no context fits"
        yield f"{start} {verdict} {_rows(rows)}, {most}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _tps(value: float) -> str:
    return f"{value:.1f} tokens/s"


def as_json(asked: Asked) -> dict[str, Any]:
    """Return everything that is predicted, with what it rests on."""
    return {
        "predicted": True,
        "model": asked.outline.name,
        "formats": asked.outline.formats,
        "context": asked.context,
        "prompts": asked.kind,
        "acceptance": list(asked.chances),
        "assumptions": _assumptions(asked),
        "chips": [_chip_json(asked, chip) for chip in asked.chips],
    }


def _assumptions(asked: Asked) -> dict[str, Any]:
    return {
        "constants": asdict(CONSTANTS),
        "median_error_of_held_out_speedups": HELD_OUT_ERROR,
        "acceptance_source": None if asked.kind is None else KINDS[asked.kind].source,
        "experts": "chosen uniformly and independently",
        "rows": "of the same context, each keeping its own number of drafts",
        "usable_share_of_memory": SHARE if asked.memory_bytes is None else None,
    }


def _chip_json(asked: Asked, chip: Chip) -> dict[str, Any]:
    found = asked.room(chip)
    return {
        **asdict(chip),
        "predictions": [
            _row_json(asked.rounds(chip, rows, kernels), asked.chances, kernels)
            for rows in asked.rows
            for kernels in NAMES
        ],
        "memory": {
            "memory_bytes": found.memory_bytes,
            "rows": [
                {
                    "rows": rows,
                    "needed_bytes": found.needed_bytes(rows, asked.context),
                    "fits": found.spare_bytes(rows, asked.context) >= 0,
                    "largest_context": found.largest_context(rows),
                }
                for rows in asked.rows
            ],
        },
    }


def _row_json(rounds: Rounds, chances: tuple[float, ...], kernels: str) -> dict[str, Any]:
    plain, best = rounds.depths(chances)[0], rounds.best(chances)
    drafts = rounds.outline.drafter is not None
    return {
        "rows": rounds.rows,
        "kernels": kernels,
        "plain_tps": plain.tps,
        "best_k": best.k,
        "best_tps": best.tps,
        "speedup": best.tps / plain.tps,
        "break_even_acceptance": rounds.least_acceptance() if drafts else None,
        "depths": [
            {"k": depth.k, "tps": depth.tps, "tokens_per_round": depth.tokens}
            for depth in rounds.depths(chances)
        ],
    }
