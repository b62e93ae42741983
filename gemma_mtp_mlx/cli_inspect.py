"""The commands that look at a model without generating: inspect, and verify."""

import math
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_mtp_mlx.options import MEMORY, flag, opt
from gemma_mtp_mlx.progress import Progress

if TYPE_CHECKING:
    from gemma_mtp_mlx.verification import Checked, Comparison

WRONG = 1  # the exit code if something is


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, or a repository on the hub.")
    ],
    draft_model: Annotated[
        str, opt("auto|none|DIR_OR_REPO", "The drafter; auto: the model's own.")
    ] = "auto",
    memory: Annotated[
        float | None,
        opt("GB", f"{MEMORY} If not given: this device's."),
    ] = None,
    json: Annotated[bool, flag("Print one JSON object, sizes in bytes.", "--json")] = False,
) -> None:
    """Say what a model is, what it reads and whether it fits, without reading its weights.

    Of a repository that is not downloaded only config.json and the headers are fetched.
    """
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--memory is {memory}; it must be a number of GB above 0")
    from json import dumps

    from gemma_mtp_mlx import inspect_report, inspection

    given = None if memory is None else int(memory * 1e9)
    found = inspection.inspect(model, draft_model, given)
    if json:
        print(dumps(inspect_report.as_json(found)))
    else:
        print("\n".join(inspect_report.lines(found)))


def verify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, or a repository in the hub's cache.")
    ],
    source: Annotated[
        str | None, opt("DIR_OR_REPO", "What it was made from, to compare logits with.")
    ] = None,
) -> int:
    """Check a model's files against conversion.json or the hub, and its logits with --source.

    Ends with 1 if something is wrong. Nothing is downloaded but a source that is not there.
    """
    from gemma_mtp_mlx import hub, verification

    folder = verification.locate(model)
    progress = Progress(sys.stderr)
    try:
        checked = verification.check_files(folder, progress.show)
    finally:
        progress.close()
    if checked is None and source is None:
        raise ValueError(
            f"{folder} has no conversion.json and is not in the hub's cache: nothing says what "
            "its files should be; compare it with what it was made from: --source"
        )
    if _print_files(checked):
        return WRONG
    if source is None:
        return 0
    compared = verification.compare(folder, hub.resolve(source))
    return WRONG if _print_comparison(compared, source) else 0


def _print_files(checked: "Checked | None") -> bool:
    """Print what checking the files found, a line for each problem; whether there was one."""
    if checked is None:
        print("Files: not checked, there is no conversion.json")
        return False
    for problem in checked.problems:
        print(problem)
    count = len(checked.problems)
    verdict = f"{count} problem{'s' * (count != 1)}" if count else "all as they should be"
    print(f"Files: {checked.files} compared, {checked.nbytes / 1e6:.1f} MB; {verdict}")
    return count > 0


def _print_comparison(compared: "Comparison", source: str) -> bool:
    """Print how far logits are from the source's; whether that is wrong."""
    print(
        f"Logits of {compared.positions} positions against {source}: largest difference "
        f"{compared.relative:.2%} of the largest logit, KL divergence {compared.divergence:.4f} "
        f"nats on average, the same best token in {compared.agreement:.0%}"
    )
    if compared.problem is not None:
        print(compared.problem)
        return True
    if compared.warning is not None:
        print(compared.warning)
    else:
        print(f"Logits: {'as they should be' if compared.exact else 'reported, not judged'}")
    return False
