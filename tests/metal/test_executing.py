"""Executing what gemma_mtp_mlx launches, in place of a GPU."""

import multiprocessing
import os
import sys
import types
from pathlib import Path

import mlx.core as mx
import pytest

from gemma_mtp_mlx import device
from gemma_mtp_mlx.kernels.kernel import Kernel, Output
from tests.metal import toolchain
from tests.metal.conftest import Runner
from tests.metal.executor import executing

DOUBLE = Kernel(
    "double", ["x"], ["y"], "y[thread_position_in_grid.x] = 2 * x[thread_position_in_grid.x];", []
)


def _doubled(x: mx.array) -> mx.array:
    return DOUBLE.launch([x], (1, 1, 1), [Output(x.shape, x.dtype)], {})[0]


def test_kernels_need_a_gpu_again_afterwards(run: Runner) -> None:
    assert _doubled(mx.ones(256))[255].item() == 2
    with executing(mode="fast") as executor:
        assert _doubled(mx.ones(256))[255].item() == 2
        assert [record.kernel for record in executor.launches] == ["double"]
    assert len(run.executor.launches) == 1


def test_nothing_is_left_behind() -> None:
    launch, on_gpu, fused = Kernel.launch, device.on_gpu, device.fused
    with executing():
        assert device.on_gpu() and Kernel.launch is not launch
    with pytest.raises(ZeroDivisionError), executing():
        raise ZeroDivisionError
    assert (Kernel.launch, device.on_gpu, device.fused) == (launch, on_gpu, fused)
    assert not device.on_gpu()


def test_every_module_takes_this_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # One that has imported on_gpu before, one that does so meanwhile.
    early, late = (types.ModuleType(f"gemma_mtp_mlx.{name}") for name in ("early", "late"))
    early.on_gpu = real = device.on_gpu
    monkeypatch.setitem(sys.modules, early.__name__, early)
    with executing():
        assert early.on_gpu() and device.on_gpu()
        late.on_gpu = device.on_gpu
        monkeypatch.setitem(sys.modules, late.__name__, late)
        assert device.fused(_doubled) is _doubled
    assert early.on_gpu is late.on_gpu is device.on_gpu is real


def test_the_same_text_is_compiled_once(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    real = toolchain._run
    monkeypatch.setattr(
        toolchain, "_run", lambda command: (compiled.append(command), real(command))
    )
    values = run.values("i + 0.5f")
    compiled.clear()
    assert (run.values("i + 0.5f") == values).all()
    assert not compiled


def _compile_in(folder: str) -> str:
    os.environ["XDG_CACHE_HOME"] = folder
    return str(toolchain.compile_runtime())


def test_several_processes_compile_at_once(run: Runner, tmp_path: Path) -> None:
    del run  # only for its skip
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        paths = pool.map(_compile_in, [str(tmp_path)] * 3, chunksize=1)
    assert len(set(paths)) == 1
    assert [path.name for path in (tmp_path / "mlx-gemma-mtp" / "metal").iterdir()] == [
        Path(paths[0]).name
    ]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    assert toolchain.missing() == toolchain.NO_COMPILER
    monkeypatch.setattr(sys, "platform", "darwin")
    assert toolchain.missing() == toolchain.NOT_LINUX
