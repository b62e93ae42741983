"""Which modules are quantised, and how.

Weights of linear layers, embeddings and experts are packed in groups along their last axis, a
module whose last axis does not divide stays as it is. Per-layer embeddings and the routers, which
decide much and cost little, get 8 bits. A centroid head reads its embedding row by row and chooses
by small differences between centroids: both stay as they are.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

_FINE = ("embed_tokens_per_layer", "router.proj")
_FINE_BITS = 8
_CENTROID_HEAD = ("model.embed_tokens", "masked_embedding.centroids")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are packed: MLX's affine mode. Raises ValueError for what MLX cannot pack."""

    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 5, 6, 8):
            raise ValueError(f"bits is {self.bits}; it must be 2, 3, 4, 5, 6 or 8")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size is {self.group_size}; it must be 32, 64 or 128")

    def params(self, path: str) -> dict[str, Any]:
        """Return what the module of that path is packed with."""
        bits = max(self.bits, _FINE_BITS) if path.endswith(_FINE) else self.bits
        return {"group_size": self.group_size, "bits": bits, "mode": "affine"}


@dataclass(frozen=True, slots=True)
class Packing:
    """What is done to a model's weights.

    params: of each module that is or becomes quantised. packs: whether that is done here, or was
    in the source. kept: modules that stay as they are although a quantisation was asked for.
    """

    params: dict[str, dict[str, Any]]
    packs: bool
    kept: tuple[str, ...] = ()

    def apply(self, name: str, value: mx.array) -> dict[str, mx.array]:
        """Return the tensors to write for a parameter."""
        path = name.removesuffix(".weight")
        if not self.packs or path == name or path not in self.params:
            return {name: value}
        packed = mx.quantize(value, **self.params[path])
        return dict(zip((name, f"{path}.scales", f"{path}.biases"), packed, strict=True))

    def block(self) -> dict[str, Any]:
        """Return config.json's entries: defaults, and the modules that differ from them."""
        if not self.params:
            return {}
        every = list(self.params.values())
        usual = max(every, key=every.count)
        differ = {path: params for path, params in self.params.items() if params != usual}
        return {name: {**usual, **differ} for name in ("quantization", "quantization_config")}


def choose(module: nn.Module, quantization: Quantization, *, centroid_head: bool) -> Packing:
    """Choose the modules to pack. centroid_head: whether the module is a drafter that has one."""
    leaves: dict[str, Any] = dict(tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module))
    packable = {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "to_quantized")}
    spared = _CENTROID_HEAD if centroid_head else ()
    params = {
        path: quantization.params(path)
        for path, leaf in packable.items()
        if leaf.weight.shape[-1] % quantization.group_size == 0 and path not in spared
    }
    return Packing(params, packs=True, kept=tuple(p for p in packable if p not in params))
