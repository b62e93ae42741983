"""The probe finds what a GPU does otherwise, and what it can be done about is done."""

from typing import Any

import mlx.core as mx
import pytest

from gemma_mtp_mlx import probe as probe_module
from gemma_mtp_mlx.kernels import verify_matmul, weights
from gemma_mtp_mlx.kernels.fast import fast
from gemma_mtp_mlx.kernels.kernel import Kernel
from gemma_mtp_mlx.probe import check_formats, probe
from gemma_mtp_mlx.round import Models
from tests.conftest import LoadPair
from tests.metal.executor import Executor


@pytest.fixture
def models(tiny_pair: LoadPair) -> Models:
    pair = tiny_pair("26b", "bfloat16")
    return Models(pair.target, pair.drafter)


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats are trusted again after a test."""
    monkeypatch.setattr(weights, "_ODD", set())


def altered(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let every launch of kernels of that name give other bits."""
    launch = Kernel.launch

    def other(self: Kernel, *args: Any, **keywords: Any) -> list[mx.array]:
        results = launch(self, *args, **keywords)
        return [x * 1.01 for x in results] if self.name == name else results

    monkeypatch.setattr(Kernel, "launch", other)


def test_nothing_to_say(models: Models, metal: Executor) -> None:
    metal.mode = "fast"
    assert probe(models) == []
    launched = {launch.kernel for launch in metal.launches}
    assert {"project_rows", "project_tiles", "choose_rows", "experts_down", "route"} <= launched


def test_a_matrix_unit_that_rounds_otherwise_does_all(
    models: Models, metal: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    metal.mode = "fast"
    for name in ("project_tiles", "gated_tiles", "logits_tiles"):
        altered(monkeypatch, name)
    (note,) = probe(models)
    assert "plain weights of 16 bits" in note and "matrix unit" in note
    metal.launches.clear()
    x = mx.ones((1, models.target.config.hidden_size), mx.bfloat16)
    verify_matmul.project_metal(x, models.target.model.layers[0].self_attn.q_proj)
    assert [launch.kernel for launch in metal.launches] == ["project_tiles"]


def test_what_has_no_remedy_is_said(
    models: Models, metal: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    metal.mode = "fast"
    launch = Kernel.launch

    def by_company(self: Kernel, *args: Any, **keywords: Any) -> list[mx.array]:
        results = launch(self, *args, **keywords)
        single = self.name == "residual_norm" and results[0].size == results[0].shape[-1]
        return [x * 1.01 for x in results] if single else results

    monkeypatch.setattr(Kernel, "launch", by_company)
    (note,) = probe(models)
    assert "numerical ties" in note and "report" in note


def test_a_kernel_is_given_as_many_threads_as_it_may_have(
    models: Models, metal: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    metal.mode = "fast"
    monkeypatch.setattr(probe_module, "_is_invariant", lambda target, tokens: True)
    for kernel in (verify_matmul.PROJECT.tiles, verify_matmul.GATED.tiles):
        monkeypatch.setattr(kernel, "threads", kernel.threads)
        monkeypatch.setattr(kernel, "_launched", set())
    refuse(monkeypatch, {"project_tiles": 96, "gated_tiles": 200})
    assert probe(models) == []
    assert verify_matmul.PROJECT.tiles.threads == 64
    assert verify_matmul.GATED.tiles.threads == 128


def test_a_kernel_that_cannot_be_launched_is_named(
    models: Models, metal: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    metal.mode = "fast"
    kernel = verify_matmul.PROJECT.tiles
    monkeypatch.setattr(kernel, "threads", kernel.threads)
    monkeypatch.setattr(kernel, "_launched", set())
    refuse(monkeypatch, {"project_tiles": 16})
    with pytest.raises(RuntimeError, match="the kernel project_tiles cannot be launched"):
        probe(models)


def refuse(monkeypatch: pytest.MonkeyPatch, most: dict[str, int]) -> None:
    """Refuse launches of these kernels with more threads, as MLX does, when they are evaluated."""
    attempt = Kernel._try

    def limited(self: Kernel, results: list[mx.array]) -> None:
        if self.threads <= most.get(self.name, 1024):
            return attempt(self, results)

        def evaluate(*arrays: Any) -> None:
            raise RuntimeError(
                f"Thread group size ({self.threads}) is greater than  the maximum allowed threads "
                f"per threadgroup ({most[self.name]})."
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mx, "eval", evaluate)
            attempt(self, results)

    monkeypatch.setattr(Kernel, "_try", limited)


def test_a_format_without_a_kernel_is_named(models: Models) -> None:
    check_formats(models.target)
    layer = models.target.model.layers[2].mlp
    kept = layer.down_proj.weight
    layer.down_proj.weight = kept[:, :-8]
    try:
        with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj.*--fast"):
            check_formats(models.target)
    finally:
        layer.down_proj.weight = kept


@pytest.mark.parametrize(
    "architecture, rows, own",
    [
        ("applegpu_g13s", 64, True),
        ("applegpu_g16s", 64, True),
        ("applegpu_g17s", 12, True),
        ("applegpu_g17s", 13, False),
        ("unknown", 64, True),
    ],
)
def test_fast_mode_takes_what_wins(
    models: Models, metal: Executor, architecture: str, rows: int, own: bool
) -> None:
    metal.mode = "fast"
    mlp = models.target.model.layers[0].mlp
    x = mx.random.normal((rows, models.target.config.hidden_size)).astype(mx.bfloat16)
    arithmetic = fast(architecture)
    (projected,) = arithmetic.project(x, mlp.gate_proj)
    gated = arithmetic.gated(x, mlp.gate_proj, mlp.up_proj)
    assert bool(metal.launches) == own
    assert mx.allclose(projected, mlp.gate_proj(x), rtol=0.02, atol=0.02)
    assert gated.shape == projected.shape


def test_fast_mode_takes_what_has_no_kernel(models: Models, metal: Executor) -> None:
    metal.mode = "fast"
    odd = type(models.target.model.layers[0].mlp.gate_proj)(40, 16, bias=False)
    x = mx.ones((2, 40))
    assert mx.array_equal(fast("applegpu_g16s").project(x, odd)[0], odd(x))
    assert not metal.launches
