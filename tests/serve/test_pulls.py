"""A model named as the hub's: which names mean it, and how others are pulled meanwhile."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ollama import Client, ResponseError

from tests.conftest import environment
from tests.hub_commands import DRAFTER, SOURCE, TARGET, cache
from tests.hub_server import Fault, HubServer
from tests.serve.process import ServerProcess
from tests.serve.wire import open_request, read_until, wait_until
from tests.text_model import write_text_model

SERVED = "mlx-community--gemma-4-e2b-it-8bit"


SAMPLING = {"temperature": 2.0, "top_k": 1, "top_p": 0.95}


class Place(NamedTuple):
    """A server that serves what looks like a published model, and the hub it pulls from."""

    server: ServerProcess
    hub: HubServer
    env: dict[str, str]


@pytest.fixture(scope="module")
def place(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("pulls")
    snapshot = folder / f"models--{SERVED}" / "snapshots" / "a1b2"
    write_text_model(snapshot.parent).rename(snapshot)
    (snapshot / "generation_config.json").write_text(json.dumps(SAMPLING | {"eos_token_id": []}))
    hub = HubServer()
    hub.add(TARGET, published / "target")
    hub.add(DRAFTER, published / "drafter")
    hub.add(SOURCE, published / "gguf")
    env = environment(hub, folder)
    options = ("--model", str(snapshot), "--kv-budget", "0.05")
    with ServerProcess(folder / "log", *options, env=env) as server:
        yield Place(server, hub, env)
    hub.stop()


def test_settings_left_out_are_the_models(place: Place) -> None:
    def said(**options: float) -> str:
        with Client(host=place.server.url) as client:
            given = {"num_predict": 12, **options}
            return str(client.generate("gemma4:e2b", prompt="a", options=given).response)

    assert said(seed=1) == said(seed=2) == said(temperature=0)  # top_k is 1
    assert said(seed=1, top_k=0) != said(seed=2, top_k=0)
    with Client(host=place.server.url) as client:
        shown = client.show("gemma4:e2b").parameters.splitlines()
    assert [line.split() for line in shown] == [[n, str(value)] for n, value in SAMPLING.items()]


def test_models_are_pulled(place: Place) -> None:
    serving, hub, env = place
    with Client(host=serving.url) as client:
        for name in ("gemma4:e2b", "Gemma4:E2B-8bit", SERVED.replace("--", "/"), "a1b2:latest"):
            assert client.show(name).details.family == "gemma4"
            assert client.pull(name).status == "success"
        for name in ("gemma4", "gemma4:e4b", "gemma4:e2b-4bit", "gemma4:27b"):
            with pytest.raises(ResponseError, match="not found") as caught:
                client.show(name)
            assert caught.value.status_code == 404
        assert hub.seen == []

        parts = list(client.pull("gemma4:e2b-bf16", stream=True))
        assert [part.status for part in (parts[0], parts[-1])] == ["pulling manifest", "success"]
        ends = {part.digest: part for part in parts if part.digest}
        files = {**hub.repositories[TARGET][0].files, **hub.repositories[DRAFTER][0].files}
        assert all(part.completed == part.total > 0 for part in ends.values())
        assert {len(files["model.safetensors"]), len(files["config.json"])} <= {
            part.total for part in ends.values()
        }
        for repository in (TARGET, DRAFTER):
            assert list(cache(env, repository).glob("snapshots/*/config.json"))
        fetched = len(hub.downloads())
        assert client.pull(TARGET).status == "success"
        assert len(hub.downloads()) == fetched  # all of it was there

        for name, says in (
            ("llama3.2", "gemma4:e2b"),
            ("gemma4:27b", "gemma4:31b"),
            ("a/../b", "no name"),
        ):
            with pytest.raises(ResponseError, match=says) as caught:
                client.pull(name)
            assert caught.value.status_code == 404
        for stream in (False, True):
            with pytest.raises(ResponseError, match="no such repository"):
                list(client.pull("someone/else", stream=stream))


def test_a_pull_ends_with_its_client_and_goes_on_later(place: Place) -> None:
    serving, hub, env = place
    hub.faults["model.gguf"] = Fault(delay_s=0.005)
    size = len(hub.repositories[SOURCE][0].files["model.gguf"])
    with open_request(
        serving.port, json.dumps({"name": SOURCE}).encode(), path="/api/pull"
    ) as pull:
        said = read_until(pull, b'"completed":10485760')
        assert b'"completed":0' in said

    def kept() -> int:
        parts = cache(env, SOURCE).glob("blobs/*.incomplete")
        return sum(part.stat().st_size for part in parts)

    assert wait_until(lambda: any(f"/storage/{SOURCE[:7]}" in seen.path for seen in hub.seen))
    before = kept()
    assert 0 < before < size
    with Client(host=serving.url) as client:
        parts = list(client.pull(SOURCE, stream=True))
    assert next(part.completed for part in parts if part.digest) == before
    assert (parts[-1].status, kept()) == ("success", 0)
    assert hub.downloads()[-1].range == f"bytes={before}-"

    def left() -> list[bool]:
        entries = [entry for entry in serving.entries() if entry.get("model") == SOURCE]
        return [entry["client_disconnected"] for entry in entries]

    assert wait_until(lambda: left() == [True, False])
