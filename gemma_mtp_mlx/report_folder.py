"""A report's folder: report.json, the page and the plots, complete or not there at all."""

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from gemma_mtp_mlx.machine import Machine
from gemma_mtp_mlx.report_page import page
from gemma_mtp_mlx.report_record import (
    ACCEPTANCE,
    FILE,
    THROUGHPUT,
    Report,
    as_json,
    deepest,
    without_paths,
)

PAGE = "README.md"


def default_name(machine: Machine, model: str, date: str) -> str:
    """Return what a report's folder is called if nobody says otherwise."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{machine.gpu or machine.processor} {model}")
    return f"mlx-gemma-mtp-report-{words.strip('-')}-{date}"


def check(out: Path) -> None:
    """Raise ValueError if a report cannot become this folder, before anything is measured."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "the plots are drawn by matplotlib, which is not installed: "
            "pip install 'mlx-gemma-mtp[plot]'"
        )
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another folder with --out")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out.parent} cannot be written to; choose another folder with --out")


def write(report: Report, out: Path, *models: Path) -> None:
    """Write a report's folder. models: folders whose paths must not be in it.

    Raises: OSError; what was begun is then gone.
    """
    from gemma_mtp_mlx import report_plots

    part = out.with_name(f".{out.name}.partial")
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    part.mkdir()
    try:
        (part / FILE).write_text(without_paths(as_json(report), *models) + "\n", "utf-8")
        (part / PAGE).write_text(without_paths(page(report), *models), "utf-8")
        note = without_paths(f"{report.target.name}\n{report.machine.line()}", *models)
        report_plots.plot_throughput(report.measured, report.predicted, part / THROUGHPUT, note)
        if deepest(report.measured):
            report_plots.plot_acceptance(report.measured, part / ACCEPTANCE, note)
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
