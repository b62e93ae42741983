"""Fixtures: one server of the built-in pair for many tests, and the pair itself."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from gemma_mtp_mlx import Pair, hub, load
from tests.serve.process import ServerProcess


@pytest.fixture(scope="session")
def pair() -> Pair:
    return load(hub.builtin())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    running = ServerProcess(log, "--kv-budget", "0.1")
    yield running
    running.stop()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
