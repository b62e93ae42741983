"""Read a checkpoint folder's tensors into a model, strictly.

Every stored tensor is used once or counted as skipped, every parameter is found with its shape, and
nothing that is not a finite number gets in: anything else is an error that names the tensor. The
plan is made from the files' headers, before a weight is read; then tensors are read one at a time.
A module is quantised where the checkpoint has `.scales` for it, as mlx_lm does.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from gemma_mtp_mlx.checkpoint import Checkpoint, Folder, Stored
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.fields import shown
from gemma_mtp_mlx.tensor_names import Names, Piece

_STRIP = 1 << 20  # values whose finiteness is tested at a time; bounds the temporaries
_EXPONENTS = {
    mx.float32: (mx.uint32, 0x7F800000),
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
}
_STORED_AS = {
    mx.float32: ("F32", "F16", "BF16"),
    mx.uint32: ("U32",),
    mx.uint8: ("U8",),
    mx.int32: ("I32", "I64"),
}

# Bits and group sizes of mx.quantize by mode: with other numbers it may end the process.
_PACKINGS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each parameter of a model is stored.

    pieces: by parameter. skipped: how many stored tensors were left out, by reason.
    quantization: group_size, bits and mode of each quantised module, by its path.
    """

    checkpoint: Checkpoint
    pieces: dict[str, Piece]
    skipped: dict[str, int]
    quantization: dict[str, dict[str, Any]]

    def stored(self, name: str) -> Stored:
        """Return what holds a parameter."""
        return self.checkpoint.tensors[self.pieces[name].stored]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are read."""
        names = {piece.stored for piece in self.pieces.values()}
        return sum(self.checkpoint.tensors[name].nbytes for name in names)


def load_weights(module: nn.Module, folder: Path, names: Names) -> Plan:
    """Load the folder's weights into the module and return what was read and what was skipped.

    Raises: ValueError naming the tensor or the file for anything missing, left over, misshaped,
    not finite, damaged or of an unknown kind.
    """
    plan = plan_weights(module, Folder(folder), names)
    fill(module, plan)
    return plan


def fill(module: nn.Module, plan: Plan) -> None:
    """Read what is planned into the module. Raises: ValueError naming a tensor, as above."""
    values = ((name, _narrowed(value)) for name, value in read_parameters(plan))
    module.update(tree_unflatten(list(values)))


def plan_weights(module: nn.Module, checkpoint: Checkpoint, names: Names) -> Plan:
    """Quantise the module as the checkpoint is and find every parameter, reading no weights."""
    stored = checkpoint.tensors
    pieces, skipped = _assign(stored, names)
    block = _quantization_block(checkpoint.config)
    quantization = {} if block is None else _quantize(module, stored, pieces, (block, names))
    plan = Plan(checkpoint, pieces, skipped, quantization)
    _check(module, plan)
    return plan


def read_parameters(plan: Plan) -> Iterator[tuple[str, mx.array]]:
    """Yield each parameter of a folder and its value, evaluated and checked, a tensor at a time."""
    wanted: dict[Path, dict[str, list[tuple[str, Piece]]]] = {}
    for name, piece in plan.pieces.items():
        by_tensor = wanted.setdefault(plan.stored(name).file, {})
        by_tensor.setdefault(piece.stored, []).append((name, piece))
    for file, by_tensor in wanted.items():
        arrays = _arrays(file)
        for stored, uses in by_tensor.items():
            whole = arrays.pop(stored)
            for name, piece in uses:
                value = whole
                if piece.parts > 1:
                    value = mx.contiguous(mx.split(whole, piece.parts, axis=-2)[piece.part])
                check_values(stored, value)
                yield name, value


def _arrays(file: Path) -> dict[str, mx.array]:
    try:
        arrays = mx.load(str(file))
    except RuntimeError as error:  # such as a type that MLX has not, of a tensor that is skipped
        raise ValueError(f"{file} cannot be opened by MLX: {error}; use another copy") from error
    assert isinstance(arrays, dict)
    return arrays


def _narrowed(value: mx.array) -> mx.array:
    """transformers stores token ids as int64; they fit in int32."""
    return value.astype(mx.int32) if value.dtype == mx.int64 else value


def _assign(stored: dict[str, Stored], names: Names) -> tuple[dict[str, Piece], dict[str, int]]:
    """Return the piece that holds each parameter, and the count of skipped tensors by reason."""
    pieces: dict[str, Piece] = {}
    skipped: Counter[str] = Counter()
    for tensor in stored:
        ours, reason = names.read(tensor)
        if reason:
            skipped[reason] += 1
        for part, name in enumerate(ours):
            if name in pieces:
                raise ValueError(
                    f"tensors {pieces[name].stored} and {tensor} are the same parameter, {name}"
                )
            pieces[name] = Piece(tensor, part, len(ours))
    return pieces, dict(skipped)


def _quantization_block(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return what mlx wrote about quantisation. Raises ValueError for any other quantiser's."""
    for holder in (config, config.get("text_config")):
        if not isinstance(holder, dict):
            continue
        block = holder.get("quantization") or holder.get("quantization_config")
        if block is None:
            continue
        if not isinstance(block, dict):
            raise ValueError(f"config.json: quantization is {shown(block)}; it must be an object")
        if "group_size" not in block or "bits" not in block or "quant_method" in block:
            method = block.get("quant_method", "an unknown method")
            said = method if isinstance(method, str) and method.isprintable() else shown(method)
            raise ValueError(
                f"config.json: weights quantised by {said[:60]} are not supported as they are; "
                "convert them, if they are compressed-tensors (mlx-gemma-mtp convert --hf-path "
                "... --mlx-path ...), or use the unquantised checkpoint"
            )
        _check_packing("quantization", block)
        for path, params in block.items():
            if not path.isprintable():
                raise ValueError(f"config.json: quantization of {shown(path)}: no module's name")
            if isinstance(params, dict):
                _check_packing(f"quantization of {shown(path)}", params)
        return dict(block)
    return None


def _check_packing(what: str, params: dict[str, Any]) -> None:
    """Raise ValueError for what MLX cannot pack. params: what is absent is MLX's to choose."""
    mode = params.get("mode", "affine")
    known = _PACKINGS.get(mode) if isinstance(mode, str) else None
    if known is None:
        raise ValueError(f"{what}: mode is {shown(mode)}; it must be one of {', '.join(_PACKINGS)}")
    for name, values in zip(("bits", "group_size"), known, strict=True):
        given = params.get(name)
        if given is not None and (type(given) is not int or given not in values):
            raise ValueError(
                f"{what}: {name} is {shown(given)}; with mode {mode} MLX has "
                f"{', '.join(map(str, values))}; use another copy of the checkpoint"
            )


def _quantize(
    module: nn.Module,
    stored: dict[str, Stored],
    pieces: dict[str, Piece],
    described: tuple[dict[str, Any], Names],
) -> dict[str, dict[str, Any]]:
    """Quantise the modules that have scales and return how. described: config's block, its names.

    A module the block names is packed as it says there; for the others the shapes tell.
    """
    block, names = described
    overrides = {}
    for path, params in block.items():
        if isinstance(params, dict):
            for name in names.read(f"{path}.weight")[0]:
                overrides[name.removesuffix(".weight")] = params
    mode = block.get("mode", "affine")
    found: dict[str, dict[str, Any]] = {}

    def choose(path: str, leaf: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in pieces or f"{path}.weight" not in pieces:
            return False
        if path in overrides:
            found[path] = {"mode": "affine", **overrides[path]}
        else:
            width = leaf.weight.shape[-1]
            words, groups = (
                (0, *stored[pieces[f"{path}.{what}"].stored].shape)[-1]
                for what in ("weight", "scales")
            )
            params = {"group_size": width // max(1, groups), "bits": words * 32 // width}
            found[path] = {**params, "mode": mode}
            _check_packing(f"tensors of {path}", found[path])
        return found[path]

    try:
        nn.quantize(module, block["group_size"], block["bits"], mode=mode, class_predicate=choose)
    except (ValueError, TypeError, RuntimeError) as error:
        path = next(reversed(found), "")
        how = shown(found.get(path))
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be quantised as {how}: {why}") from error
    return found


def _parameters(module: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def _check(module: nn.Module, plan: Plan) -> None:
    """Raise ValueError unless the stored tensors are the module's parameters, in kind and shape."""
    expected = _parameters(module)
    for name, piece in plan.pieces.items():
        if name not in expected:
            raise ValueError(
                f"tensor {piece.stored} is not a parameter of the model that config.json describes"
            )
    missing = [name for name in expected if name not in plan.pieces]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of {len(expected)} parameters: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}; "
            "download it again, or check that config.json belongs to it"
        )
    for name, piece in plan.pieces.items():
        shape, found = list(expected[name].shape), plan.stored(name)
        if piece.parts > 1:
            shape[-2] *= piece.parts
        if list(found.shape) != shape:
            raise ValueError(
                f"tensor {piece.stored} has shape {list(found.shape)}, expected {shape}"
            )
        kinds = _STORED_AS[expected[name].dtype]
        if found.dtype not in kinds:
            raise ValueError(
                f"tensor {piece.stored} is stored as {found.dtype}, expected {' or '.join(kinds)}"
            )


def check_values(stored: str, value: mx.array) -> None:
    """Evaluate a tensor, or rows of one. Raises ValueError if it holds what cannot be meant."""
    mx.eval(value)
    if mx.issubdtype(value.dtype, mx.floating) and not _is_finite(value):
        raise ValueError(
            f"tensor {stored} holds values that are not finite (nan or inf); "
            "the checkpoint is damaged, download it again"
        )
    if mx.issubdtype(value.dtype, mx.signedinteger) and not _is_ordering(value):
        raise ValueError(f"tensor {stored} is not an ordering of the {value.size} token ids")


def _is_ordering(value: mx.array) -> bool:
    return bool(mx.array_equal(mx.sort(value.reshape(-1)), mx.arange(value.size)).item())


def _is_finite(value: mx.array) -> bool:
    """Whether no value's exponent is all ones. On the host, a strip at a time: it is quicker."""
    unsigned, exponent = _EXPONENTS[value.dtype]
    bits = np.asarray(value.view(unsigned)).reshape(-1)
    strips = (bits[i : i + _STRIP] for i in range(0, bits.size, _STRIP))
    return all((strip & exponent).max() < exponent for strip in strips)


def fingerprint(model: nn.Module, config: ModelConfig) -> str:
    """Tell models apart: by their configuration and a few values of every weight."""
    digest = hashlib.sha256(repr(config).encode())
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, weight in weights.items():
        first = weight.reshape(-1)[:8].astype(mx.float32)
        digest.update(f"{name} {weight.dtype} {weight.shape} {first.tolist()}".encode())
    return digest.hexdigest()[:16]
