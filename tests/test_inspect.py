"""The inspect command: what it prints of folders, and of repositories it may not download."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.utils
import pytest
from mlx.utils import tree_flatten

from gemma_mtp_mlx import remote
from gemma_mtp_mlx.checkpoint import INDEX, Folder
from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.convert import Quantization, convert
from gemma_mtp_mlx.families import TEXTS, target_config
from gemma_mtp_mlx.target import Target
from tests.checkpoints import write_assistant, write_checkpoint, write_pair

Capture = pytest.CaptureFixture[str]
MODEL = "26B-A4B"
REPOSITORY = "google/gemma"
CHUNK = 1 << 16


class Hub:
    """A server of repositories' files, which are a beginning and zeros to the end of a length.

    sent: bytes of answers. ignores_ranges: whether every answer is the whole file.
    """

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, int]] = {}
        self.gated = False
        self.ignores_ranges = False
        self.sent = 0
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def add(self, name: str, content: bytes, size: int | None = None) -> None:
        self.files[name] = content, size or len(content)

    def add_weights(self, name: str, tensors: dict[str, tuple[str, list[int], int]]) -> int:
        """Add a safetensors file of (type, shape, bytes) and return the bytes of its tensors."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, (dtype, shape, nbytes) in tensors.items():
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
            end += nbytes
        text = json.dumps(header).encode()
        self.add(name, len(text).to_bytes(8, "little") + text, 8 + len(text) + end)
        return end

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        found = re.fullmatch(rf"/{REPOSITORY}/resolve/main/(.+)", handler.path)
        name = found[1] if found else ""
        self.asked.append(name)
        if self.gated or name not in self.files:
            code = "EntryNotFound" if found else "RepoNotFound"
            handler.send_response(403 if self.gated else 404)
            handler.send_header("X-Error-Code", "GatedRepo" if self.gated else code)
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        content, size = self.files[name]
        asked = re.fullmatch(r"bytes=0-(\d+)", handler.headers.get("Range", ""))
        end = size
        if asked and not self.ignores_ranges:
            end = min(size, int(asked[1]) + 1)
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes 0-{end - 1}/{size}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(end))
        handler.end_headers()
        try:
            for start in range(0, end, CHUNK):
                stop = min(end, start + CHUNK)
                piece = content[start:stop]
                handler.wfile.write(piece + bytes(stop - start - len(piece)))
                self.sent += stop - start
        except OSError:  # enough was read
            handler.close_connection = True

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Return a hub, which this process takes for the real one, with an empty cache."""
    hub = Hub()

    def url(repository: str, name: str, revision: str) -> str:
        return f"{hub.address}/{repository}/resolve/main/{name}"

    monkeypatch.setattr(remote, "hf_hub_url", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    huggingface_hub.utils.close_session()
    hub.close()


def add_published(hub: Hub) -> int:
    """Add the 26B-A4B as it is published: multimodal, in two shards. Returns bytes of weights."""
    config = target_config(MODEL)
    tensors = {}
    for name, value in tree_flatten(Target(config).parameters()):
        stored = f"model.language_model.{name.removeprefix('model.')}"
        shape = list(value.shape)
        tensors[stored] = "BF16", shape, 2 * value.size
    tensors["model.vision_tower.patch.weight"] = "BF16", [64, 64], 2 * 64 * 64
    files = {f"model-0000{i + 1}-of-00002.safetensors": list(tensors)[i::2] for i in range(2)}
    total = sum(
        hub.add_weights(file, {name: tensors[name] for name in names})
        for file, names in files.items()
    )
    weight_map = {name: file for file, names in files.items() for name in names}
    hub.add(INDEX, json.dumps({"weight_map": weight_map}).encode())
    hub.add(
        "config.json", json.dumps({"model_type": "gemma4", "text_config": TEXTS[MODEL]}).encode()
    )
    return total


def add_tiny(hub: Hub, folder: Path, prefix: str = "") -> None:
    for file in folder.iterdir():
        hub.add(f"{prefix}{file.name}", file.read_bytes())


def run(hub: Hub, cache: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(cache)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-P", "-m", "gemma_mtp_mlx", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def inspected(capsys: Capture, *argv: str) -> dict[str, Any]:
    assert main(["inspect", *argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def refused(capsys: Capture, *argv: str) -> str:
    assert main(["inspect", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def test_a_repository_is_known_before_it_is_downloaded(server: Hub, tmp_path: Path) -> None:
    weights = add_published(server)
    ran = run(server, tmp_path / "home", "inspect", REPOSITORY, "--memory", "24")
    assert ran.returncode == 0, ran.stderr
    assert f"{REPOSITORY}: Gemma 4 26B-A4B, on the hub and not downloaded" in ran.stdout
    assert "mixture of 128 experts, 8 a token" in ran.stdout
    assert "multimodal (conditional generation)" in ran.stdout
    assert "Tensors left out: 1 of vision" in ran.stdout
    assert "As it is: 50.47 GB of weights" in ran.stdout
    assert re.search(r"1 row +does not fit, 27\.\d+ GB too much, at 4096 tokens", ran.stdout)
    assert "Converted with -q (4 bits): 14." in ran.stdout
    assert re.search(r"1 row +fits, with 8\.\d+ GB to spare at 4096 tokens", ran.stdout)
    assert weights > 50e9
    assert server.sent < 0.01 * weights
    assert server.sent < 2e6
    assert not list((tmp_path / "home").rglob("config.json"))  # nothing is kept half


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(server: Hub, capsys: Capture) -> None:
    weights = add_published(server)
    server.ignores_ranges = True
    assert inspected(capsys, REPOSITORY)["target"]["weights_bytes"] == weights - 2 * 64 * 64
    assert server.sent < 0.01 * weights


@pytest.mark.parametrize("first_bytes", [8, 1 << 20])
def test_a_repository_and_its_folder_are_the_same(
    server: Hub,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    first_bytes: int,
) -> None:
    """Whether too few bytes are asked for before a header's length is known, or too many."""
    monkeypatch.setattr(remote, "_FIRST_BYTES", first_bytes)
    target, assistant = write_pair(tmp_path / "pair", "e2b", layout="conditional")
    assistant.rename(target / "drafter")
    add_tiny(server, target / "drafter", "drafter/")
    for file in (path for path in target.iterdir() if path.is_file()):
        server.add(file.name, file.read_bytes())
    there, here = inspected(capsys, REPOSITORY), inspected(capsys, str(target))
    for part in ("target", "drafter"):
        assert there[part].pop("where") == "hub"
        assert here[part].pop("where") == "folder"
        del there[part]["name"], here[part]["name"]
    assert there == here
    assert here["drafter"]["reads"]["parts"] == 16


def test_a_drafter_in_a_repository_of_its_own(server: Hub, tmp_path: Path, capsys: Capture) -> None:
    target, assistant = write_pair(tmp_path, "31b")
    add_tiny(server, assistant)
    assert inspected(capsys, str(target))["drafter"] is None
    found = inspected(capsys, str(target), "--draft-model", REPOSITORY)
    assert found["drafter"]["where"] == "hub"
    found = inspected(capsys, REPOSITORY)
    assert found["target"] is None and found["drafter"]["layout"] == "drafter"
    assert main(["inspect", str(assistant)]) == 0
    text = capsys.readouterr().out
    assert "drafter for a target of hidden size 128" in text
    assert f"Converted with -q (4 bits): {found['drafter']['converted_bytes'] / 1e6:.2f} MB" in text
    write_assistant(tmp_path / "other", "12b")  # of another vocabulary
    words = refused(capsys, str(target), "--draft-model", str(tmp_path / "other"))
    assert "this drafter does not belong to this target" in words


def _no_weights(hub: Hub) -> None:
    del hub.files["model.safetensors"]


def _shorter(hub: Hub) -> None:
    content, size = hub.files["model.safetensors"]
    hub.add("model.safetensors", content, size - 1)


def _long_header(hub: Hub) -> None:
    hub.add("model.safetensors", (1 << 40).to_bytes(8, "little") + b"{}", 1 << 41)


def _endless_config(hub: Hub) -> None:
    hub.add("config.json", b"{", 1 << 36)


def _wrong_shape(hub: Hub) -> None:
    hub.add_weights("model.safetensors", {"model.norm.weight": ("F32", [3], 8)})


def _outside(hub: Hub) -> None:
    hub.add(INDEX, b'{"weight_map": {"x": "../../etc/x.safetensors"}}')


def _gated(hub: Hub) -> None:
    hub.gated = True


@pytest.mark.parametrize(
    "damage, words",
    [
        (_no_weights, "has no model.safetensors"),
        (_shorter, "its header announces"),
        (_long_header, "too long for a Gemma 4"),
        (_endless_config, "too many for what it should hold"),
        (_wrong_shape, "size of its shape"),
        (_outside, "does not name files"),
        (_gated, "accept its licence"),
    ],
)
def test_what_is_not_as_it_should_be_on_the_hub(
    server: Hub, tmp_path: Path, capsys: Capture, damage: Callable[[Hub], None], words: str
) -> None:
    write_checkpoint(tmp_path / "target", "12b")
    add_tiny(server, tmp_path / "target")
    damage(server)
    assert words in refused(capsys, REPOSITORY)
    assert server.sent < 1 << 26


def test_a_repository_that_is_not_there(server: Hub, capsys: Capture) -> None:
    assert "no such repository" in refused(capsys, "nobody/nothing")


def test_offline_and_unreachable(
    server: Hub, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, REPOSITORY)
    assert server.asked == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote, "hf_hub_url", lambda *_, **__: "http://127.0.0.1:1/x")
    assert "the hub cannot be reached" in refused(capsys, REPOSITORY)


def test_a_repository_in_the_cache_is_not_asked_for(
    server: Hub, tmp_path: Path, capsys: Capture
) -> None:
    repository = tmp_path / "cache" / "models--google--gemma"
    write_checkpoint(repository / "snapshots" / "abc", "12b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert inspected(capsys, REPOSITORY, "--draft-model", "none")["target"]["where"] == "cache"
    assert server.asked == []
    (repository / "snapshots" / "abc" / "model.safetensors").unlink()
    assert "has no config.json" in refused(capsys, REPOSITORY)  # the hub is asked


def test_a_remote_tensor_cannot_be_read(server: Hub, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "target", "12b")
    add_tiny(server, tmp_path / "target")
    checkpoint = remote.RemoteCheckpoint(REPOSITORY)
    assert checkpoint.files == ()
    with pytest.raises(ValueError, match="is not downloaded"):
        checkpoint.rows("model.norm.weight", 0, 1)
    folder = Folder(tmp_path / "target")
    assert [t[1:] for t in checkpoint.tensors.values()] == [t[1:] for t in folder.tensors.values()]


@pytest.mark.parametrize("family", ["26b", "e4b"])
def test_the_text_says_what_the_object_says(tmp_path: Path, capsys: Capture, family: str) -> None:
    target, assistant = write_pair(tmp_path, family, dtype="bfloat16")
    argv = [str(target), "--draft-model", str(assistant), "--memory", "2"]
    found = inspected(capsys, *argv)
    assert main(["inspect", *argv]) == 0
    text = capsys.readouterr().out
    for part in ("target", "drafter"):
        for group in found[part]["groups"]:
            assert re.search(rf"  {group['name']} .*{group['bits_per_weight']:.2f}", text)
    assert "Gemma 4 of unknown size" in text
    assert ("Experts are taken as chosen uniformly" in text) == (family == "26b")
    assert ("the best 4 of 16 clusters" in text) == (family == "e4b")
    assert all(len(line) < 140 and line == line.rstrip() for line in text.splitlines())
    for rows in found["memory"]["rows"]:
        at = rows["contexts"][0]
        assert at["fits"] and at["spare_bytes"] == 2_000_000_000 - at["needed_bytes"]
        assert re.search(rf"{rows['rows']} rows? +fits, with 0\.9\d GB to spare", text)


def test_a_converted_model_is_not_converted_again(tmp_path: Path, capsys: Capture) -> None:
    target, assistant = write_pair(tmp_path, "31b", dtype="bfloat16")
    before = inspected(capsys, str(target), "--draft-model", str(assistant))
    convert(str(target), tmp_path / "q", draft_source=str(assistant), quantization=Quantization())
    after = inspected(capsys, str(tmp_path / "q"))
    assert after["memory_converted"] is None
    for part in ("target", "drafter"):
        assert after[part]["weights_bytes"] == before[part]["converted_bytes"]
        assert after[part]["converted_bytes"] is None
    assert main(["inspect", str(tmp_path / "q")]) == 0
    assert "affine 4-bit, groups of 64" in capsys.readouterr().out


def test_layouts_are_named(tmp_path: Path, capsys: Capture) -> None:
    for number, (family, layout, config) in enumerate(
        [("12b", "unified", "published"), ("31b", "conditional", "per_layer")]
    ):
        folder = tmp_path / str(number)
        write_checkpoint(folder, family, layout=layout, config_layout=config)
        found = inspected(capsys, str(folder), "--draft-model", "none")
        assert (found["target"]["layout"], found["target"]["config_layout"]) == (layout, config)


@pytest.mark.parametrize("memory", ["0", "-1", "nan", "inf"])
def test_memory_is_a_number_of_gb(tmp_path: Path, capsys: Capture, memory: str) -> None:
    assert "--memory" in refused(capsys, str(tmp_path), "--memory", memory)


def test_a_folder_without_a_model(tmp_path: Path, capsys: Capture) -> None:
    assert "has no config.json" in refused(capsys, str(tmp_path))
    assert "there is no folder" in refused(capsys, str(tmp_path / "nowhere"))


def test_another_model_is_refused(server: Hub, capsys: Capture) -> None:
    server.add("config.json", b'{"model_type": "llama"}')
    server.add_weights("model.safetensors", {"x": ("F32", [1], 4)})
    assert "not a Gemma 4 model" in refused(capsys, REPOSITORY)
