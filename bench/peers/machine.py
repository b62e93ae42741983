"""What a measurement was made on, and the bytes a pass has to read."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma_mtp_mlx import machine
from gemma_mtp_mlx.checkpoint import stored_tensors


def facts() -> dict[str, Any]:
    """Return what matters of this machine, as far as it is known."""
    return {name: fact for name, fact in asdict(machine.facts()).items() if fact is not None}


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all tensors in a model's folder, drafters in it not counted."""
    return sum(stored.nbytes for stored in stored_tensors(folder).values())


def ceiling(model: Path, bandwidth_gbps: float | None) -> str:
    """Say what a pass reads at most and, at a given bandwidth, how many passes that allows."""
    target, drafter = stored_bytes(model), stored_bytes(model / "drafter")
    said = (
        f"weights: {target / 1e6:.1f} MB for a pass of the target, {drafter / 1e6:.1f} MB for a "
        "draft (experts, per-layer embeddings and centroid heads are read in part)"
    )
    if bandwidth_gbps is None:
        return said
    passes = bandwidth_gbps * 1e9 / target
    return f"{said}; at {bandwidth_gbps:g} GB/s at most {passes:.1f} passes per second"
