"""The command that says whether a pair works here: doctor."""

from typing import Annotated

from gemma_mtp_mlx.options import DraftModel, Model, flag
from gemma_mtp_mlx.progress import say

WRONG = 1  # the exit code if it does not work


def doctor(
    model: Model = None,
    draft_model: DraftModel = None,
    json: Annotated[bool, flag("Print one JSON object.", "--json")] = False,
) -> int:
    """Check whether a pair works on this machine: memory, kernels, wiring, acceptance, speed.

    Ends with 1 if it does not.
    """
    from json import dumps

    from gemma_mtp_mlx import doctor as checks
    from gemma_mtp_mlx import doctor_report, hub

    folder = hub.builtin() if model is None else hub.resolve(model)
    drafter = None if draft_model == "none" else draft_model or "auto"
    if drafter not in (None, "auto"):
        drafter = str(hub.resolve(drafter))
    say(
        "Loading the built-in pair, as no --model is given"
        if model is None
        else f"Loading {folder}"
    )
    found = checks.examine(folder, drafter, say)
    if json:
        print(dumps(doctor_report.as_json(found)))
    else:
        print("\n".join(doctor_report.lines(found)))
    return 0 if found.passed else WRONG
