"""Tokens per second, best depth and break-even acceptance, predicted from counts and few constants.

A step takes as long as its bytes or its operations do, whichever is more; steps follow one another,
and every launch adds a gap. What is fitted to published measurements is in Constants, the rest are
figures of the chip and counts. Everything this module returns is predicted, nothing was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gemma_mtp_mlx import footprint
from gemma_mtp_mlx.acceptances import tokens_per_round
from gemma_mtp_mlx.chips import Chip
from gemma_mtp_mlx.footprint import Room
from gemma_mtp_mlx.outline import Outline
from gemma_mtp_mlx.workload import Runtime, Work, drafting_round

MOST = 15  # round.MAX_DRAFTS
# Median absolute error of the speed-ups that were held out when the constants were fitted, and of
# those they were fitted to (bench/results/calibration.md, which a test compares).
HELD_OUT_ERROR, FITTED_ERROR = 0.114, 0.120
NATIVE_BFLOAT = 15  # generations from which on shaders compute with bfloat16 as they are
_PRECISION = 1e-3  # to which a break-even acceptance is found


@dataclass(frozen=True, slots=True)
class Constants:
    """What published figures of a chip do not say, the same for all chips.

    Fitted by `python -m bench.calibrate` to the half of bench/published.json that it names. vector:
    share of the arithmetic that multiplications one by one reach, and vector_old on M1 and M2,
    which have no bfloat16 of their own. decode, decode_fp: decoding an affine weight, or one of
    mxfp4, mxfp8 and nvfp4, in multiplications. launch_s: of each kernel, on top of its work.

    Assumed: bandwidth and matrix, shares that memory and matrix instructions or tensor units reach;
    own_matrix: the same for few positions, as a kernel like ours was measured by others on an M4
    Pro (mlx-dspark 0.20's README), as much less on M1 and M2 as vector_old is less than vector;
    sync_s: of each wait of the host for the device.
    """

    vector: float = 0.28
    vector_old: float = 0.0953
    decode: float = 0.402
    decode_fp: float = 1.88
    launch_s: float = 3.95e-06
    bandwidth: float = 0.85
    matrix: float = 0.70
    own_matrix: float = 0.55
    sync_s: float = 3e-4


CONSTANTS = Constants()


def seconds(work: Work, chip: Chip, constants: Constants = CONSTANTS) -> float:
    """Return how long it takes."""
    total = work.launches * constants.launch_s + work.syncs * constants.sync_s
    bytes_s = chip.bandwidth_gbps * 1e9 * constants.bandwidth
    flops = chip.tflops * 1e12
    share = constants.vector if chip.generation >= NATIVE_BFLOAT else constants.vector_old
    for step in work.steps:
        decoding = constants.decode * step.decode + constants.decode_fp * step.decode_fp
        vector = (step.vector + decoding) / (flops * share)
        matrix = step.matrix / (flops * constants.matrix)
        matrix += step.own / (flops * constants.own_matrix * share / constants.vector)
        total += max(step.nbytes / bytes_s, vector + matrix)
    return total


@dataclass(frozen=True, slots=True)
class Depth:
    """Rounds of k drafts. tokens: of a row and round; tps: tokens per second of all rows."""

    k: int
    tokens: float
    seconds: float
    rows: int

    @property
    def tps(self) -> float:
        """Tokens per second of all rows together."""
        return self.rows * self.tokens / self.seconds


class Rounds:
    """What rounds of so many rows take on a chip, by depth; and what follows for an acceptance."""

    def __init__(
        self, outline: Outline, chip: Chip, runtime: Runtime, rows: int, context: int
    ) -> None:
        self.outline, self.chip, self.runtime = outline, chip, runtime
        self.rows, self.context = rows, context

    @cached_property
    def seconds(self) -> tuple[float, ...]:
        """Of a round of 0, 1, ... drafts; of plain decoding alone without a drafter."""
        most = 0 if self.outline.drafter is None else MOST
        return tuple(self._seconds(k) for k in range(most + 1))

    def depths(self, chances: Sequence[float]) -> tuple[Depth, ...]:
        """Return every depth. chances: of each draft, given that all before it agreed."""
        return tuple(
            Depth(k, tokens_per_round(chances, k), took, self.rows)
            for k, took in enumerate(self.seconds)
        )

    def best(self, chances: Sequence[float]) -> Depth:
        """Return the depth of most tokens per second; 0, which is plain decoding, included."""
        return max(self.depths(chances), key=lambda depth: depth.tps)

    def speedup(self, chances: Sequence[float]) -> float:
        """Return the best depth's ratio to plain decoding of the same rows."""
        return self.best(chances).tps / self.depths(chances)[0].tps

    def least_acceptance(self, ratio: float = 1.0) -> float | None:
        """Return the least chance of each draft at which some K >= 1 beats plain decoding.

        ratio: how much faster it has to be. None if even certain drafts are not enough.
        """
        low, high = 0.0, 1.0
        if self._drafting(high) < ratio:
            return None
        while high - low > _PRECISION:
            middle = (low + high) / 2
            low, high = (low, middle) if self._drafting(middle) >= ratio else (middle, high)
        return high

    def _drafting(self, chance: float) -> float:
        """Return the best ratio to plain decoding of drafting at all."""
        plain, *drafting = self.depths((chance,))
        return max((depth.tps for depth in drafting), default=0.0) / plain.tps

    def _seconds(self, k: int) -> float:
        work = drafting_round(
            self.outline, self.chip, self.runtime, self.rows, k, self.context, 1.0
        )
        return seconds(work, self.chip)


def room(outline: Outline, memory_bytes: int) -> Room:
    """Return what fits, if MLX may use so much memory."""
    drafter = 0 if outline.drafter is None else outline.drafter.weights_bytes
    weights = outline.target.weights_bytes
    return footprint.room(outline.config, outline.dtype, memory_bytes, weights, drafter)
