"""What a measurement was made on, and with: what matters of this machine, and never its name."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from gemma_mtp_mlx import __version__
from gemma_mtp_mlx.device import on_gpu


@dataclass(frozen=True, slots=True)
class Machine:
    """gpu: the GPU that MLX computes on, None on a CPU; gpu_cores: None if that is not known."""

    system: str
    processor: str
    cores: int
    memory_gb: float
    python: str
    gpu: str | None
    gpu_cores: int | None

    @property
    def apple_gpu(self) -> bool:
        """Whether what is measured here is measured on an Apple GPU."""
        return self.gpu is not None and self.gpu.startswith("Apple")

    def line(self) -> str:
        """Return the machine in words."""
        cores = f", {self.gpu_cores} GPU cores" if self.gpu_cores else ""
        where = "MLX on the GPU" if self.gpu else "MLX on the CPU"
        return (
            f"{self.processor}, {self.cores} cores{cores}, {self.memory_gb:g} GB, {self.system}; "
            f"{where}"
        )


def facts() -> Machine:
    """Return what matters of this machine."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        system=f"{_system()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_gb=round(pages / 1e9, 1),
        python=platform.python_version(),
        gpu=str(mx.device_info()["device_name"]) if on_gpu() else None,
        gpu_cores=gpu_cores(_ask("ioreg", "-rc", "AGXAccelerator")) if on_gpu() else None,
    )


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that compute."""
    return {"mlx-gemma-mtp": __version__, **{name: version(name) for name in ("mlx", "mlx-lm")}}


def gpu_cores(registry: str) -> int | None:
    """Return how many cores a Mac's GPU has, by what ioreg says of it."""
    found = re.search(r'"gpu-core-count" = (\d+)', registry)
    return None if found is None else int(found[1])


def _system() -> str:
    release = platform.mac_ver()[0]
    return f"macOS {release}" if release else platform.system()


def _processor() -> str:
    if sys.platform == "darwin":
        return _ask("sysctl", "-n", "machdep.cpu.brand_string").strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # not on this system
        return ""
