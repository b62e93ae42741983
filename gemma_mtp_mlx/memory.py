"""How much memory keys and values may take on this device, and what a budget is spent on."""

import os
from dataclasses import dataclass

import mlx.core as mx

from gemma_mtp_mlx.cache import position_bytes, ring_size, seat_size, window_bytes
from gemma_mtp_mlx.config import ModelConfig

CHUNK = 512  # prompt tokens computed at a time; also where prompts may be taken over
PREFIX_SHARE = 0.25
RESERVED = 1 << 30  # for a pass's temporaries and everything else


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine may hold at a time.

    max_batch: rows. kv_bytes: keys and values altogether, None for what the device has left.
    positions: of the full layers' pools at most, None for whole contexts. prefix_share: part of
    the budget for windows kept for later prompts; 0 keeps nothing. chunk: prompt tokens at a time.
    """

    max_batch: int = 8
    kv_bytes: int | None = None
    positions: int | None = None
    prefix_share: float = PREFIX_SHARE
    chunk: int = CHUNK


@dataclass(frozen=True, slots=True)
class Plan:
    """How a budget is spent: slots rings, pools of positions, window_bytes of kept windows."""

    slots: int
    positions: int
    window_bytes: int


def device_bytes() -> int:
    """Bytes that MLX may use on this device: the recommended working set, or physical memory."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def left_bytes() -> int:
    """Bytes that keys and values may take beside what is loaded."""
    return device_bytes() - mx.get_active_memory() - RESERVED


def wire_memory() -> None:
    """Keep what MLX holds resident on a Mac, as mlx_lm does: a page brought back is a stall."""
    if mx.metal.is_available():
        mx.set_wired_limit(device_bytes())


def plan(config: ModelConfig, dtype: mx.Dtype, limits: Limits) -> Plan:
    """Divide a budget: a ring per row first, then pools, then windows.

    Raises: ValueError with the numbers if the budget is more than the device has left, or too
    little for the rings and one short row.
    """
    left = left_bytes()
    budget = left if limits.kv_bytes is None else limits.kv_bytes
    if budget > left:
        raise ValueError(
            f"{_gb(budget)} for keys and values are asked for and {_gb(left)} are left on this "
            "device beside the model; lower the budget"
        )
    rings = window_bytes(config, dtype, ring_size(config)) * limits.max_batch
    windows = int(budget * limits.prefix_share)
    wanted = limits.positions or limits.max_batch * seat_size(config.max_position_embeddings)
    per_position = position_bytes(config, dtype)
    positions = min((budget - rings - windows) // per_position, wanted)
    if positions < seat_size(2):
        needed = rings + windows + seat_size(2) * per_position
        raise ValueError(
            f"{limits.max_batch} rows need at least {_gb(needed)} for keys and values and the "
            f"budget is {_gb(budget)}; raise it or use fewer rows"
        )
    return Plan(limits.max_batch, positions, windows)


def check_room(weights_bytes: int) -> None:
    """Raise ValueError, with the numbers and the remedies, if weights cannot be held here."""
    has = device_bytes()
    if weights_bytes + RESERVED > has:
        raise ValueError(
            f"the weights take {_gb(weights_bytes)} and a pass another {_gb(RESERVED)}; MLX may "
            f"use {_gb(has)} on this device. Use fewer bits (mlx-gemma-mtp convert -q --q-bits 4) "
            "or a smaller model; mlx-gemma-mtp inspect shows what fits"
        )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
