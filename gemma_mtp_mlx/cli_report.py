"""The command that measures a pair on this machine for others to read: report."""

import os
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_mtp_mlx.options import DraftModel, Model, opt
from gemma_mtp_mlx.progress import Progress, say

if TYPE_CHECKING:
    from gemma_mtp_mlx.api import Pair
    from gemma_mtp_mlx.measure import Measured

KINDS = ("code", "chat")
DEPTHS = (0, 1, 2, 4, None)
ROWS, ROWS_CPU = (1, 4, 8), (1, 4)  # a CPU takes minutes for eight prompts at every depth
FAILED = 1  # the exit code if the doctor finds something wrong

Cells = list[tuple[str, int]]  # kinds of prompts, and rows


def report(
    model: Model = None,
    draft_model: DraftModel = None,
    out: Annotated[
        Path | None, opt("DIR", "The folder to write; named after chip, model and date if not.")
    ] = None,
    batch: Annotated[
        str | None, opt("N,N", "Rows at a time, 1 to 8; 1,4,8 if not, on a CPU 1,4.")
    ] = None,
    kinds: Annotated[
        str | None, opt("KIND,KIND", "Of code, prose, chat, json, repeat; code,chat if not.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=2, metavar="N", help="Tokens per row.")
    ] = 64,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each depth.")] = 3,
) -> int:
    """Measure a pair on this machine, and write a folder to attach to an issue or pull request.

    It has what doctor finds, speeds and acceptance as JSON, plots and a page, and nothing that says
    whose machine this is. Ends with 1 if doctor finds that something does not work.
    """
    rows = None if batch is None else read_rows(batch)
    from gemma_mtp_mlx import hub, inspection, load, machine, measure, prompt_kinds, report_folder
    from gemma_mtp_mlx.doctor import diagnose
    from gemma_mtp_mlx.report_prediction import predictions
    from gemma_mtp_mlx.report_record import Report, models, public_name

    folder = hub.builtin() if model is None else hub.resolve(model)
    here, today = machine.facts(), date.today().isoformat()
    target = out or Path(report_folder.default_name(here, public_name(folder), today))
    report_folder.check(target)
    drafter = None
    if draft_model != "none":
        drafter = hub.resolve(draft_model) if draft_model else hub.drafter_for(folder)
    pair = load(folder, None if draft_model == "none" else drafter or "auto")
    say(f"Loaded {public_name(folder)}", *pair.notes)
    found = inspection.inspect(str(folder), "none" if drafter is None else str(drafter))
    usable = prompt_kinds.usable(pair.prompts)
    chosen = kinds.split(",") if kinds else [kind for kind in KINDS if kind in usable]
    rows = rows or (ROWS if here.gpu else ROWS_CPU)
    cells = [(kind, n) for kind in chosen for n in rows]
    for kind, n in cells:  # what cannot be measured is said before anything runs
        measure.prompts(pair, kind, n, max_tokens)
    before = os.getloadavg()[0]
    diagnosis = diagnose(pair, say)
    say(diagnosis.verdict)
    measured = measure_all(pair, cells, max_tokens, repeats)
    command = ["mlx-gemma-mtp", "report"]
    command += [] if model is None else ["--model", public_name(folder)]
    if draft_model is not None:
        command += ["--draft-model", "none" if drafter is None else public_name(drafter)]
    command += ["--batch", ",".join(map(str, rows)), "--kinds", ",".join(chosen)]
    command += ["--max-tokens", str(max_tokens), "--repeats", str(repeats)]
    made = Report(
        today,
        shlex.join(command),
        here,
        machine.versions(),
        *models(found, folder, drafter),
        diagnosis,
        measured,
        predictions(here, found, measured),
        (before, os.getloadavg()[0]),
    )
    report_folder.write(made, target, folder, *([] if drafter is None else [drafter]))
    print(target)
    return 0 if diagnosis.passed else FAILED


def read_rows(text: str) -> tuple[int, ...]:
    """Return the rows that --batch names."""
    found = text.replace(",", " ").split()
    if not found or not all(number.isdecimal() and 1 <= int(number) <= 8 for number in found):
        raise ValueError(f"--batch is {text}; it must be numbers from 1 to 8, as in 1,4,8")
    return tuple(int(number) for number in dict.fromkeys(found))


def measure_all(
    pair: "Pair", cells: Cells, max_tokens: int, repeats: int
) -> "tuple[Measured, ...]":
    """Measure every kind of prompts at every number of rows, and say how long it takes."""
    from gemma_mtp_mlx import measure

    depths = DEPTHS if pair.drafter is not None else (0,)
    warm_up = min(measure.WARM_UP, max_tokens)
    each = len(depths) * (warm_up + repeats * max_tokens)
    total = each * sum(rows for _, rows in cells)
    names = ", ".join(measure.depth_name(depth) for depth in depths)
    say(f"Measuring {len(cells)} batches at each of {names}: {total} tokens")
    progress = Progress(sys.stderr, " tokens")
    measured: list[Measured] = []
    try:
        for kind, rows in cells:
            before = each * sum(done.rows for done in measured)

            def show(done: int, _: int, before: int = before) -> None:
                progress.show(before + done, total)

            measured.append(
                measure.measure(
                    pair,
                    kind,
                    rows,
                    depths,
                    max_tokens=max_tokens,
                    repeats=repeats,
                    progress=show,
                )
            )
    finally:
        progress.close()
    return tuple(measured)
