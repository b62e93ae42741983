"""The chips' data file: every figure has a source, and a name says what MLX takes the chip for."""

from __future__ import annotations

import re

import pytest

from gemma_mtp_mlx import chips
from gemma_mtp_mlx.chips import CHIPS, Chip, find
from tests import clock

FIGURES = {"bandwidth_gbps", "tflops", "tensor_tflops", "gpu_cores", "memory_gb"}
EVERY = pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))


@EVERY
def test_every_figure_has_a_source(chip: Chip) -> None:
    without = set() if chip.tensor_tflops is not None else {"tensor_tflops"}
    assert set(chip.sources) == FIGURES - without
    assert all(re.fullmatch(r"https://[^ ]+", link) for link in chip.sources.values())
    assert set(chip.estimates) <= set(chip.sources)


@EVERY
def test_a_name_says_generation_and_class(chip: Chip) -> None:
    number, kind = re.fullmatch(r"M(\d)( Pro| Max| Ultra|)( \d\d-core)?", chip.name).groups()[:2]
    assert chip.generation == 12 + int(number)
    assert chip.size == {"": "g", " Pro": "s", " Max": "s", " Ultra": "d"}[kind]
    assert (chip.tensor_tflops is not None) == (chip.generation >= 17)


def test_chips_of_a_generation_are_in_order() -> None:
    for number in range(1, 6):
        of = [chip for name, chip in CHIPS.items() if name.startswith(f"M{number}")]
        for figure in ("bandwidth_gbps", "tflops", "gpu_cores"):
            values = [getattr(chip, figure) for chip in of]
            assert values == sorted(values), (number, figure)


def test_smaller_gpus_with_another_bandwidth_have_names_of_their_own() -> None:
    pairs = {"M3 Max": (300, 400), "M4 Max": (410, 546), "M5 Max": (460, 614)}
    for name, bandwidths in pairs.items():
        cores = 30 if name == "M3 Max" else 32
        smaller, larger = find(f"{name} {cores}-core"), find(name)
        assert (smaller.bandwidth_gbps, larger.bandwidth_gbps) == bandwidths
        assert smaller.tflops == pytest.approx(larger.tflops * cores / 40)
        assert "tflops" in smaller.estimates and "tflops" not in larger.estimates


@pytest.mark.parametrize("name", ["M4 Max", "m4 max", "Apple M4 Max", "  M4  MAX "])
def test_names_are_found_however_they_are_written(name: str) -> None:
    assert find(name).name == "M4 Max"


def test_an_unknown_chip_is_one_line_with_the_list() -> None:
    with pytest.raises(ValueError, match="M4 Ultra") as error:
        find("M4 Ultra")
    assert "\n" not in str(error.value) and all(name in str(error.value) for name in CHIPS)


def test_this_chip_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: False)
    assert chips.this_chip() is None
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    monkeypatch.setattr("mlx.core.device_info", lambda: {"device_name": "Apple M2 Ultra"})
    assert chips.this_chip() is find("M2 Ultra")
    monkeypatch.setattr("mlx.core.device_info", lambda: {"device_name": "Apple M3 Max"})
    assert chips.this_chip(30) is find("M3 Max 30-core")
    assert chips.this_chip(40) is chips.this_chip() is find("M3 Max")


def test_the_clock_has_the_same_chips() -> None:
    assert clock.CHIPS["M3 Max"] == clock.Chip(400, 14.2, 0.77)
    assert clock.CHIPS["M5 Max"] == clock.Chip(614, 70, 0.70)
