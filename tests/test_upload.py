"""Uploading: refused before anything is converted, and what went wrong says how to go on."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from gemma_mtp_mlx.cli import main
from tests.checkpoints import write_pair

Capture = pytest.CaptureFixture[str]
Calls = list[tuple[str, dict[str, Any]]]


def response(status: int) -> Any:
    client = import_module(HTTPError.__module__.partition(".")[0])
    return client.Response(status, request=client.Request("GET", "https://huggingface.co/api"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record what the hub is asked for, in a world where somebody is logged in."""
    made: Calls = []

    def answer(name: str) -> Any:
        def method(self: HfApi, *args: Any, **named: Any) -> None:
            made.append((name, {**named, "args": args}))

        return method

    for name in ("whoami", "create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, answer(name))
    return made


def fail(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def method(self: HfApi, *args: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, name, method)


def convert(tmp_path: Path, repository: str) -> int:
    source, drafter = write_pair(tmp_path / "in", "31b")
    argv = ["convert", "--hf-path", str(source), "--draft-hf-path", str(drafter)]
    return main([*argv, "--mlx-path", str(tmp_path / "out"), "-q", "--upload-repo", repository])


def test_the_whole_folder_is_uploaded_with_its_card(
    tmp_path: Path, calls: Calls, capsys: Capture
) -> None:
    assert convert(tmp_path, "me/gemma") == 0
    assert [name for name, _ in calls] == ["whoami", "create_repo", "upload_folder"]
    assert calls[1][1]["args"] == ("me/gemma",)
    uploaded = calls[2][1]
    assert uploaded["repo_id"] == "me/gemma" and uploaded["folder_path"] == tmp_path / "out"
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "library_name: mlx",
        "# me/gemma for MLX",
        "target and its drafter assistant",
        "mlx-gemma-mtp generate --model me/gemma --prompt",
        "| target | affine, 4 bits, groups of 64 |",
        "| drafter | affine, 4 bits, groups of 64 |",
    ):
        assert words in card, words
    assert "base_model" not in card  # folders on disk are nobody else's business
    assert capsys.readouterr().out.endswith("/me/gemma\n")


@pytest.mark.parametrize(
    "error, words",
    [
        (LocalTokenNotFoundError("no token"), ["nobody is logged in", "hf auth login"]),
        (HfHubHTTPError("no", response=response(401)), ["answers 401", "hf auth login"]),
        (HTTPError("no route"), ["no route", "network"]),
    ],
)
def test_who_may_not_upload_is_told_before_anything_is_converted(
    tmp_path: Path,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    error: Exception,
    words: list[str],
) -> None:
    fail(monkeypatch, "whoami", error)
    assert convert(tmp_path, "me/gemma") == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_repository(tmp_path: Path, calls: Calls, capsys: Capture) -> None:
    assert convert(tmp_path, "gemma") == 2
    assert "give it as owner/name" in capsys.readouterr().err
    assert calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [HfHubHTTPError("no", response=response(403)), OSError("broken pipe")]
)
def test_an_upload_that_fails_leaves_the_folder_and_says_how_to_go_on(
    tmp_path: Path,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    error: Exception,
) -> None:
    fail(monkeypatch, "upload_folder", error)
    assert convert(tmp_path, "me/gemma") == 2
    assert f"hf upload me/gemma {tmp_path / 'out'}" in capsys.readouterr().err
    assert (tmp_path / "out" / "drafter" / "config.json").is_file()
