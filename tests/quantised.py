"""Tiny models quantised in memory, with scales of other dtypes than their activations.

Converted checkpoints are such: q4_0's scales are float16, in a model of bfloat16.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from gemma_mtp_mlx import Pair, load
from gemma_mtp_mlx.drafter import Drafter
from gemma_mtp_mlx.target import Target
from tests.checkpoints import write_pair

HALF = (mx.float16,)
Model = TypeVar("Model", Target, Drafter)

MIXTURE = (mx.float16, mx.float32, mx.bfloat16)


def quantised_pair(folder: Path, family: str, scales: Sequence[mx.Dtype]) -> Pair:
    """A family's pair in bfloat16, every matrix in 4 bits with scales of one of those dtypes."""
    target, assistant = write_pair(folder, family, seed=1, dtype="bfloat16")
    pair = load(target, drafter=assistant)
    assert pair.drafter is not None
    for model in (pair.target, pair.drafter):
        _quantise(model, scales)
    return pair


def _quantise(model: nn.Module, scales: Sequence[mx.Dtype]) -> None:
    def is_matrix(_: str, module: nn.Module) -> bool:
        if "weight" not in module or module.weight.ndim < 2:
            return False
        module.weight = module.weight.astype(mx.float32)  # scales have all their bits then
        return True

    nn.quantize(model, 32, 4, class_predicate=is_matrix)
    for path, module in model.named_modules():
        if "scales" in module:
            # An expert's gate and up are one tensor in a checkpoint.
            shared = path.replace("switch_glu.up_proj", "switch_glu.gate_proj")
            dtype = scales[zlib.crc32(shared.encode()) % len(scales)]
            module.scales, module.biases = (x.astype(dtype) for x in (module.scales, module.biases))


def decoded(model: Model, dtype: mx.Dtype) -> Model:
    """The same model without quantisation: weights decoded in float32, then rounded to dtype."""
    weights: list[tuple[str, mx.array]] = []
    for path, module in model.named_modules():
        own = {name: x for name, x in module.items() if isinstance(x, mx.array)}
        if "scales" in own:
            scales, biases = (own.pop(part).astype(mx.float32) for part in ("scales", "biases"))
            own["weight"] = mx.dequantize(own["weight"], scales, biases, 32, 4)
        weights += [(f"{path}.{name}".lstrip("."), x) for name, x in own.items()]
    plain = type(model)(model.config)  # type: ignore[arg-type]
    floats = [
        (name, x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x) for name, x in weights
    ]
    plain.update(tree_unflatten(floats))
    return plain
