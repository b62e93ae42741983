"""Fixtures: the tiny checkpoints of every family, loaded once."""

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from gemma_mtp_mlx import Pair, load
from tests.checkpoints import write_pair

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
