"""README's Apple results: those of the reports in bench/results, of Apple GPUs only."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import apple
from gemma_mtp_mlx.machine import Machine
from gemma_mtp_mlx.report_record import as_json
from tests.test_report_folder import made_report, made_speed

MARKED = f"before\n{apple.BEGIN}\nold\n{apple.END}\nafter\n"
README = Path(__file__).parents[1] / "README.md"


def _give(root: Path, name: str, text: str) -> None:
    folder = root / "bench" / "results" / name
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(text)


def test_reports_of_apple_gpus_make_the_table(tmp_path: Path) -> None:
    made = made_report()  # of a machine that does not exist
    plain, two, auto = made.measured[0].speeds
    speeds = (plain, made_speed(1, 15.0), two, made_speed(4, 19.0), auto)
    made = replace(made, measured=tuple(replace(each, speeds=speeds) for each in made.measured))
    cpu = replace(made, machine=replace(made.machine, gpu=None, gpu_cores=None))
    other = Machine("Linux x86_64", "AMD", 2, 25.0, "3.12.1", "NVIDIA", None)
    _give(tmp_path, "fixture-m4", as_json(made))
    _give(tmp_path, "fixture-cpu", as_json(cpu))
    _give(tmp_path, "fixture-other", as_json(replace(made, machine=other)))
    filled = apple.filled(MARKED, tmp_path)
    assert filled.startswith("before\n") and filled.endswith(f"{apple.END}\nafter\n")
    assert "old" not in filled and "Measured" in filled
    rows = [line for line in filled.splitlines() if line.startswith("| ")][2:]
    link = "[2026-11-26](bench/results/fixture-m4/README.md)"
    chip = "Apple M4 Max, 40 GPU cores, 68.7 GB"
    of = "google/gemma-4-31B-it, 4.6 bits | code"
    assert rows == [
        f"| {chip} | {of} | {n} | 10.0 | 20.0 (2) | 30.0 | 3.00 | {link} |" for n in (1, 4)
    ]
    assert apple.filled(filled, tmp_path) == filled


def test_a_report_without_a_drafter_is_told(tmp_path: Path) -> None:
    made = made_report()
    measured = [replace(each, speeds=each.speeds[:1]) for each in made.measured]
    _give(tmp_path, "fixture", as_json(replace(made, measured=tuple(measured))))
    assert "| 10.0 | - | - | - |" in apple.results(tmp_path)


def test_that_there_are_none_is_said(tmp_path: Path) -> None:
    assert apple.NONE in apple.filled(MARKED, tmp_path)
    with pytest.raises(ValueError, match="no <!-- apple results"):
        apple.filled("no markers", tmp_path)


def test_readme_has_the_results_that_were_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.apple", "--check"])
    apple.main()
    (tmp_path / "README.md").write_text(README.read_text().replace(apple.END, f"more {apple.END}"))
    monkeypatch.setattr(apple, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"run python -m bench\.apple"):
        apple.main()
    assert "more" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr("sys.argv", ["bench.apple"])
    apple.main()
    assert f"more {apple.END}" not in (tmp_path / "README.md").read_text()


def test_what_is_in_results_was_reported() -> None:
    for file in (README.parent / "bench" / "results").glob("*/report.json"):
        assert json.loads(file.read_text())["schema"] == 1
        assert (file.parent / "README.md").is_file()
