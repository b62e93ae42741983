"""The fixture that executes one kernel."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.kernel import Constant, Kernel, Output
from tests.metal.executor import Executor, executing
from tests.metal.toolchain import missing

Value = np.ndarray | list


class Runner:
    """Makes a kernel of a text, and launches it."""

    def __init__(self, executor: Executor, folder: Path) -> None:
        self.executor, self.folder = executor, folder

    def __call__(
        self,
        source: str,
        outputs: Mapping[str, Output],
        inputs: Mapping[str, mx.array] | None = None,
        *,
        header: str = "",
        template: Mapping[str, Constant] | None = None,
        groups: tuple[int, int, int] = (1, 1, 1),
        threads: int = 64,
        row_contiguous: bool = True,
    ) -> list[mx.array]:
        """header: what a .metal file holds; it gets the name `test.metal`."""
        inputs = inputs or {}
        (self.folder / "test.metal").write_text(header)
        kernel = Kernel(
            "test",
            list(inputs),
            list(outputs),
            source,
            ["test"],
            threads=threads,
            row_contiguous=row_contiguous,
        )
        return kernel.launch(list(inputs.values()), groups, list(outputs.values()), template or {})

    def values(
        self, expression: str, dtype: mx.Dtype = mx.float32, **options: object
    ) -> np.ndarray:
        """Return the values of an expression in `i`, the thread, and `lane`: one of each thread."""
        source = (
            "uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;\n"
            f"o[i] = {expression};"
        )
        (o,) = self(source, {"o": Output((64,), dtype)}, **options)
        return np.array(o.astype(mx.float32) if dtype == mx.bfloat16 else o)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Runner]:
    """Execute a kernel, checked; run.executor has the options."""
    if reason := missing():
        pytest.skip(reason)
    monkeypatch.setattr("gemma_mtp_mlx.kernels.kernel.FOLDER", tmp_path)
    with executing() as executor:
        yield Runner(executor, tmp_path)
