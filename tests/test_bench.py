"""What `bench.compare` computes, rewrites and prints. No peer is needed or run."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from bench.peers import figures
from bench.peers.contenders import Clock, Contender, Drafting, rates
from bench.peers.layout import PREFIX, conditional_config, write_conditional
from bench.peers.machine import stored_bytes
from bench.peers.turns import take_turns
from gemma_mtp_mlx import hub
from gemma_mtp_mlx.checkpoint import read_config, stored_tensors
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.tensor_names import target_names
from tests import checkpoints


def made_run(tps: float, tokens: list[list[int]], drafting: Drafting | None = None) -> dict:
    clock = Clock(len(tokens))
    for row, ids in enumerate(tokens):
        clock.emit(row, ids)
    return {**clock.record(drafting), "decode_tps": tps, "total_tps": tps / 2}


def test_decoding_counts_once_every_row_has_begun() -> None:
    events = [(1.0, 0, 1), (1.2, 0, 4), (1.5, 1, 1), (2.0, 0, 3), (3.0, 1, 1), (5.0, 0, 2)]
    found = rates(events)
    assert found == {"decode_tps": 6 / 3.5, "total_tps": 12 / 5.0, "first_token_s": 1.0}


def test_ratios_are_taken_within_a_repeat() -> None:
    ours = [made_run(tps, [[1]]) for tps in (10.0, 40.0, 90.0)]
    baseline = [made_run(tps, [[1]]) for tps in (10.0, 20.0, 30.0)]
    assert figures.ratios(ours, baseline) == figures.Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="shorter"):
        figures.ratios(ours, baseline[:2])


def test_faster_way_counts() -> None:
    runs = {
        ("mlx_lm", "batch"): [made_run(5.0, [[1]]), made_run(50.0, [[1]]), made_run(6.0, [[1]])],
        ("mlx_lm", "single"): [made_run(7.0, [[1]]), made_run(8.0, [[1]]), made_run(9.0, [[1]])],
    }
    assert figures.faster_ways(runs)["mlx_lm"][0] == "single"


class Answering:
    """A worker without a process. It fails from its third run on if it is told to."""

    def __init__(self, name: str, log: list[tuple[str, int]], *, fails: bool = False) -> None:
        self.contender = Contender.parse(name)
        self.log, self.fails = log, fails

    def ways(self, batch: int) -> list[str]:
        return ["only"] if batch == 1 or self.contender.program != "transformers" else []

    def run(self, prompts: list[list[int]], max_tokens: int, way: str) -> dict:
        name = self.contender.name
        self.log.append((name, max_tokens))
        if self.fails and [logged for logged, _ in self.log].count(name) > 2:
            raise ValueError("out of memory")
        return made_run(1.0, prompts)


def test_turns_alternate_and_a_failure_is_told() -> None:
    log: list[tuple[str, int]] = []
    workers = [Answering("ours-k0", log), Answering("mlx_lm", log), Answering("transformers", log)]
    runs, failed = take_turns(workers, [[1], [2]], 50, 2)
    order = ["mlx_lm", "ours-k0", "ours-k0", "mlx_lm", "mlx_lm", "ours-k0"]
    assert log == [(name, 32 if turn < 2 else 50) for turn, name in enumerate(order)]
    assert {key: len(done) for key, done in runs.items()} == {
        ("ours-k0", "only"): 2,
        ("mlx_lm", "only"): 2,
    }
    assert failed == {"transformers": "does not run batches of 2"}
    workers = [Answering("ours-k0", log), Answering("mlx_vlm", log, fails=True)]
    runs, failed = take_turns(workers, [[1]], 50, 2)
    assert list(runs) == [("ours-k0", "only")] and failed == {"mlx_vlm": "out of memory"}


def test_drafting_counts_by_position() -> None:
    drafting = Drafting()
    drafting.add_round(3, 2)
    drafting.add_round(3, 0, rows=2)
    drafting.add(Drafting(1, 4, 4, [1, 1, 1, 1]))
    assert drafting == Drafting(rounds=4, drafted=13, accepted=6, by_position=[2, 2, 1, 1])
    run = made_run(1.0, [[1, 2, 3, 4, 5], [1, 2, 3, 4]], drafting)
    assert figures.tokens_per_round(run) == 7 / 4


def test_table_tells_what_differs_and_who_is_skipped() -> None:
    runs = {
        ("ours-k3", "stream"): [made_run(30.0, [[1, 2], [3, 4]], Drafting(2, 6, 3, [2, 1, 0]))],
        ("mlx_lm", "batch"): [made_run(20.0, [[1, 2], [3, 9]])],
    }
    summary = figures.summarise(runs)
    rows = figures.table(summary, {"mlx_vlm": "mlx_vlm is not installed"})
    assert rows[1][:6] == ["ours-k3", "30.0", "30.0 to 30.0", "15.0", "1.50", "1.50 to 1.50"]
    assert rows[1][-3:] == ["1.00", "0.50", "2 of 2"]
    assert rows[2][-1] == "1 of 2" and summary["mlx_lm"]["first_difference"] == 1
    text, marked = figures.plain(rows).splitlines(), figures.markdown(rows).splitlines()
    assert text[-1].split() == ["mlx_vlm", "skipped:", "mlx_vlm", "is", "not", "installed"]
    assert len(set(map(len, text[:-1]))) == 1
    assert {line.count("|") for line in marked} == {len(figures.HEADINGS) + 1}


@pytest.mark.parametrize(
    ("name", "drafts"),
    [("ours-k0", 0), ("ours-auto", None), ("mlx_lm", 0), ("mlx_vlm", 3), ("transformers-k5", 5)],
)
def test_names_of_contenders(name: str, drafts: int | None) -> None:
    assert Contender.parse(name).drafts == drafts


@pytest.mark.parametrize("name", ["our-k3", "mlx_lm-k3", "mlx_vlm-auto", "ours-k16", "ours-3"])
def test_wrong_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Contender.parse(name)


@pytest.mark.parametrize("family", list(checkpoints.FAMILIES))
def test_conditional_layout_is_the_same_model(family: str, tmp_path: Path) -> None:
    source, written = tmp_path / "source", tmp_path / "written"
    checkpoints.write_checkpoint(source, family)
    written.mkdir()
    write_conditional(source, written)
    config = ModelConfig.from_dict(read_config(source))
    assert ModelConfig.from_dict(read_config(written)) == config
    names = target_names(config)
    wanted = {name for stored in stored_tensors(source) for name in names.read(stored)[0]}
    stored = mx.load(str(written / "model-00000.safetensors"))
    assert set(stored) == {PREFIX + name for name in wanted}
    assert {name for kept in stored for name in names.read(kept)[0]} == wanted
    embedding = "model.embed_tokens.weight"
    before = mx.load(str(source / "model.safetensors"))[embedding]
    assert mx.array_equal(stored[PREFIX + embedding], before)


def test_conditional_config_names_quantised_modules() -> None:
    fine, usual = {"group_size": 64, "bits": 8}, {"group_size": 64, "bits": 4}
    modules = {"model.a": usual, "model.b": fine, "model.c": usual}
    block = conditional_config(read_config(hub.builtin()), modules)["quantization"]
    assert block == {**usual, **{PREFIX + path: params for path, params in modules.items()}}


def test_stored_bytes_are_the_tensors_bytes() -> None:
    folder = hub.builtin()
    arrays = mx.load(str(folder / "model.safetensors"))
    assert stored_bytes(folder) == sum(array.nbytes for array in arrays.values())
