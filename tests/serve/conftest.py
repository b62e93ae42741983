"""Fixtures: one server of the built-in pair for many tests, and the pair itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from gemma_mtp_mlx import Pair, hub, load
from tests.gemma_text import write_gemma_model
from tests.serve.process import ServerProcess

# The package is the installed one; only `tests` is found in this folder.
ECHO = f"""
import runpy, sys
sys.path.append({str(Path(__file__).parents[2])!r})
runpy.run_module("tests.serve.echo", run_name="__main__")
"""


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


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Return a server whose model thinks, calls tools and says what it is told."""
    folder = tmp_path_factory.mktemp("echo")
    model = write_gemma_model(folder)
    running = ServerProcess(
        folder / "log",
        "--model",
        str(model),
        "--kv-budget",
        "0.1",
        start=["-c", ECHO],
    )
    yield running
    running.stop()


@pytest.fixture
def echo_client(echo: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{echo.url}/v1", api_key="none", max_retries=0) as made:
        yield made
