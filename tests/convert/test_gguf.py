"""A GGUF file reads as the checkpoint it was made from: config, tensors to the bit, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
from mlx_lm import tokenizer_utils
from tokenizers import Tokenizer

from gemma_mtp_mlx import weights
from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.convert.gguf import GgufFile
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import target_names
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.gguf_files import (
    FILE,
    TEXT,
    Choose,
    add_tokenizer,
    dense,
    gemma_tokenizer,
    mostly,
    read_values,
    write_gguf,
)

Edit = Callable[[gguf.GGUFWriter], None]
PACKED = {Type.Q4_0: 4, Type.Q8_0: 8}
# For every family, what llama.cpp calls a matrix and what its parameter is called here.
Q_PROJ = ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj")


def write(folder: Path, family: str, choose: Choose = dense, **options: Any) -> tuple[Path, Any]:
    write_checkpoint(folder, family)
    return write_gguf(folder, choose, **options)


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
    pieces, skipped = weights._assign(file.tensors, names)
    block = weights._quantization_block(file.config)
    found = {} if block is None else weights._quantize(module, file.tensors, pieces, (block, names))
    weights._check(module, weights.Plan(file.tensors, pieces, skipped, found))
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
    kinds = [Type.Q4_0, Type.Q8_0, Type.F16, Type.BF16]

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


def set_value(key: str, value: Any, kind: gguf.GGUFValueType = gguf.GGUFValueType.UINT32) -> Edit:
    def edit(writer: gguf.GGUFWriter) -> None:
        sub = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.ARRAY else None
        writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, kind, sub)

    return edit


def drop_value(key: str) -> Edit:
    return lambda writer: writer.kv_data[0].pop(key)


def drop_tensor(name: str) -> Edit:
    return lambda writer: writer.tensors[0].pop(name)


def add(name: str, shape: tuple[int, ...], kind: Type = Type.F32) -> Edit:
    def edit(writer: gguf.GGUFWriter) -> None:
        values = np.ones(shape, np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    return edit


STRING, ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
FLOAT = gguf.GGUFValueType.FLOAT32
REFUSED: dict[str, tuple[str, Edit, str]] = {
    "mmproj": ("31b", set_value("general.architecture", "clip", STRING), "architecture 'clip'"),
    "drafter": (
        "31b",
        set_value("general.architecture", "gemma4-assistant", STRING),
        "architecture 'gemma4-assistant', expected 'gemma4'; give the file of a Gemma 4 target",
    ),
    "shard": ("31b", set_value("split.count", 3), "llama-gguf-split --merge"),
    "k-quant": (
        "31b",
        add("blk.0.attn_v.bias", (8, 256), Type.Q4_1),
        "tensor blk.0.attn_v.bias is stored as Q4_1, which MLX .* use a Q4_0, Q8_0, F16 or BF16",
    ),
    "packed norm": (
        "31b",
        add("blk.9.attn_norm.weight", (128,), Type.Q8_0),
        "blk.9.attn_norm.weight is packed as Q8_0, expected F32",
    ),
    "packed scale": (
        "26b",
        add("blk.9.ffn_gate_inp.scale", (2, 128), Type.Q8_0),
        "blk.9.ffn_gate_inp.scale is packed as Q8_0, expected F32",
    ),
    "vision": ("31b", add("v.blk.0.ln1.weight", (8,)), "tensor v.blk.0.ln1.weight does not belong"),
    "unknown": ("31b", add("blk.0.attn_sinks", (8,)), "tensor blk.0.attn_sinks does not belong"),
    "fused and split": ("26b", add("blk.0.ffn_up_exps.weight", (8, 64, 128)), "twice"),
    "odd fused": (
        "31b",
        add("blk.0.ffn_gate_up_exps.weight", (8, 63, 128)),
        r"blk.0.ffn_gate_up_exps.weight has shape \[8, 63, 128\]",
    ),
    "flat fused": (
        "31b",
        add("blk.0.ffn_gate_up_exps.weight", (64, 128)),
        r"blk.0.ffn_gate_up_exps.weight has shape \[64, 128\]",
    ),
    "some full layers with values": (
        "31b",
        add("blk.3.attn_v.weight", (64, 128)),
        "attn_v in some of its full layers only",
    ),
    "no rotation": ("31b", drop_tensor("rope_freqs.weight"), "no float32 tensor rope_freqs"),
    "no embedding": ("31b", drop_tensor("token_embd.weight"), "no tensor token_embd.weight"),
    "scaled rotation": (
        "31b",
        set_value("gemma4.rope.scaling.type", "yarn", STRING),
        "says 'yarn' for gemma4.rope.scaling.type, expected none",
    ),
    "part of a sliding head": (
        "31b",
        set_value("gemma4.rope.dimension_count_swa", 8),
        "says 8 for gemma4.rope.dimension_count_swa, expected the length of a head",
    ),
    "no layers": ("31b", drop_value("gemma4.block_count"), "says nothing for gemma4.block_count"),
    "countless layers": (
        "31b",
        set_value("gemma4.block_count", 2**32 - 1),
        "says 4294967295 for gemma4.block_count, expected no more than its",
    ),
    "too few layers": (
        "31b",
        set_value("gemma4.block_count", 7),
        "attention.sliding_window_pattern, expected 7 whole numbers",
    ),
    "period": (
        "31b",
        set_value("gemma4.attention.sliding_window_pattern", 6),
        "says 6 for gemma4.attention.sliding_window_pattern, expected layers of both kinds",
    ),
    "odd key heads": (
        "31b",
        set_value("gemma4.attention.head_count_kv", [4, 4, 2, 2, 4, 4, 4, 2], ARRAY),
        "head_count_kv, expected one number for each kind of layer",
    ),
    "key heads by kind": (
        "e4b",
        set_value("gemma4.attention.head_count_kv", [2, 2, 1, 2, 2, 1, 2, 2, 1], ARRAY),
        "head_count_kv, expected one number where full layers have values",
    ),
    "odd heads": (
        "31b",
        set_value("gemma4.attention.head_count", [8] * 7 + [4], ARRAY),
        "head_count, expected the same number in every layer",
    ),
    "odd widths": (
        "e2b",
        set_value("gemma4.feed_forward_length", [192] * 9 + [384], ARRAY),
        "feed_forward_length, expected one width, doubled where keys are shared",
    ),
    "all shared": ("31b", set_value("gemma4.attention.shared_kv_layers", 8), "shared_kv_layers"),
    "values of another length": (
        "31b",
        set_value("gemma4.attention.value_length_swa", 32),
        "says 32 for gemma4.attention.value_length_swa, expected 16, as for keys",
    ),
    "no epsilon": (
        "31b",
        set_value("gemma4.attention.layer_norm_rms_epsilon", 0.0, FLOAT),
        "layer_norm_rms_epsilon, expected a positive number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_target_is_refused(tmp_path: Path, case: str) -> None:
    family, edit, message = REFUSED[case]
    path, _ = write(tmp_path, family, edit=edit)
    with pytest.raises(ValueError, match=message) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "divisors, message",
    [
        ([1, 1, 2, 2] + [1e30] * 12, "scales positions"),
        ([1e30, 1] + [1e30] * 14, "not that of a Gemma 4"),
        ([1] * 8, "not that of a Gemma 4"),
    ],
)
def test_another_rotation_is_refused(tmp_path: Path, divisors: list[float], message: str) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        del writer.tensors[0]["rope_freqs.weight"]
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))

    path, _ = write(tmp_path, "31b", edit=edit)
    with pytest.raises(ValueError, match=message):
        GgufFile(path)


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenized")
    write(folder, "12b", edit=add_tokenizer)
    return folder / FILE


TEXTS = [
    TEXT,
    " leading and  double spaces ",
    "<|turn>user\nsmall<turn|>\n<|channel>thought<channel|>",
    "b<b>b <b> <eos></eos>",
    "nothing learned: ÄÖ 漢字 🙂\x00▁",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_the_same(tokenized: Path, text: str) -> None:
    made = GgufFile(tokenized).companion_files()["tokenizer.json"]
    tokenizer = Tokenizer.from_str(made.decode())
    original = Tokenizer.from_str(json.dumps(gemma_tokenizer()))
    ids = original.encode(text).ids
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids[1:]
    for skip in (True, False):
        want = original.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == want


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("smal textw\n▁<>bé") | st.characters(codec="utf-8")))
def test_any_text_has_the_same_tokens(tokenized: Path, text: str) -> None:
    made = GgufFile(tokenized).companion_files()["tokenizer.json"]
    tokenizer = Tokenizer.from_str(made.decode())
    original = Tokenizer.from_str(json.dumps(gemma_tokenizer()))
    assert tokenizer.encode(text).ids == original.encode(text).ids


def test_tokenizer_json_is_gemmas(tokenized: Path) -> None:
    made = json.loads(GgufFile(tokenized).companion_files()["tokenizer.json"])
    want = gemma_tokenizer()
    assert made.keys() == want.keys()
    for name in want:
        assert made[name] == want[name], name


def test_mlx_lm_loads_the_companion_files(tokenized: Path, tmp_path: Path) -> None:
    file = GgufFile(tokenized)
    for name, content in file.companion_files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(file.config))
    tokenizer = tokenizer_utils.load(tmp_path)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "small"}])
    original = Tokenizer.from_str(json.dumps(gemma_tokenizer()))
    assert list(ids) == original.encode("<|turn>small<turn|>").ids
    assert tokenizer.bos_token == "<bos>" and tokenizer.eos_token == "<turn|>"
    assert tokenizer.decode(original.encode(TEXT).ids, skip_special_tokens=True) == TEXT
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 2,
        "eos_token_id": [1, 6],
        "pad_token_id": 0,
        "top_p": 0.95,
    }
    assert file.config["eos_token_id"] == [1, 6]


BAD_TOKENIZERS: dict[str, tuple[Edit, str]] = {
    "none": (lambda writer: None, "its tokenizer.ggml.model is 'None', expected 'gemma4'"),
    "another": (set_value("tokenizer.ggml.model", "llama", STRING), "model is 'llama'"),
    "merges": (drop_value("tokenizer.ggml.merges"), "it has no tokenizer.ggml.merges"),
    "kinds": (drop_value("tokenizer.ggml.token_type"), "token_type is not one number per token"),
    "bos": (drop_value("tokenizer.ggml.bos_token_id"), "it names no bos or no unknown token"),
    "far bos": (set_value("tokenizer.ggml.bos_token_id", 10**6), "it names no bos or no unknown"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path, case: str) -> None:
    change, message = BAD_TOKENIZERS[case]

    def edit(writer: gguf.GGUFWriter) -> None:
        if case != "none":
            add_tokenizer(writer)
        change(writer)

    file = GgufFile(write(tmp_path, "31b", edit=edit)[0])
    with pytest.raises(ValueError, match=message) as caught:
        file.companion_files()
    assert "take tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tokens, merges, message",
    [
        (["<bos>", "<unk>", "a", "a"], ["a a"], "names a token twice"),
        (["<bos>", "<unk>", "a", "b"], ["a b"], "its tokens and merges do not fit"),
        (["<bos>", "<unk>", "a", "b"], ["a\nb"], "its tokens and merges do not fit"),
    ],
)
def test_merges_that_do_not_fit_are_refused(
    tmp_path: Path, tokens: list[str], merges: list[str], message: str
) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gemma4")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 2, 1, 1])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_unk_token_id(1)

    path, _ = write(tmp_path, "31b", edit=edit)
    with pytest.raises(ValueError, match=message) as caught:
        GgufFile(path).companion_files()
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path)
