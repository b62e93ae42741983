"""What a measurement was made on, and the bytes a pass has to read."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from gemma_mtp_mlx.checkpoint import stored_tensors


def facts() -> dict[str, Any]:
    """Return what matters of this machine; never its name."""
    return {
        "system": f"{_system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
    }


def _system() -> str:
    version = platform.mac_ver()[0]
    return f"macOS {version}" if version else platform.system()


def _processor() -> str:
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


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
