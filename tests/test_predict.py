"""The predict command: a line of a figure says predicted, an error is one line; JSON, plots."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_mtp_mlx import hub
from gemma_mtp_mlx.chips import CHIPS
from gemma_mtp_mlx.cli import main

Capture = pytest.CaptureFixture[str]
M4 = ("--chip", "M4 Max")


def lines(capsys: Capture, *options: str) -> list[str]:
    assert main(["predict", *options]) == 0
    return capsys.readouterr().out.splitlines()


def found(capsys: Capture, *options: str) -> Any:
    assert main(["predict", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_line_of_a_figure_says_predicted(capsys: Capture) -> None:
    text = lines(capsys, *M4, "--batch", "1 8", "--prompts", "code")
    figures = [line for line in text if re.search(r"tokens/s|GB for MLX|\dx", line)]
    assert len(figures) == 2 * 2 + 2
    assert all("predicted" in line for line in figures)
    assert "26B-A4B, 4-bit, drafter 4-bit; 1024 tokens a row" in text[0]
    assert "0.92 0.85 0.86 0.85" in text[1] and "nothing is measured" in text[2]
    assert "M4 Max: 546 GB/s, 18.4 TFLOPS; with fewer GPU cores: M4 Max 32-core" in text


def test_a_mac_is_asked_for_its_chip_and_memory(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"device_name": "Apple M2 Pro", "max_recommended_working_set_size": 22_900_000_000}
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    monkeypatch.setattr("mlx.core.device_info", lambda: info)
    text = lines(capsys, "--batch", "1")
    assert "M2 Pro: 200 GB/s, 6.8 TFLOPS" in text
    assert "predicted, memory: 23 GB for MLX on this Mac; room for 1 row" in text[-1]


def test_json_has_the_same_and_what_it_rests_on(capsys: Capture) -> None:
    shown = found(capsys, *M4, "--acceptance", "0.8", "--batch", "4", "--context", "8000")
    assert shown["predicted"] is True and shown["acceptance"] == [0.8]
    assert set(shown["assumptions"]) >= {"constants", "median_error_of_held_out_speedups"}
    (chip,) = shown["chips"]
    assert chip["sources"]["bandwidth_gbps"].startswith("https://")
    assert [(p["rows"], p["kernels"]) for p in chip["predictions"]] == [(4, "ours"), (4, "mlx")]
    for of in chip["predictions"]:
        best = max(of["depths"], key=lambda depth: depth["tps"])
        assert (of["best_k"], of["best_tps"]) == (best["k"], best["tps"])
        assert of["speedup"] == pytest.approx(of["best_tps"] / of["plain_tps"])
        assert (of["break_even_acceptance"] < 0.8) == (of["best_k"] > 0)
    text = lines(capsys, *M4, "--acceptance", "0.8", "--batch", "4", "--context", "8000")
    assert any(f"plain {chip['predictions'][0]['plain_tps']:.1f} tokens/s" in line for line in text)


def test_all_chips(capsys: Capture) -> None:
    shown = found(capsys, "--chip", "all", "--batch", "1", "--model", "e2b")
    assert [chip["name"] for chip in shown["chips"]] == list(CHIPS)


def test_a_folder_is_predicted_as_it_is(capsys: Capture) -> None:
    shown = found(capsys, *M4, "--model", str(hub.builtin()), "--batch", "1")
    assert shown["model"].startswith(str(hub.builtin()))
    assert all(of["plain_tps"] > 100 for of in shown["chips"][0]["predictions"])
    alone = lines(capsys, *M4, "--model", str(hub.builtin()), "--draft-model", "none")
    assert sum("no drafter" in line for line in alone) == 6


def test_memory_is_the_chip_s_or_what_is_said(capsys: Capture) -> None:
    small = found(capsys, *M4, "--model", "31B", "--bits", "16", "--memory", "48", "--batch", "1")
    large = found(capsys, *M4, "--model", "31B", "--bits", "16", "--batch", "1")
    fits = [shown["chips"][0]["memory"]["rows"][0]["fits"] for shown in (small, large)]
    assert fits == [False, True]
    text = lines(capsys, *M4, "--model", "31B", "--bits", "16", "--memory", "48", "--batch", "1")
    says = r"  predicted, memory: 48 GB .* too little for 1 row, no context fits"
    assert re.fullmatch(says, text[-1])


def test_fewer_bits_are_predicted_to_be_faster(capsys: Capture) -> None:
    rates = []
    for bits in ("4", "5", "6", "8", "16"):
        (chip,) = found(capsys, *M4, "--bits", bits, "--batch", "1")["chips"]
        rates.append(chip["predictions"][0]["plain_tps"])
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    "options, says",
    [
        (("--chip", "M9"), "there is no chip 'M9'; there are M1, "),
        ((), "this is not a Mac; say which chip with --chip: M1, "),
        ((*M4, "--bits", "7"), "--bits is 7; it must be one of 4, 5, 6, 8, 16, mxfp4"),
        ((*M4, "--draft-bits", "x"), "--draft-bits is x; it must be one of"),
        ((*M4, "--batch", "1,0"), "--batch is '1,0'; it must be numbers of 1 to 64"),
        ((*M4, "--batch", " "), "--batch is ' '; it must be numbers"),
        ((*M4, "--context", "0"), "--context is 0; it must be 1 to"),
        ((*M4, "--acceptance", "1.5"), "--acceptance is 1.5; it must be 0 to 1"),
        ((*M4, "--acceptance", "nan"), "--acceptance is nan; it must be 0 to 1"),
        ((*M4, "--prompts", "poems"), "--prompts is poems; it must be one of code, chat"),
        ((*M4, "--prompts", "code", "--acceptance", "1"), "say the same in two ways"),
        ((*M4, "--memory", "0"), "--memory is 0.0; it must be a number of GB above 0"),
        ((*M4, "--draft-model", "x"), "--draft-model is for models of your own"),
        ((*M4, "--model", "./nowhere"), "nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(capsys: Capture, options: tuple[str, ...], says: str) -> None:
    assert main(["predict", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


def test_a_folder_has_formats_of_its_own(capsys: Capture) -> None:
    assert main(["predict", *M4, "--model", str(hub.builtin()), "--bits", "4"]) == 2
    assert "has its own formats" in capsys.readouterr().err


def test_a_drafter_alone_is_not_predicted(capsys: Capture) -> None:
    assert main(["predict", *M4, "--model", str(hub.builtin() / "drafter")]) == 2
    assert "is a drafter; predict needs its target" in capsys.readouterr().err


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    assert main(["predict", *M4, "--batch", "1", "--plot", str(file)]) == 0
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_a_plot_is_one_line(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["predict", *M4, "--plot", str(tmp_path / "plot.png")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "pip install 'mlx-gemma-mtp[plot]'" in err
