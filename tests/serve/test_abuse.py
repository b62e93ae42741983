"""A server outlives clients that behave badly."""

from pathlib import Path

from tests.serve.abuse import abuse
from tests.serve.process import ServerProcess

MOST_GROWTH_MB = 30.0


def test_it_outlives_a_storm(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--kv-budget", "0.1") as server:
        found = abuse(server, 300)
    assert found["memory_after_mb"] - found["memory_before_mb"] < MOST_GROWTH_MB
    assert "refused or too slow" not in found["did"]
