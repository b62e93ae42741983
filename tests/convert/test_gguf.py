"""A GGUF file reads as the checkpoint it was made from: config, tensors to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp_mlx import weights
from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.convert.gguf import GgufFile
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import target_names
from tests.checkpoints import FAMILIES
from tests.gguf_files import mostly, read_values, write

PACKED = {Type.Q4_0: 4, Type.Q4_1: 4, Type.Q8_0: 8}
# For every family, what llama.cpp calls a matrix and what its parameter is called here.
Q_PROJ = ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj")


def whole(file: GgufFile, name: str) -> np.ndarray:
    """Return a tensor in its shape, as float32 or as the integers it holds."""
    shape = file.tensors[name].shape
    value = file.rows(name, 0, int(np.prod(shape[:-1])))
    kind = {"U32": mx.uint32, "F16": mx.float16, "F32": mx.float32, "BF16": mx.bfloat16}
    assert value.dtype == kind[file.tensors[name].dtype]
    if value.dtype != mx.uint32:
        value = value.astype(mx.float32)
    return np.array(value).reshape(shape)


def unpacked(file: GgufFile, module: str, bits: int) -> np.ndarray:
    """Return scale * code + bias in float32, with codes taken from the words lowest first."""
    words = whole(file, f"{module}.weight")
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts & (2**bits - 1)).reshape(*words.shape[:-1], -1, 32)
    scales, biases = (whole(file, f"{module}.{name}")[..., None] for name in ("scales", "biases"))
    value = scales * codes.astype(np.float32) + biases
    assert value.dtype == np.float32
    return value.reshape(*words.shape[:-1], -1)


def value_of(file: GgufFile, name: str) -> np.ndarray:
    """Return a parameter's values by its published name, whatever they are stored as."""
    module = name.removesuffix(".weight")
    if f"{module}.scales" not in file.tensors:
        return whole(file, name)
    bits = file.config["quantization"].get(module, file.config["quantization"])["bits"]
    value = unpacked(file, module, bits)
    words, scales, biases = (
        file.rows(f"{module}.{part}", 0, value.size // value.shape[-1])
        for part in ("weight", "scales", "biases")
    )
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    mlx = mx.dequantize(words, scales, biases, group_size=32, bits=bits)
    assert np.array_equal(np.array(mlx).reshape(value.shape), value)
    return value


def assert_same(file: GgufFile, meant: dict[str, np.ndarray]) -> None:
    """Compare with what the writer's tensors mean, by the names gguf's own table gives them."""
    layers = file.config["num_hidden_layers"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, layers)
    seen = set()
    for name in file.tensors:
        if name.endswith((".scales", ".biases")):
            continue
        layer = name.split(".")[2] if "layers" in name else ""
        special = {
            "router.scale": f"blk.{layer}.ffn_gate_inp.scale",
            "per_expert_scale": f"blk.{layer}.ffn_down_exps.scale",
        }
        found = next((theirs for end, theirs in special.items() if name.endswith(end)), None)
        part: slice = slice(None)
        if ".switch_glu." in name:
            kind = name.split(".")[-2].removesuffix("_proj")
            found = f"blk.{layer}.ffn_{kind}_exps.weight"
            if found not in meant:
                found = f"blk.{layer}.ffn_gate_up_exps.weight"
                half = meant[found].shape[1] // 2
                part = slice(None, half) if kind == "gate" else slice(half, None)
        if found is None:
            found = f"{table.get_name(name.removesuffix('.weight'))}.weight"
        want = meant[found][:, part] if part != slice(None) else meant[found]
        assert np.array_equal(value_of(file, name), want), name
        seen.add(found)
    assert seen == meant.keys()


def assert_loads(file: GgufFile) -> None:
    """Plan a load as weights.plan_weights does: every parameter is there, with its kind."""
    config = ModelConfig.from_dict(file.config)
    module, names = Target(config), target_names(config)
    found = weights.plan_weights(module, file, names).quantization
    scales = {name for name in file.tensors if name.endswith(".scales")}
    assert found.keys() == {name.removesuffix(".scales") for name in scales}


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, *PACKED, Type.Q6_K])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_comes_back(tmp_path: Path, family: str, kind: Type) -> None:
    path, meant = write(tmp_path, family, mostly(kind))
    file = GgufFile(path)
    original = ModelConfig.from_dict(read_config(tmp_path))
    if not original.hidden_size_per_layer_input:
        original = replace(original, vocab_size_per_layer_input=0)
    assert ModelConfig.from_dict(file.config) == original
    assert file.config["model_type"] == "gemma4_text"
    assert ("quantization" in file.config) == (kind in PACKED)
    assert_loads(file)
    assert_same(file, meant)
    stored = {stored.dtype for stored in file.tensors.values()}
    if kind in PACKED:
        assert stored == {"F32", "U32", "F16"}
        module = Q_PROJ[1]
        said = file.config["quantization"].get(module, file.config["quantization"])
        assert (said["bits"], said["group_size"], said["mode"]) == (PACKED[kind], 32, "affine")


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_the_source(tmp_path: Path, family: str) -> None:
    file = GgufFile(write(tmp_path, family)[0])
    for name, want in read_values(tmp_path).items():
        if name.endswith("experts.gate_up_proj"):
            for half, part in zip(np.split(want, 2, axis=1), ("gate", "up"), strict=True):
                ours = name.replace("gate_up_proj", f"switch_glu.{part}_proj.weight")
                assert np.array_equal(whole(file, ours), half), ours
            continue
        name = name.replace("experts.down_proj", "experts.switch_glu.down_proj.weight")
        assert np.array_equal(whole(file, name), want), name


def test_six_bits_are_exact_in_float32(tmp_path: Path) -> None:
    path, meant = write(tmp_path, "31b", mostly(Type.Q6_K))
    name = "model.layers.3.self_attn.o_proj.weight"  # its rows are one block
    file = GgufFile(path)
    assert file._sources[name].entry.type == Type.Q6_K
    assert file.tensors[name].dtype == "F32" and "quantization" not in file.config
    want = meant["blk.3.attn_output.weight"]
    assert len(np.unique(want)) > 1000  # any bytes: every field of a block is used
    assert np.array_equal(whole(file, name), want)


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_0, Type.Q8_0])
def test_experts_may_be_split(tmp_path: Path, kind: Type) -> None:
    fused = GgufFile(write(tmp_path / "fused", "26b", mostly(kind))[0])
    path, meant = write(tmp_path / "split", "26b", mostly(kind), split_experts=True)
    split = GgufFile(path)
    assert_same(split, meant)
    assert {n: s.shape for n, s in split.tensors.items()} == {
        n: s.shape for n, s in fused.tensors.items()
    }
    for name in split.tensors:
        assert np.array_equal(whole(split, name), whole(fused, name)), name


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    """A mixture-of-experts file with every type that is read."""
    kinds = [Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.F16, Type.BF16]

    def choose(name: str, value: np.ndarray) -> Type:
        return mostly(kinds[len(name) % len(kinds)])(name, value)

    return GgufFile(write(tmp_path_factory.mktemp("mixed"), "26b", choose)[0])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_span_is_the_slice_of_the_whole(mixed: GgufFile, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(mixed.tensors)))
    rows = whole(mixed, name).reshape(-1, mixed.tensors[name].shape[-1])
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    span = mixed.rows(name, start, stop)
    if span.dtype != mx.uint32:
        span = span.astype(mx.float32)
    assert np.array_equal(np.array(span), rows[start:stop])


@pytest.mark.parametrize(
    "name, start, stop, nbytes",
    [
        ("model.embed_tokens.weight", 3, 5, 2 * 128 // 32 * 18),
        ("model.embed_tokens.scales", 127, 128, 128 // 32 * 18),
        ("model.layers.1.experts.switch_glu.up_proj.weight", 60, 70, 10 * 128 // 32 * 18),
        ("model.norm.weight", 0, 1, 128 * 4),
    ],
)
def test_only_the_rows_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    start: int,
    stop: int,
    nbytes: int,
) -> None:
    file = GgufFile(write(tmp_path, "26b", mostly(Type.Q4_0))[0])
    read: list[int] = []

    class Counted:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *why: object) -> None:
            self.stream.close()

        def seek(self, position: int) -> None:
            self.stream.seek(position)

        def read(self, count: int) -> bytes:
            read.append(count)
            return bytes(self.stream.read(count))

    original = Path.open
    monkeypatch.setattr(Path, "open", lambda *args: Counted(original(*args)))
    assert file.rows(name, start, stop).shape[0] == stop - start
    assert sum(read) == nbytes


def test_a_file_that_shrank_is_noticed(tmp_path: Path) -> None:
    path, _ = write(tmp_path, "31b")
    file = GgufFile(path)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)
    last = max(file.tensors, key=lambda name: file._sources[name].entry.start)
    with pytest.raises(ValueError, match="damaged or incomplete: it ends within"):
        file.rows(last, 0, 1)
