"""Where a kernel is used in a model, and a case of it: what it is given, reads, and stands against.

Weights are random and 4-bit. `shrink` divides what is only long (output widths, the vocabulary),
never what sums run over: what is read shrinks with it, and can be looked at in less time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from gemma_mtp_mlx.config import LayerConfig, ModelConfig
from gemma_mtp_mlx.dispatch import Call, Gpu, Weights
from gemma_mtp_mlx.families import target_config
from gemma_mtp_mlx.sampling import Sampling, SamplingParams, batch_sampling

DTYPE = mx.bfloat16
ITEM = DTYPE.size
Op = Callable[[mx.array], list[mx.array]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where cases are taken from: a model, the rows and new positions of a pass, its context."""

    model: str
    rows: int = 1
    length: int = 4
    context: int = 1024
    shrink: int = 1

    @property
    def tokens(self) -> int:
        """M."""
        return self.rows * self.length

    @property
    def config(self) -> ModelConfig:
        """The target's facts."""
        return target_config(self.model)

    def tall(self, n: int) -> int:
        """Return a width that is only long, shrunk to a multiple of 64."""
        return n if self.shrink == 1 else max(64, n // self.shrink // 64 * 64)

    def layer(self, *, sliding: bool) -> LayerConfig:
        """Return the last layer of a kind that has keys and values of its own."""
        return self.config.last_owner(sliding=sliding)


class Work(NamedTuple):
    """One copy of a case: its input, and what is done with it by ours and by MLX."""

    x: mx.array
    ours: Op
    mlx: Op


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel in its place.

    stream: bytes of the weights, or keys and values, that it needs; least: those, and what comes
    in and goes out. build: makes a copy; theirs: what MLX reads of the stream on a chip.
    """

    kernel: str
    what: str
    tokens: int
    stream: int
    least: int
    build: Callable[[], Work]
    theirs: Callable[[Gpu], list[Call]]


_keys = count()


def random(*shape: int) -> mx.array:
    """Return activations."""
    return mx.random.normal(shape, key=mx.random.key(next(_keys))).astype(DTYPE)


def packed(weights: Weights, experts: int = 0) -> nn.Module:
    """Return a linear layer of random codes; experts: so many of them in one module."""
    facts = {"bias": False, "group_size": weights.group, "bits": weights.bits}
    sizes = (weights.in_width, weights.out_width)
    if experts:
        layer: nn.Module = QuantizedSwitchLinear(*sizes, experts, **facts)
    else:
        layer = nn.QuantizedLinear(*sizes, **facts)
    fill(layer, weights.bits)
    return layer


def fill(layer: nn.Module, bits: int) -> None:
    """Give a quantised layer random codes, and scales that keep results small."""
    codes, scales = layer.weight.shape, layer.scales.shape
    raw = np.random.RandomState(next(_keys)).bytes(4 * int(np.prod(codes)))
    layer.weight = mx.array(np.frombuffer(raw, np.uint32).reshape(codes))
    layer.scales = mx.full(scales, 2.0**-bits / 16, DTYPE)
    layer.biases = mx.full(scales, -1 / 32, DTYPE)


def embedding(weights: Weights) -> nn.QuantizedEmbedding:
    """Return an embedding of random codes."""
    table = nn.QuantizedEmbedding(weights.out_width, weights.in_width, weights.group, weights.bits)
    fill(table, weights.bits)
    return table


def sampling(place: Place) -> Sampling:
    """Return greedy settings."""
    return batch_sampling([SamplingParams()] * place.rows, [0] * place.rows)
