"""Tokens per second, best depth and break-even acceptance, predicted from counts and few constants.

A step takes as long as its bytes or its operations do, whichever is more; steps follow one another,
and every launch adds a gap. What is fitted to published measurements is in CONSTANTS, the rest are
figures of the chip and counts. Everything this module returns is predicted, nothing was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gemma_mtp_mlx import workload
from gemma_mtp_mlx.chips import Chip
from gemma_mtp_mlx.outline import Outline
from gemma_mtp_mlx.workload import Runtime, Work

MOST = 15  # round.MAX_DRAFTS
NATIVE_BFLOAT = 15  # generations from which on shaders compute with bfloat16 as they are
_PRECISION = 1e-3  # to which a break-even acceptance is found


@dataclass(frozen=True, slots=True)
class Constants:
    """What published figures of a chip do not say, the same for all chips.

    bandwidth: share of it that is reached. vector, matrix: share of the arithmetic, by
    multiplications one by one and by matrix instructions or tensor units. decode, decode_fp:
    decoding an affine weight, or one of mxfp4, mxfp8 and nvfp4, in multiplications. launch_s: of
    each kernel, on top of its work; sync_s: of each wait of the host for the device.
    """

    bandwidth: float = 0.85
    vector: float = 0.28
    vector_old: float = 0.28
    decode: float = 0.4
    decode_fp: float = 2.0
    launch_s: float = 5e-6
    sync_s: float = 3e-4
    matrix: float = 0.70


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
        total += max(step.nbytes / bytes_s, vector + matrix)
    return total
