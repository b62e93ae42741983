"""What a model takes and reads, against sums written out by hand and what is really allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from gemma_mtp_mlx import footprint, load
from gemma_mtp_mlx.cache import Cache, seat_size
from gemma_mtp_mlx.checkpoint import Folder, Stored, read_config
from gemma_mtp_mlx.config import DrafterConfig, ModelConfig
from gemma_mtp_mlx.convert import Quantization
from gemma_mtp_mlx.convert.plan import plan_drafter, plan_target
from gemma_mtp_mlx.convert.recipe import DRAFTER, default_recipe
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.families import TEXTS
from gemma_mtp_mlx.families import drafter_config as published_drafter
from gemma_mtp_mlx.families import target_config as published_target
from gemma_mtp_mlx.inspection import converted_bytes
from gemma_mtp_mlx.memory import RESERVED, check_room
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import drafter_names, target_names
from gemma_mtp_mlx.weights import Plan, plan_weights
from tests.checkpoints import FAMILIES, write_pair
from tests.families import ORDERED, WINDOW

GIB = 1 << 30
BF16 = 2  # bytes of a weight


class Shapes:
    """A checkpoint that is nothing but the shapes of a module's parameters, in bfloat16."""

    dtype: str | None = None
    files: tuple[Path, ...] = ()

    def __init__(self, module: Target | Drafter) -> None:
        self.config: dict[str, Any] = {}
        parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
        self.tensors = {
            name: Stored(Path("x"), "I64" if value.dtype == mx.int32 else "BF16", value.shape)
            for name, value in parameters.items()
        }

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        raise AssertionError("weights are not read")


class Pair:
    """A target and its drafter, their plans and what they take."""

    def __init__(self, target: ModelConfig, drafter: DrafterConfig, plans: tuple[Plan, Plan]):
        self.target, self.drafter, self.plans = target, drafter, plans
        self.of_target = footprint.target_footprint(target, plans[0])
        self.of_drafter = footprint.drafter_footprint(drafter, plans[1])


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp(family), family, dtype="bfloat16")


@pytest.fixture(scope="module")
def tiny(folders: tuple[Path, Path]) -> Pair:
    target = ModelConfig.from_dict(read_config(folders[0]))
    drafter = DrafterConfig.from_dict(read_config(folders[1]))
    plans = (
        plan_weights(Target(target), Folder(folders[0]), target_names(target)),
        plan_weights(Drafter(drafter), Folder(folders[1]), drafter_names()),
    )
    return Pair(target, drafter, plans)


def published(model: str) -> Pair:
    target, drafter = published_target(model), published_drafter(model)
    modules = Target(target), Drafter(drafter)
    names = target_names(target), drafter_names()
    plans = [plan_weights(m, Shapes(m), n) for m, n in zip(modules, names, strict=True)]
    return Pair(target, drafter, (plans[0], plans[1]))


def data_bytes(folder: Path) -> int:
    """Bytes of tensors in a folder's one file: all of it but its header."""
    content = (folder / "model.safetensors").read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the names of a folder's tensors and their bytes, as the files have them."""
    for name, stored in Folder(folder).tensors.items():
        yield name, math.prod(stored.shape) * BF16


def test_the_weights_are_the_file(family: str, folders: tuple[Path, Path], tiny: Pair) -> None:
    assert tiny.of_target.weights_bytes == data_bytes(folders[0]) == tiny.plans[0].nbytes
    ids = tiny.drafter.text.vocab_size if family in ORDERED else 0
    assert tiny.of_drafter.weights_bytes == data_bytes(folders[1]) - 4 * ids  # held as int32
    assert tiny.of_target.bits == 16
    for of in (tiny.of_target, tiny.of_drafter):
        assert sum(group.nbytes for group in of.groups) == of.weights_bytes
        assert {group.formats for group in of.groups} <= {("bfloat16",), ("bfloat16", "int32")}


def test_the_groups_are_what_their_names_say(folders: tuple[Path, Path], tiny: Pair) -> None:
    parts = {
        "attention": "self_attn.",
        "MLP": "mlp.",
        "experts": "experts.",
        "router": "router.",
        "per-layer embeddings": "embed_tokens_per_layer.",
        "embeddings and head": "embed_tokens.",
    }
    found = {group.name: group.nbytes for group in tiny.of_target.groups}
    for group, part in parts.items():
        wanted = sum(size for name, size in sizes(folders[0]) if part in name)
        assert found.get(group, 0) == wanted, group


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_a_pass_reads_what_its_tokens_need(
    folders: tuple[Path, Path], tiny: Pair, tokens: int
) -> None:
    """By hand: every tensor, but a row a token of tables and as many experts as are expected."""
    config, read = tiny.target, 0.0
    for name, size in sizes(folders[0]):
        if "embed_tokens_per_layer" in name:
            read += tokens * size / config.vocab_size_per_layer_input
        elif ".experts." in name:
            one_misses = 1 - config.top_k_experts / config.num_experts
            read += size * (1 - one_misses**tokens)
        else:
            read += size
        if "embed_tokens.weight" in name:
            read += tokens * size / config.vocab_size
    assert tiny.of_target.reads.pass_bytes(tokens) == pytest.approx(read, rel=1e-12)


def test_one_token_reads_top_k_experts() -> None:
    assert footprint.distinct(128, 8, 1) == pytest.approx(8)
    assert footprint.distinct(128, 8, 1000) == pytest.approx(128)
    assert [round(footprint.distinct(128, 8, n)) for n in (4, 8, 16, 32)] == [29, 52, 82, 112]
    assert footprint.distinct(0, 0, 5) == 0


def test_a_draft_step_reads_the_clusters_it_looks_into(
    family: str, folders: tuple[Path, Path], tiny: Pair
) -> None:
    config, read = tiny.drafter, 0.0
    looked = config.centroid_intermediate_top_k / config.num_centroids
    for name, size in sizes(folders[1]):
        if "token_ordering" in name:
            read += config.text.vocab_size * 4 * looked
        elif "embed_tokens" in name and family in ORDERED:
            read += size * looked
        else:
            read += size
    assert tiny.of_drafter.reads.pass_bytes(1) == pytest.approx(read, rel=1e-12)


def test_a_round_is_its_steps_and_its_pass(tiny: Pair) -> None:
    row = footprint.embedding_row_bytes(tiny.target, tiny.of_target)
    assert row == tiny.target.hidden_size * BF16
    target, drafter = tiny.of_target, tiny.of_drafter
    plain = footprint.round_bytes(target, None, row, 4, 0)
    assert plain == target.reads.pass_bytes(4)
    step = drafter.reads.pass_bytes(4) + 4 * row
    got = footprint.round_bytes(target, drafter, row, 4, 3)
    assert got == target.reads.pass_bytes(16) + 3 * step


@pytest.mark.parametrize("rows, context", [(1, 5), (4, 100), (8, 300)])
def test_keys_and_values_are_what_a_cache_allocates(tiny: Pair, rows: int, context: int) -> None:
    room = footprint.room(tiny.target, mx.bfloat16, GIB, 0)
    cache = Cache(tiny.target, rows, rows * seat_size(context), mx.bfloat16)
    assert room.kv_bytes(rows, context) == cache.nbytes
    assert room.needed_bytes(rows, context) == cache.nbytes + RESERVED


@pytest.mark.parametrize("context", [3, WINDOW, WINDOW + 1, 200])
def test_keys_and_values_read_are_what_each_layer_sees(tiny: Pair, context: int) -> None:
    storage = Cache(tiny.target, 1, seat_size(context), mx.bfloat16).storage
    read = drafted = 0
    for layer in tiny.target.layers:  # a layer that shares reads its owner's
        heads, _, dim = storage[layer.kv_source].shape
        read += heads * dim * BF16 * (min(context, WINDOW) if layer.sliding else context)
    for own in tiny.drafter.text.layers:
        heads, _, dim = storage[tiny.target.last_owner(sliding=own.sliding).index].shape
        drafted += heads * dim * BF16 * (min(context, WINDOW + 1) if own.sliding else context)
    assert footprint.kv_read_bytes(tiny.target, mx.bfloat16, context) == read
    got = footprint.drafter_kv_read_bytes(tiny.drafter, tiny.target, mx.bfloat16, context)
    assert got == drafted


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_the_largest_context_fits_and_no_larger_one(tiny: Pair, rows: int) -> None:
    memory = RESERVED + 10_000_000 + footprint.room(tiny.target, mx.bfloat16, 0, 0).kv_bytes(8, 777)
    room = footprint.room(tiny.target, mx.bfloat16, memory, 9_000_000, 1_000_000)
    most = room.largest_context(rows)
    assert most >= 777
    assert room.spare_bytes(rows, most) >= 0
    assert most == room.longest or room.spare_bytes(rows, most + 1) < 0
    assert rows < 8 or most == 777
    assert footprint.room(tiny.target, mx.bfloat16, RESERVED, 0).largest_context(rows) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_counted_with_their_scales(
    tmp_path: Path, folders: tuple[Path, Path], bits: int
) -> None:
    """Groups of 64 with a scale and a bias of 16 bits each take half a bit more."""
    from gemma_mtp_mlx.convert import convert

    convert(str(folders[0]), tmp_path / "q", quantization=Quantization("affine", bits, 64))
    config = ModelConfig.from_dict(read_config(tmp_path / "q"))
    plan = plan_weights(Target(config), Folder(tmp_path / "q"), target_names(config))
    of = footprint.target_footprint(config, plan)
    assert of.weights_bytes == data_bytes(tmp_path / "q")
    groups = {group.name: group for group in of.groups}
    assert groups["MLP"].bits == bits + 0.5
    assert groups["MLP"].formats == (f"affine {bits}-bit, groups of 64",)
    assert groups["embeddings and head"].bits == 8.5
    plain = plan_weights(Target(config), Folder(folders[0]), target_names(config))
    before = {g.name: g.weights for g in footprint.target_footprint(config, plain).groups}
    assert {name: group.weights for name, group in groups.items()} == before


def test_the_size_after_conversion_is_what_convert_plans(
    family: str, folders: tuple[Path, Path], tiny: Pair
) -> None:
    ordered = family in ORDERED
    rules = default_recipe(Quantization(), centroid_head=ordered)
    target = plan_target(str(folders[0]), None)
    drafter = plan_drafter(str(folders[1]), target, None)
    for made, plan, folder in ((target, tiny.plans[0], ""), (drafter, tiny.plans[1], DRAFTER)):
        parts = made.with_rules(rules).parts
        wanted = sum(output.nbytes for part in parts for output in part.outputs)
        assert converted_bytes(plan, folder, centroid_head=ordered) == wanted


@pytest.mark.parametrize(
    "model, gb, drafter_gb",
    [
        # Published parameter counts, of text models: 5.1, 8, 11.9, 25.2 and 30.7 billion.
        ("E2B", (9, 10.5), (0.15, 0.17)),
        ("E4B", (14.5, 16), (0.15, 0.17)),
        ("12B", (23, 25), (0.8, 0.9)),
        ("26B-A4B", (49, 53), (0.8, 0.9)),
        ("31B", (60, 63), (0.9, 1.0)),
    ],
)
def test_published_sizes(
    model: str, gb: tuple[float, float], drafter_gb: tuple[float, float]
) -> None:
    pair = published(model)
    assert footprint.size_name(pair.target) == model
    assert footprint.drafter_size_name(pair.drafter) == model
    assert gb[0] < pair.of_target.weights_bytes / 1e9 < gb[1]
    assert drafter_gb[0] < pair.of_drafter.weights_bytes / 1e9 < drafter_gb[1]


def test_published_sizes_have_names() -> None:
    assert {footprint.size_name(published_target(model)) for model in TEXTS} == set(TEXTS)


def test_a_token_of_the_mixture_reads_a_fraction_of_it() -> None:
    """3.8 billion weights are active, of 25 billion."""
    read = published("26B-A4B").of_target.reads.pass_bytes(1)
    assert 3.7e9 * BF16 < read < 3.9e9 * BF16


def test_load_refuses_what_the_device_cannot_hold(
    folders: tuple[Path, Path], tiny: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tiny.plans[0].nbytes + tiny.plans[1].nbytes
    limit = RESERVED + both
    monkeypatch.setattr("gemma_mtp_mlx.memory.device_bytes", lambda: limit)
    load(*folders)
    limit -= 1
    monkeypatch.setattr("gemma_mtp_mlx.api.fill", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"weights take .* GB.*--q-bits 4.*inspect"):
        load(*folders)
    limit = RESERVED + tiny.plans[0].nbytes - 1
    with pytest.raises(ValueError, match="weights take"):
        load(folders[0], None)


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_mtp_mlx.memory.device_bytes", lambda: RESERVED + 10)
    check_room(10)
    with pytest.raises(ValueError, match="smaller model"):
        check_room(11)
