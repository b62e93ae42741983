"""Finding a model: what is there is found, and what is not is explained with a remedy."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from gemma_mtp_mlx import hub


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, list[str]]]:
    """Answer downloads with a model folder and return what was asked for."""
    asked: list[tuple[str, list[str]]] = []
    folder = model_folder(tmp_path / "snapshot")

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(repository: str, *, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)


def response(status: int) -> Any:
    """Return a response of the client that huggingface_hub happens to use."""
    client = import_module(HTTPError.__module__.partition(".")[0])
    request = client.Request("GET", "https://huggingface.co/google/gemma")
    return client.Response(status, request=request)


def test_a_folder_is_itself_even_if_it_looks_like_a_repository(
    downloads: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder(tmp_path / "google" / "gemma")
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("google/gemma") == Path("google/gemma")
    assert hub.resolve(str(tmp_path / "google" / "gemma")) == tmp_path / "google" / "gemma"
    assert downloads == []


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model_folder(tmp_path / "gemma")
    assert hub.resolve("~/gemma") == tmp_path / "gemma"


def test_a_repository_is_downloaded_without_what_is_not_needed(
    downloads: list[tuple[str, list[str]]], tmp_path: Path
) -> None:
    assert hub.resolve("google/gemma-4-E2B-it") == tmp_path / "snapshot"
    [(repository, patterns)] = downloads
    assert repository == "google/gemma-4-E2B-it"
    assert patterns == ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


@pytest.mark.parametrize("name", ["./gemma", "/nowhere/gemma", "models/a/b", "gemma", "../x/y", ""])
def test_a_path_that_does_not_exist_is_not_looked_up(
    downloads: list[object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder|has no config\.json"):
        hub.resolve(name)
    assert downloads == []


def test_a_folder_without_a_model_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json; give the folder of a model"):
        hub.resolve(str(tmp_path))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.gguf is a file; give the folder"):
        hub.resolve(str(file))


@pytest.mark.parametrize(
    "error, message",
    [
        (GatedRepoError("gated", response=response(403)), "accept its licence.*hf auth login"),
        (RepositoryNotFoundError("none", response=response(404)), "no such repository.*spelling"),
        (LocalEntryNotFoundError("offline"), "the hub cannot be reached.*folder on disk"),
        (OfflineModeIsEnabled("offline"), "the hub cannot be reached.*folder on disk"),
        (HfHubHTTPError("503 busy\nmore", response=response(503)), "failed: 503 busy; try again"),
        (HTTPError("reset by peer"), "failed: reset by peer; try again"),
        (OSError("no space left"), "failed: no space left; try again"),
    ],
)
def test_every_failed_download_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    refuse(monkeypatch, error)
    with pytest.raises(ValueError, match=message) as raised:
        hub.resolve("google/gemma")
    assert "google/gemma" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_repository_without_a_model_is_refused(downloads: list[object], tmp_path: Path) -> None:
    (tmp_path / "snapshot" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"google/gemma has no config\.json"):
        hub.resolve("google/gemma")


def test_a_drafter_in_the_targets_folder_is_found(tmp_path: Path) -> None:
    target = model_folder(tmp_path / "gemma")
    assert hub.drafter_for(target) is None
    drafter = model_folder(target / "drafter")
    assert hub.drafter_for(target) == drafter


def test_the_built_in_pair_is_whole_or_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_BUILTIN", tmp_path / "builtin")
    with pytest.raises(ValueError, match=r"built-in model is missing.*reinstall"):
        hub.builtin()
    model_folder(tmp_path / "builtin")
    with pytest.raises(ValueError, match=r"built-in model is missing.*reinstall"):
        hub.builtin()
    model_folder(tmp_path / "builtin" / "drafter")
    assert hub.builtin() == tmp_path / "builtin"
