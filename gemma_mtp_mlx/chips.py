"""Apple's chips: what is published about their GPUs, from data/chips.json."""

import json
from dataclasses import dataclass
from importlib.resources import files

import mlx.core as mx

from gemma_mtp_mlx.dispatch import Gpu

SHARE = 0.72  # of its memory that a Mac lets MLX use, about; macOS gives 2/3 to 3/4


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip as published.

    bandwidth_gbps: of memory, GB/s. tflops: float16, shader cores and their matrix instructions;
    tensor_tflops: on tensor units, None without. memory_gb: the largest sold. sources: a link for
    each figure; estimates: why a figure is one that nobody published.
    """

    name: str
    generation: int
    size: str
    gpu_cores: int
    bandwidth_gbps: float
    tflops: float
    tensor_tflops: float | None
    memory_gb: int
    sources: dict[str, str]
    estimates: dict[str, str]

    @property
    def gpu(self) -> Gpu:
        """As MLX tells GPUs apart."""
        return Gpu(self.generation, self.size)

    @property
    def matrix_tflops(self) -> float:
        """The most that float16 matmuls could reach."""
        return self.tensor_tflops or self.tflops

    @property
    def usable_bytes(self) -> int:
        """What MLX may use of the largest memory, about."""
        return int(self.memory_gb * SHARE * (1 << 30))


def _read() -> dict[str, Chip]:
    text = files("gemma_mtp_mlx").joinpath("data/chips.json").read_text()
    return {entry["name"]: Chip(**entry) for entry in json.loads(text)["chips"]}


CHIPS = _read()


def find(name: str) -> Chip:
    """Return a chip by its name, in any case, with or without "Apple" in front.

    Raises: ValueError listing the names there are.
    """
    wanted = " ".join(name.lower().removeprefix("apple").split())
    for chip in CHIPS.values():
        if chip.name.lower() == wanted:
            return chip
    raise ValueError(f"there is no chip {name!r}; there are {', '.join(CHIPS)}")


def of_gpu(name: str, cores: int | None) -> Chip | None:
    """Return the chip whose GPU has this name and, of those sold with several, so many cores."""
    name = name.removeprefix("Apple ")
    return CHIPS.get(f"{name} {cores}-core") or CHIPS.get(name)


def this_chip(cores: int | None = None) -> Chip | None:
    """Return the chip that MLX's GPU is, None where it has none. cores: of that GPU, if known.

    Raises: ValueError for an Apple GPU that is not in the list.
    """
    if not mx.metal.is_available():
        return None
    name = str(mx.device_info()["device_name"])
    return of_gpu(name, cores) or find(name)
