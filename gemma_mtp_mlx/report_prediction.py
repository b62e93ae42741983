"""What the cost model predicts for what was measured: the chip's published figures held to account.

Predictions are for the acceptance that was measured, so what differs is what rounds take.
"""

from collections.abc import Iterator, Sequence

from gemma_mtp_mlx import chips, outline
from gemma_mtp_mlx.chips import Chip
from gemma_mtp_mlx.inspection import Inspection
from gemma_mtp_mlx.machine import Machine
from gemma_mtp_mlx.measure import Measured
from gemma_mtp_mlx.prediction import Rounds
from gemma_mtp_mlx.report_record import Predicted
from gemma_mtp_mlx.workload import OURS, Runtime


def predictions(
    machine: Machine, model: Inspection, measured: Sequence[Measured]
) -> tuple[Predicted, ...]:
    """Return what is predicted of every fixed depth; nothing for a chip without figures."""
    chip = chip_of(machine)
    return () if chip is None else tuple(_predicted(chip, model, measured))


def chip_of(machine: Machine) -> Chip | None:
    """Return a machine's chip, of those that are sold with fewer GPU cores the right one."""
    return None if machine.gpu is None else chips.of_gpu(machine.gpu, machine.gpu_cores)


def _predicted(chip: Chip, model: Inspection, measured: Sequence[Measured]) -> Iterator[Predicted]:
    found = outline.of_inspection(model)
    for each in measured:
        context = sum(each.prompt_tokens) // each.rows + each.max_tokens // 2
        rounds = Rounds(found, chip, Runtime(OURS), each.rows, context)
        depths = rounds.depths(chances(each))
        for speed in each.speeds:
            if speed.depth is not None:
                yield Predicted(each.kind, each.rows, speed.depth, depths[speed.depth].tps)


def chances(measured: Measured) -> tuple[float, ...]:
    """Return how often each draft was kept once those before it were, at the deepest fixed depth.

    A single 0 if nothing was drafted.
    """
    deepest = max(measured.speeds, key=lambda speed: speed.depth or 0)
    kept = (deepest.rounds, *deepest.accepted_per_position[: deepest.depth])
    pairs = zip(kept[1:], kept, strict=False)
    return tuple(after / before if before else 0.0 for after, before in pairs) or (0.0,)
