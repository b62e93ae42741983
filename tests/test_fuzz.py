"""A few thousand damaged inputs; `python -m tests.fuzz_readers` reads as many as one likes."""

from pathlib import Path
from typing import Any

import pytest

from gemma_mtp_mlx import checkpoint
from gemma_mtp_mlx.fields import Fields
from tests import fuzz_readers


def test_no_damaged_input_does_harm() -> None:
    figures = fuzz_readers.run(2000, seed=1)
    assert figures.count("refused") > 1000
    accepted = {kind for kind, outcome in figures.kinds if outcome == "accepted"}
    assert len(accepted) == 6  # of every kind, so that mutations do not all fail at once


def test_a_check_that_is_missing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_is_index", lambda weight_map: True)
    with pytest.raises(AssertionError, match=r"input -?\d+: |open /"):
        fuzz_readers.run(500, seed=1)


def test_numbers_that_are_not_checked_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(fields: Fields, name: str, default: int | None = None) -> Any:
        return fields.values.get(name, default)

    monkeypatch.setattr(Fields, "whole", whole)
    with pytest.raises(AssertionError, match=r"input -?\d+: "):
        fuzz_readers.run(500, seed=1)


def test_what_is_opened_outside_is_heard(tmp_path: Path) -> None:
    watch = fuzz_readers.Watch()
    (tmp_path / "in").mkdir()
    with watch.around(tmp_path / "in"):
        (tmp_path / "in" / "file").write_text("x")
        (tmp_path / "out").write_text("x")
        (tmp_path / "out").unlink()
    assert len(watch.outside) == 2
