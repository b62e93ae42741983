"""Where arrays are computed, for the few places that have to know."""

from collections.abc import Callable

import mlx.core as mx

Elementwise = Callable[..., mx.array]


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU by default."""
    return mx.default_device() == mx.Device(mx.gpu)


def fused(function: Elementwise) -> Elementwise:
    """Compile a chain of elementwise operations on a GPU, where each one is a launch of its own.

    Not on a CPU: there mx.compile needs a C++ compiler at run time.
    """
    return mx.compile(function, shapeless=True) if on_gpu() else function
