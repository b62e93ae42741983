"""Fixtures: the tiny checkpoints of every family, loaded once, and a hub to download from."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from gemma_mtp_mlx import Pair, load
from tests.checkpoints import write_pair
from tests.hub_commands import CHUNK, DRAFTER, SOURCE, START, TARGET, Done, Run
from tests.hub_server import HubServer
from tests.text_model import write_text_model

LoadPair = Callable[..., Pair]


def heed_ctrl_c() -> None:
    """Let a child process heed SIGINT even where the tests run in a background that ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> LoadPair:
    """Return a function: (family, dtype="float32", seed=1) -> the loaded pair."""

    @cache
    def get(family: str, dtype: str = "float32", seed: int = 1) -> Pair:
        folder: Path = tmp_path_factory.mktemp(f"{family}-{dtype}")
        target, assistant = write_pair(folder, family, seed=seed, dtype=dtype)
        return load(target, drafter=assistant)

    return get


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with target, drafter and a repository with a GGUF file."""
    folder = tmp_path_factory.mktemp("published")
    target = write_text_model(folder)
    (target / "drafter").rename(folder / "drafter")
    (folder / "gguf").mkdir()
    data = np.random.default_rng(1).bytes(2 * CHUNK + 4 * 1024 * 1024)
    (folder / "gguf" / "model.gguf").write_bytes(data)
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[HubServer]:
    server = HubServer()
    server.add(TARGET, published / "target", "v1")
    server.add(DRAFTER, published / "drafter")
    server.add(SOURCE, published / "gguf")
    yield server
    server.stop()


@pytest.fixture
def env(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    return environment(hub, tmp_path)


def environment(hub: HubServer, folder: Path) -> dict[str, str]:
    """Return a process's environment in which a hub is the only one. folder: for its cache."""
    mine = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    return mine | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1,localhost",
    }


@pytest.fixture
def run(env: dict[str, str]) -> Run:
    """Return a function that runs a command, with more of the environment."""

    def start(*argv: str, **more: str) -> Done:
        command = [sys.executable, "-P", "-c", START, *argv]
        return subprocess.run(
            command, env=env | more, capture_output=True, text=True, timeout=60, check=False
        )

    return start
