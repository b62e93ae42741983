"""Gemma 4 with its MTP drafter on MLX: the same tokens, in fewer passes.

Dimension key of the whole project: B rows, L new positions in a pass (K + 1 in a verify), S stored
positions, K drafted tokens, H query heads, G key/value heads, D head dim, E model width, F mlp
width, V vocabulary, W window, T a prompt chunk's positions, P per-layer input width, N storage
entries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_mtp_mlx.api import Chunk, Pair, Result, Session, load
    from gemma_mtp_mlx.request import Stats
    from gemma_mtp_mlx.sampling import SamplingParams

__all__ = ["Chunk", "Pair", "Result", "SamplingParams", "Session", "Stats", "load"]
__version__ = "0.1.0"

_HOMES = {"SamplingParams": "sampling", "Stats": "request"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: mlx-lm takes seconds, `--help` should not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
