"""The fixture that runs kernels: executed here, or on a Mac's GPU."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import mlx.core as mx
import pytest

from gemma_mtp_mlx.kernels.kernel import Constant, Kernel
from tests.metal.executor import Executor, executing
from tests.metal.toolchain import NO_COMPILER, find_compiler


@dataclass
class OnGPU:
    """What is noted of launches on a GPU: as much of an Executor as one can tell."""

    mode: str = "gpu"
    schedule: str = "gpu"
    seed: int = 0
    timeout: float = 0.0
    launches: list["OnGPU.Record"] = field(default_factory=list)

    @dataclass
    class Record:
        """A launch; see tests.metal.executor.Record."""

        kernel: str
        template: Mapping[str, Constant]
        groups: tuple[int, int, int]
        threads: int

        def __getattr__(self, name: str) -> NoReturn:
            pytest.skip(
                f"a GPU does not tell a launch's {name}; it is counted where it is executed"
            )


@pytest.fixture
def metal() -> Iterator[Executor | OnGPU]:
    """Execute kernels here, checked, and let gemma_mtp_mlx choose them; on a Mac, run them.

    A test's own patches are undone before this one's: it asks for them after `metal`.
    """
    if mx.metal.is_available():
        notes = OnGPU()
        launch = Kernel.launch

        def noted(self: Kernel, *args: Any, **keywords: Any) -> Sequence[mx.array]:
            results = launch(self, *args, **keywords)
            groups = args[1] if len(args) > 1 else keywords["groups"]
            template = args[3] if len(args) > 3 else keywords["template"]
            notes.launches.append(OnGPU.Record(self.name, template, groups, self.threads))
            return results

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kernel, "launch", noted)
            yield notes
        return
    if sys.platform != "linux":
        pytest.skip("kernels run on a Mac's GPU, or are executed on Linux")
    if find_compiler() is None:
        pytest.skip(NO_COMPILER)
    with executing() as executor:
        yield executor
