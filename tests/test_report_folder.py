"""The report: a folder that is complete or not there, says what was measured, and not by whom."""

import io
import json
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_mtp_mlx import api, doctor, inspection, machine, progress, report_folder, report_plots
from gemma_mtp_mlx import report_prediction as prediction
from gemma_mtp_mlx.api import Pair
from gemma_mtp_mlx.checks import Check
from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.doctor import Diagnosis
from gemma_mtp_mlx.measure import Measured, Speed, Spread
from gemma_mtp_mlx.report_page import page
from gemma_mtp_mlx.report_record import Model, Report, public_name, without_paths
from tests.conftest import heed_ctrl_c
from tests.text_model import write_text_model

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ["--kinds", "chat", "--batch", "1,2", "--max-tokens", "4", "--repeats", "1"]
HEALTHY = Diagnosis((Check("speed", "pass", "as it should be", ("K/V | of layer 3",)),))
ILL = Diagnosis((Check("wiring", "fail", "it reads layer 7", remedy="use /Users/ada/another"),))
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("somebody"))


def _report(model: Path, *options: str) -> int:
    return main(["report", "--model", str(model), *SMALL, *options])


@pytest.fixture(scope="module", autouse=True)
def diagnosed() -> Iterator[list[Pair]]:
    """Take the doctor's place, who has tests of his own. Returns whom he has seen."""
    seen: list[Pair] = []

    def diagnose(pair: Pair, say: doctor.Say) -> Diagnosis:
        seen.append(pair)
        return HEALTHY if pair.drafter is not None else ILL

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "diagnose", diagnose)
        yield seen


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "made"
    assert _report(model, "--out", str(out)) == 0
    return out


def made_speed(depth: int | None, tps: float, **more) -> Speed:
    counts = (0, 0, 0, ()) if depth == 0 else (10, 20, 10, (8, 2))
    spread = Spread(tps, tps - 1, tps + 2)
    ratio = Spread(tps / 10, tps / 10, tps / 10)
    drawn = (20 if depth == 0 else 10, *counts[1:])
    return replace(Speed(depth, spread, ratio, spread, *drawn, 2.0, 10**9, None), **more)


def made_report(**more) -> Report:
    here = machine.Machine("macOS 26.1 arm64", "Apple M4 Max", 16, 68.7, "3.12.1", None, None)
    here = replace(here, gpu="Apple M4 Max", gpu_cores=40)
    formats = {"mlp": "affine 4 bits"}
    target = Model("google/gemma-4-31B-it", "31B", 4.6, 18 * 10**9, formats, "abc", {})
    speeds = (made_speed(0, 10.0), made_speed(2, 20.0), made_speed(None, 30.0))
    measured = tuple(Measured("code", rows, (5,) * rows, 20, 3, speeds) for rows in (1, 4))
    versions = {"mlx-gemma-mtp": "0.1.0", "mlx": "0.32.4", "mlx-lm": "0.32.2"}
    of = (here, versions, target, target, HEALTHY, measured, (), (1.0, 2.0))
    return replace(Report("2026-11-26", "mlx-gemma-mtp report", *of), **more)


def test_a_report_is_a_whole_folder(written: Path) -> None:
    names = sorted(file.name for file in written.iterdir())
    assert names == ["README.md", "acceptance.png", "report.json", "throughput.png"]
    assert [path.name for path in written.parent.iterdir()] == ["made"]
    found = json.loads((written / "report.json").read_text())
    assert found["schema"] == 1 and found["apple_gpu"] is False
    assert [each["rows"] for each in found["measured"]] == [1, 2]
    for each in found["measured"]:
        assert [speed["depth"] for speed in each["speeds"]] == [0, 1, 2, 4, None]
        assert all(speed["first_difference"] is None for speed in each["speeds"])
        assert each["speeds"][0]["rounds"] == each["rows"] * 3
    assert found["target"]["name"] == "target" and found["target"]["weights_bytes"] > 0
    assert found["drafter"]["name"] == "drafter"
    assert found["machine"]["memory_gb"] > 0 and found["versions"]["mlx"]
    for plot in ("throughput.png", "acceptance.png"):
        assert (written / plot).read_bytes().startswith(PNG)


def test_a_report_says_what_it_is_and_not_whose(written: Path, model: Path) -> None:
    text = (written / "README.md").read_text()
    assert "This is not an Apple GPU" in text and "## Speed, measured" in text
    options = "--model target --batch 1,2 --kinds chat --max-tokens 4 --repeats 1"
    assert f"    mlx-gemma-mtp report {options}\n" in text
    for plot in re.findall(r"\]\((\S+)\)", text):
        assert (written / plot).is_file()
    private = [str(Path.home()), str(model.parent), str(model.parent.parent), "somebody"]
    for file in written.iterdir():
        data = file.read_bytes()
        assert not any(word.encode() in data for word in private), file.name
        if len(platform.node()) > 3:
            assert not re.search(rb"\b%b\b" % re.escape(platform.node().encode()), data)


def test_paths_become_names(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-4-e4b"
    folder.mkdir()
    said = f"{folder}/config.json, /Users/ada/x, /home/ada/y and {Path.home()}/z"
    assert without_paths(said, folder) == "gemma-4-e4b/config.json, ~/x, ~/y and ~/z"
    record = {"source": {"name": "/Users/ada/models/gemma", "revision": None}}
    (folder / "conversion.json").write_text(json.dumps(record))
    assert public_name(folder) == "gemma"
    (folder / "conversion.json").write_text(
        json.dumps({"source": {"name": "google/gemma-4-E4B-it"}})
    )
    assert public_name(folder) == "google/gemma-4-E4B-it"


def test_the_page_has_figures_spread_and_differences() -> None:
    report = made_report()
    odd = replace(report.measured[0].speeds[1], first_difference=6)
    plain, _, auto = report.measured[0].speeds
    measured = (replace(report.measured[0], speeds=(plain, odd, auto)), report.measured[1])
    text = page(replace(report, measured=measured))
    assert "not an Apple GPU" not in text
    assert "| GPU | Apple M4 Max, 40 cores |" in text
    assert "\n**It works: as it should be**\n" in text
    assert "\n    pass  speed       as it should be\n" in text and "K/V | of layer 3" in text
    rows = [line for line in text.splitlines() if line.startswith("| 2 drafts")]
    assert "| 20.0 (19.0 to 22.0) | 2.00 (2.00 to 2.00) | 2.00 | 2.00 | 50% |" in rows[0]
    assert rows[0].endswith("| NO, from token 7 on |") and rows[1].endswith("| yes |")
    assert "| code | 0.80 | 0.20 | 2.00 | 10 |" in text
    for before, after in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if before.startswith("| ") and after.startswith("| "):
            assert before.count("|") == after.count("|")


def test_what_is_predicted_is_marked_so(model: Path) -> None:
    report = made_report()
    found = inspection.inspect(str(model), str(model / "drafter"))
    predicted = prediction.predictions(report.machine, found, report.measured)
    assert [(p.kind, p.rows, p.depth) for p in predicted] == [
        *(("code", 1, depth) for depth in (0, 2)),
        *(("code", 4, depth) for depth in (0, 2)),
    ]
    assert len({p.tokens_per_s for p in predicted}) == 4
    text = page(replace(report, predicted=predicted))
    assert "**predicted** was not measured" in text
    rows = [line.split(" | ") for line in text.splitlines() if "**predicted** tokens/s" in line]
    assert [row.index("**predicted** tokens/s") for row in rows] == [2, 2]
    drafted = [line for line in text.splitlines() if line.startswith("| 2 drafts")]
    assert f"| {predicted[1].tokens_per_s:.1f} | 2.00 (" in drafted[0]
    assert "predicted" not in page(report)
    cpu = replace(report.machine, gpu=None, gpu_cores=None)
    assert prediction.predictions(cpu, found, report.measured) == ()


def test_a_prediction_is_for_the_acceptance_that_was_measured() -> None:
    measured, _ = made_report().measured
    assert prediction.chances(measured) == (0.8, 0.25)
    assert prediction.chances(replace(measured, speeds=measured.speeds[:1])) == (0.0,)


def test_chips_that_are_sold_with_fewer_cores_are_told_apart() -> None:
    here = made_report().machine
    names = [
        prediction.chip_of(replace(here, gpu=gpu, gpu_cores=cores))
        for gpu, cores in (
            ("Apple M4 Max", 40),
            ("Apple M4 Max", 32),
            ("Apple M4", 8),
            (None, None),
        )
    ]
    assert [chip and chip.name for chip in names] == ["M4 Max", "M4 Max 32-core", "M4", None]


def test_what_the_doctor_says_ends_a_report(
    model: Path,
    tmp_path: Path,
    diagnosed: list[Pair],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[Pair] = []
    load = api.load
    monkeypatch.setattr(api, "load", lambda *given: loaded.append(load(*given)) or loaded[-1])
    out = tmp_path / "plain"
    assert _report(model, "--draft-model", "none", "--out", str(out)) == 1
    assert capsys.readouterr().out == f"{out}\n"
    assert len(loaded) == 1 and diagnosed[-1] is loaded[0]
    found = json.loads((out / "report.json").read_text())["doctor"]
    assert found["passed"] is False and found["checks"][0]["remedy"] == "use ~/another"
    verdict = "It does not work: it reads layer 7; use ~/another"
    assert found["verdict"] == verdict and f"**{verdict}**" in (out / "README.md").read_text()


def test_a_pair_without_a_drafter_has_no_acceptance(model: Path, tmp_path: Path) -> None:
    assert _report(model, "--draft-model", "none", "--out", str(tmp_path / "plain")) == 1
    found = json.loads((tmp_path / "plain" / "report.json").read_text())
    assert found["drafter"] is None and "--draft-model none" in found["command"]
    assert [speed["depth"] for each in found["measured"] for speed in each["speeds"]] == [0, 0]
    assert not (tmp_path / "plain" / "acceptance.png").exists()
    assert "kept by position" not in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize(
    "options, says",
    [
        (["--batch", "1,9"], "--batch is 1,9; it must be numbers from 1 to 8"),
        (["--batch", "two"], "--batch is two"),
        (["--kinds", "chat,poems"], "no prompts 'poems'"),
        (["--max-tokens", "1"], "max-tokens"),
        (["--max-tokens", "100000"], "context is"),
        (["--repeats", "0"], "repeats"),
        (["--out", "nowhere/report"], "no folder nowhere"),
    ],
)
def test_what_cannot_be_reported_is_said_at_once(
    options: list[str],
    says: str,
    model: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _report(model, *options) == 2
    err = capsys.readouterr().err
    assert says in err.splitlines()[-1] and "Measuring" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert _report(model, "--out", str(tmp_path)) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path} exists; remove it or choose another" in err and "Loaded" not in err
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_asked_for_before_anything_runs(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_folder, "find_spec", lambda name: None)
    assert _report(model, "--out", str(tmp_path / "made")) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "pip install 'mlx-gemma-mtp[plot]'" in err[0]


def test_what_fails_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_plots, "plot_acceptance", full)
    with pytest.raises(OSError, match="No space"):
        report_folder.write(made_report(), tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_one_that_was_killed_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".made.partial").mkdir()
    (tmp_path / ".made.partial" / "old.png").touch()
    report_folder.write(made_report(), tmp_path / "made")
    assert len(list((tmp_path / "made").iterdir())) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_ctrl_c_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemma_mtp_mlx", "report", "--model", str(model), *SMALL]
    with subprocess.Popen(
        [*command, "--repeats", "10000", "--draft-model", "none"],  # which the doctor leaves alone
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    ) as run:
        try:
            assert run.stderr is not None
            lines = iter(run.stderr.readline, "")
            assert any(line.startswith("Measuring") for line in lines)
            time.sleep(0.5)
            run.send_signal(signal.SIGINT)
            rest = run.stderr.read()
            assert run.wait(timeout=60) == 130
        finally:
            run.kill()
    assert rest.endswith("interrupted\n") and "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_named_after_chip_model_and_date() -> None:
    here = made_report().machine
    named = report_folder.default_name(here, "google/gemma-4-31B-it", "2026-11-26")
    assert named == "mlx-gemma-mtp-report-Apple-M4-Max-google-gemma-4-31B-it-2026-11-26"


def test_how_long_it_still_takes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    shown = [progress.Progress(out, unit) for unit in (" tokens", "B")]
    for seconds, done in ((1.0, 1), (120.0, 50), (121.0, 51)):
        now[0] = 100.0 + seconds
        shown[0].show(done, 200)
        shown[1].show(done * 10**9, 200 * 10**9)
    assert out.getvalue().splitlines() == [
        "50 of 200 tokens, 25%, about 6 min left",
        "50.0 of 200.0 GB, 25%, about 6 min left",
    ]
