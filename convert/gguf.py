"""A GGUF file of a Gemma 4 target, presented as the checkpoint it was made from.

llama.cpp renames the tensors and changes no value on the way: norms are stored as they are (its
Gemma 3 adds 1, Gemma 4 does not), q and k are not permuted, the router's scales are not multiplied
into anything, and per-layer embeddings keep transformers' shape [V, N * width]. So names and
packing are all there is to undo. Q4_0, Q4_1 and Q8_0 are the affine packing of MLX with 4 and 8
bits and 32 weights per scale; only Q4_1 stores its biases, the others' are -8 and -128 times the
scale. Not a bit changes. Q6_K, in which Google stores embeddings, has 16 weights per scale, which
MLX cannot pack: it becomes float32, exactly.
Source: llama.cpp, conversion/gemma.py (Gemma4Model), gguf-py/gguf/tensor_mapping.py,
src/models/gemma4.cpp, ggml/src/ggml-common.h (blocks) and ggml-quants.c (dequantize_row_*).
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from gemma_mtp_mlx.checkpoint import Stored
from gemma_mtp_mlx.convert.gguf_config import ARCHITECTURE, text_config
from gemma_mtp_mlx.convert.gguf_header import READ, Entry, damaged, read_header, type_name
from gemma_mtp_mlx.convert.gguf_tokenizer import companion_files, token_ids

_F32, _F16, _Q4_0, _Q4_1, _Q8_0, _Q6_K, _BF16 = READ
_BITS = {_Q4_0: 4, _Q4_1: 4, _Q8_0: 8}
_DENSE = {_F32: "F32", _F16: "F16", _BF16: "BF16", _Q6_K: "F32"}
_GROUP = 32
_ROPE_FREQS = "rope_freqs.weight"
_WHOLE = {
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "token_embd.weight": "model.embed_tokens.weight",
}
_EXPERTS = "experts.switch_glu"
_LAYER = {
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_down_exps.weight": f"{_EXPERTS}.down_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_gate_exps.weight": f"{_EXPERTS}.gate_proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_up_exps.weight": f"{_EXPERTS}.up_proj.weight",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "layer_output_scale.weight": "layer_scalar",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "proj.weight": "per_layer_projection.weight",
}
_FUSED = ("ffn_gate_up_exps.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight"))


class _Source(NamedTuple):
    """Where a tensor comes from: one of the file's, or a part of its second last axis.

    what: "values", or of a packed tensor "codes", "scales" or "biases".
    """

    entry: Entry
    what: str
    part: int
    parts: int


class GgufFile:
    """A checked file, none of its weights read.

    config: config.json in the published, flat layout, with MLX's "quantization" if tensors are
    packed. tensors: by the names that `tensor_names.target_names` reads; shapes are MLX's. dtype:
    norms are stored in float32, whatever the model's type was.
    """

    dtype: str | None = "bfloat16"

    def __init__(self, path: Path) -> None:
        """Raises: ValueError naming the file for anything but a whole, unsplit Gemma 4 target."""
        self.tensors: dict[str, Stored] = {}
        self._file = path
        self.files: tuple[Path, ...] = (path,)
        self._sources: dict[str, _Source] = {}
        self._metadata, entries = read_header(path)
        _check_kind(path, self._metadata)
        quantization: dict[str, Any] = {"group_size": _GROUP, "bits": 4, "mode": "affine"}
        for name, entry in entries.items():
            if entry.type not in READ:
                raise ValueError(
                    f"{path}: tensor {name} is stored as {type_name(entry.type)}, which is not "
                    "read; use a Q4_0, Q8_0, F16 or BF16 file of the model"
                )
            if name == _ROPE_FREQS:
                continue
            names = _published(path, name)
            for part, ours in enumerate(names):
                self._add(name, ours, _Source(entry, "values", part, len(names)))
                if entry.type == _Q8_0:
                    module = ours.removesuffix(".weight")
                    quantization[module] = {"group_size": _GROUP, "bits": 8, "mode": "affine"}
        self.config = text_config(path, self._metadata, entries, self._divisors(entries))
        self.config.update(token_ids(self._metadata))
        if any(source.what == "codes" for source in self._sources.values()):
            self.config["quantization"] = quantization

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Return rows start to stop of a tensor, seen as [product of leading axes, last axis].

        A vector is one row. Reads the bytes of these rows and nothing else.
        Raises: ValueError if the file is shorter than it was when it was opened.
        """
        source = self._sources[name]
        entry, parts = source.entry, source.parts
        count = math.prod(entry.shape[:-1]) // parts
        assert 0 <= start < stop <= count, f"rows {start} to {stop} of {count}"
        run = count if parts == 1 else entry.shape[-2] // parts
        data = bytearray()
        with self._file.open("rb") as stream:
            while start < stop:
                block, row = divmod(start, run)
                many = min(run - row, stop - start)
                first = (block * parts + source.part) * run + row
                stream.seek(entry.start + first * entry.row_bytes)
                piece = stream.read(many * entry.row_bytes)
                if len(piece) != many * entry.row_bytes:
                    raise damaged(self._file, f"it ends within {name}")
                data += piece
                start += many
        return _decode(source, data)

    def companion_files(self) -> dict[str, bytes]:
        """Return tokenizer.json, tokenizer_config.json and generation_config.json.

        Raises: ValueError if the file has no tokenizer, or not Gemma 4's kind.
        """
        return companion_files(self._file, self._metadata)

    def _add(self, name: str, ours: str, source: _Source) -> None:
        *leading, width = source.entry.shape
        if source.parts > 1:
            if len(leading) < 2 or leading[-1] % source.parts:
                raise damaged(self._file, f"tensor {name} has shape {[*leading, width]}")
            leading[-1] //= source.parts
        bits = _BITS.get(source.entry.type)
        if bits is None:
            dtype = _DENSE[source.entry.type]
            self._store(ours, source, dtype, (*leading, width))
            return
        if not leading or not ours.endswith(".weight"):
            raise ValueError(
                f"{self._file}: tensor {name} is packed as {type_name(source.entry.type)}, expected"
                " F32; convert the model again with a current llama.cpp"
            )
        module, groups = ours.removesuffix(".weight"), width // _GROUP
        self._store(ours, source._replace(what="codes"), "U32", (*leading, width * bits // 32))
        for what in ("scales", "biases"):
            named = f"{module}.{what}"
            self._store(named, source._replace(what=what), "F16", (*leading, groups))

    def _store(self, ours: str, source: _Source, dtype: str, shape: tuple[int, ...]) -> None:
        if ours in self.tensors:
            raise ValueError(f"{self._file} holds {ours} twice, fused and split; it is damaged")
        self.tensors[ours] = Stored(file=self._file, dtype=dtype, shape=shape)
        self._sources[ours] = source

    def _divisors(self, entries: dict[str, Entry]) -> np.ndarray[Any, Any]:
        entry = entries.get(_ROPE_FREQS)
        if entry is None or entry.type != _F32 or len(entry.shape) > 1:
            raise ValueError(
                f"{self._file} has no float32 tensor {_ROPE_FREQS}, without which the rotation of "
                "full layers is unknown; convert the model again with a current llama.cpp"
            )
        with self._file.open("rb") as stream:
            stream.seek(entry.start)
            return np.frombuffer(stream.read(entry.nbytes), "<f4")


def _check_kind(file: Path, metadata: dict[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{file} has general.architecture {str(architecture)[:40]!r}, expected "
            f"{ARCHITECTURE!r}; give the file of a Gemma 4 target, not its mmproj or mtp file"
        )
    count = metadata.get("split.count", 1)
    if type(count) is not int or count > 1:
        raise ValueError(
            f"{file} is one of several parts; join them: llama-gguf-split --merge FIRST OUT"
        )


def _published(file: Path, name: str) -> tuple[str, ...]:
    """Return what a tensor of llama.cpp is called here; a fused one holds two of ours."""
    if name in _WHOLE:
        return (_WHOLE[name],)
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    layer, rest = match.groups() if match else ("", name)
    held = _FUSED[1] if rest == _FUSED[0] else (rest,)
    if not match or not all(item in _LAYER for item in held):
        raise ValueError(
            f"{file}: tensor {name} does not belong in a Gemma 4 target; is it another model's?"
        )
    return tuple(f"model.layers.{layer}.{_LAYER[item]}" for item in held)


def _decode(source: _Source, data: bytearray) -> mx.array:
    """Return whole rows' bytes as an array [rows, last axis] of what the source says.

    What overflows or is not a number stays so: whoever checks the values names the tensor.
    """
    kind, width = source.entry.type, source.entry.shape[-1]
    with np.errstate(over="ignore", invalid="ignore"):
        if kind in _BITS:
            return mx.array(_packed(source, data).reshape(-1, width // _GROUP * _words(source)))
        if kind == _Q6_K:
            return mx.array(_six_bits(data).reshape(-1, width))
    values = np.frombuffer(data, {_F32: "<f4", _F16: "<f2", _BF16: "<u2"}[kind])
    array = mx.array(values.reshape(-1, width))
    return array.view(mx.bfloat16) if kind == _BF16 else array


def _words(source: _Source) -> int:
    """Return how many numbers a packed tensor has per group."""
    return _BITS[source.entry.type] * _GROUP // 32 if source.what == "codes" else 1


def _packed(source: _Source, data: bytearray) -> np.ndarray[Any, Any]:
    """Return one of the three tensors of MLX's packing, [blocks, numbers].

    A block is its scale, in Q4_1 also its bias, both float16, and then its codes.
    """
    kind = source.entry.type
    blocks = np.frombuffer(data, np.uint8).reshape(-1, READ[kind].nbytes)
    split = 4 if kind == _Q4_1 else 2
    floats, codes = blocks[:, :split].copy().view("<f2"), blocks[:, split:]
    if source.what == "scales":
        return floats[:, :1]
    if source.what == "biases":
        return floats[:, 1:] if kind == _Q4_1 else floats * np.float16(-(2 ** _BITS[kind] // 2))
    if kind == _Q8_0:  # signed to counted from -128
        codes = codes ^ np.uint8(0x80)
    else:  # low halves are weights 0 to 15, high halves 16 to 31: put neighbours together
        ordered = np.concatenate([codes & 15, codes >> 4], axis=-1)
        codes = ordered[:, 0::2] | ordered[:, 1::2] << 4
    return np.ascontiguousarray(codes).view("<u4")


def _six_bits(data: bytearray) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return Q6_K's numbers, 256 to a block: 128 bytes of low halves, 64 of high quarters, 16
    signed scales, a float16 that scales them. A half block's numbers are spread over 64 and 32 of
    the bytes, so that each byte holds numbers 64 or 32 apart. A product has 24 bits: it is exact.
    """
    blocks = np.frombuffer(data, np.uint8).reshape(-1, READ[_Q6_K].nbytes)
    halves = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([[0], [4]], np.uint8) & 15
    quarters = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    codes = halves.reshape(-1, 256) | (quarters & 3).reshape(-1, 256) << 4
    scales = blocks[:, 192:208].copy().view(np.int8) * blocks[:, 208:].copy().view("<f2").astype(
        np.float32
    )
    return (codes.astype(np.float32) - 32) * np.repeat(scales, 16, axis=-1)
