"""Finding a model: what is there is found, and what is not is explained with a remedy."""

import json
from importlib import import_module
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gemma_mtp_mlx import hub
from gemma_mtp_mlx.download import Choose, Tell

TOKEN = "Invalid credentials in Authorization header"
FILES = [
    ".gitattributes",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "tokenizer.model",
]


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str, list[str]]]:
    """Answer downloads with a model folder and return what was asked for, and chosen."""
    asked: list[tuple[str, str, list[str]]] = []
    folder = model_folder(tmp_path / "snapshot")

    def download(repository: str, revision: str, choose: Choose, tell: Tell) -> Path:
        asked.append((repository, revision, choose(FILES)))
        return folder

    monkeypatch.setattr(hub, "download", download)
    return asked


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def listing(repository: str, revision: str) -> None:
        raise error

    monkeypatch.setattr("gemma_mtp_mlx.download._listing", listing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/no/such/cache")


def response(status: int, message: str = "") -> Any:
    """Return a response of the client that huggingface_hub happens to use."""
    client = import_module(HTTPError.__module__.partition(".")[0])
    request = client.Request("GET", "https://huggingface.co/google/gemma")
    return client.Response(status, headers={"X-Error-Message": message}, request=request)


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


@pytest.mark.parametrize(
    "name, repository, revision",
    [
        ("google/gemma-4-E2B-it", "google/gemma-4-E2B-it", "main"),
        ("google/gemma-4-E2B-it@refs/pr/1", "google/gemma-4-E2B-it", "refs/pr/1"),
        ("gemma4:31b-bf16", "google/gemma-4-31B-it", "main"),
        ("Gemma4:e4b@0123abc", "mlx-community/gemma-4-e4b-it-4bit", "0123abc"),
    ],
)
def test_a_repository_is_downloaded_without_what_is_not_needed(
    downloads: list[object], tmp_path: Path, name: str, repository: str, revision: str
) -> None:
    files = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.model"]
    assert hub.resolve(name) == tmp_path / "snapshot"
    assert downloads == [(repository, revision, files)]


NAMELESS = ["./gemma", "/nowhere/gemma", "models/a/b", "gemma", "../x/y", "", "a/b@", "a/b@../c"]


@pytest.mark.parametrize("name", NAMELESS)
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
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.bin is a file; give the folder"):
        hub.resolve(str(file))


@pytest.mark.parametrize(
    "error, message",
    [
        (GatedRepoError("gated", response=response(403)), "accept its licence.*hf auth login"),
        (RepositoryNotFoundError("none", response=response(404)), "no such repository.*spelling"),
        (RevisionNotFoundError("no", response=response(404)), "no revision main; .*/commits lists"),
        (OfflineModeIsEnabled("offline"), "not in .*HF_HUB_OFFLINE is set; .*folder on disk"),
        (HfHubHTTPError("no", response=response(401)), "no such repository.*spelling"),
        (HfHubHTTPError("no", response=response(401, TOKEN)), "know your token; .*hf auth login"),
        (HfHubHTTPError("no", response=response(403)), "your token may not read it; make one"),
        (HfHubHTTPError("no", response=response(429)), "fewer requests; wait"),
        (HfHubHTTPError("503 busy\nmore", response=response(503)), r"fails \(status 503\); try"),
        (HTTPError("reset by peer"), r"cannot be reached.*\(reset by peer\).*run the same again"),
        (JSONDecodeError("no", "<html>", 0), "is not the hub; check the network"),
        (OSError("read-only"), "failed: read-only; try again"),
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


@pytest.mark.parametrize(
    "files, message",
    [
        (["model-Q4_0.gguf", "config.json"], "GGUF.*mlx-gemma-mtp convert --hf-path google/gemma "),
        (
            ["config.json", "pytorch_model.bin"],
            r"google/gemma has no config\.json with safetensors",
        ),
        (["model.safetensors"], r"google/gemma has no config\.json with safetensors"),
    ],
)
def test_a_repository_without_a_model_is_refused_before_anything_is_fetched(
    downloads: list[object], monkeypatch: pytest.MonkeyPatch, files: list[str], message: str
) -> None:
    monkeypatch.setattr("tests.test_hub.FILES", files)
    with pytest.raises(ValueError, match=message):
        hub.resolve("google/gemma")
    assert downloads == []


def test_a_gguf_file_is_a_source_but_no_model(tmp_path: Path, downloads: list[object]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    assert hub.resolve_source(str(file)) == file
    for name in (str(file), "google/gemma/model.gguf"):
        with pytest.raises(ValueError, match=f"GGUF.*convert --hf-path {name} --mlx-path"):
            hub.resolve(name)
    assert hub.resolve_source("google/gemma") == tmp_path / "snapshot"
    assert hub.resolve_source(str(tmp_path / "snapshot")) == tmp_path / "snapshot"


def test_the_one_model_of_a_gguf_repository_is_a_source(
    downloads: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "snapshot"
    (folder / "config.json").unlink()
    (folder / "b.gguf").write_bytes(b"")
    files = ["README.md", "mmproj-b.gguf", "b-mmproj.gguf", "mtp-b.gguf", "b.gguf"]
    monkeypatch.setattr("tests.test_hub.FILES", files)
    assert hub.resolve_source("google/gemma-gguf") == folder / "b.gguf"
    assert downloads.pop() == ("google/gemma-gguf", "main", ["b.gguf"])
    files.append("c.gguf")
    with pytest.raises(ValueError, match=r"several.*google/gemma-gguf/b\.gguf, .*/c\.gguf"):
        hub.resolve_source("google/gemma-gguf")
    assert hub.resolve_source("google/gemma-gguf/b.gguf@v1") == folder / "b.gguf"
    assert downloads.pop() == ("google/gemma-gguf", "v1", ["b.gguf"])
    with pytest.raises(ValueError, match=r"has no file d\.gguf"):
        hub.resolve_source("google/gemma-gguf/d.gguf")


def test_a_drafter_is_found_in_the_targets_folder_and_beside_it(tmp_path: Path) -> None:
    target = model_folder(tmp_path / "gemma")
    assert hub.drafter_for(target) is None
    beside = model_folder(tmp_path / "gemma-assistant")
    assert hub.drafter_for(target) == beside
    inside = model_folder(target / "drafter")
    assert hub.drafter_for(target) == inside


def test_a_snapshots_drafter_is_the_hubs(downloads: list[Any], tmp_path: Path) -> None:
    def snapshot(name: str) -> Path:
        return model_folder(tmp_path / f"models--{name}" / "snapshots" / "0123")

    target = snapshot("unsloth--gemma-4-12b-it-qat-4bit")
    assert hub.repository_of(target) == ("unsloth/gemma-4-12b-it-qat-4bit", "0123")
    assert hub.drafter_for(target) == tmp_path / "snapshot"
    assert downloads.pop()[0] == "google/gemma-4-12B-it-qat-q4_0-unquantized-assistant"
    assert hub.drafter_for(snapshot("google--gemma-4-12B")) is None
    assert hub.drafter_for(snapshot("someone--gemma-4-12B-it-tuned")) is None
    assert hub.repository_of(target.parent) is None
    assert hub.repository_of(tmp_path) is None


@pytest.mark.parametrize(
    "source, drafter",
    [
        ({"name": "google/gemma-4-E2B-it@v1"}, "google/gemma-4-E2B-it-assistant"),
        ({"name": "gemma4:31b"}, "google/gemma-4-31B-it-assistant"),
        ({"name": "x/gemma-4-E4B-it-GGUF/y.gguf"}, "google/gemma-4-E4B-it-assistant"),
        ({"name": "/x/gemma-4-E4B-it-Q4_K_M.gguf"}, "google/gemma-4-E4B-it-assistant"),
        (
            {"name": "/c/models--google--gemma-4-E4B-it/snapshots/0"},
            "google/gemma-4-E4B-it-assistant",
        ),
        ({"name": "/models/mine"}, None),
        ({}, None),
        ("google/gemma-4-E2B-it", None),
    ],
)
def test_what_was_converted_is_paired_by_what_it_was_made_from(
    downloads: list[Any], tmp_path: Path, source: object, drafter: str | None
) -> None:
    target = model_folder(tmp_path / "converted")
    (target / "conversion.json").write_text(json.dumps({"source": source}))
    found = hub.drafter_for(target)
    assert found == (tmp_path / "snapshot" if drafter else None)
    assert [repository for repository, *_ in downloads] == ([drafter] if drafter else [])


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
