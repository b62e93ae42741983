"""What share of drafts others have published for each size, and what is a sign of something wrong.

Figures of different programs, prompts and depths, so no more than a scale: what is kept here is set
beside them, and only half of what they say or less is called little.
"""

from dataclasses import dataclass

from gemma_mtp_mlx.agreement import Agreement
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.footprint import size_name

LITTLE = 0.5
# Of first drafts, over all kinds. The worst kind that is published of a drafter that works has .31
# (prose, 26B-A4B), one cut off from its target by a bug .09 and less a round (mlx-vlm 1112: .09;
# vLLM 41789: .002), and over kinds as different as these one that works has far more.
FLOOR = 0.2
BUILT_IN = "built-in"


@dataclass(frozen=True, slots=True)
class Published:
    """share: of drafts kept, at so many per round. kind: of our prompts, None for mixed ones."""

    size: str
    kind: str | None
    share: float
    drafts: int
    source: str


_MLXCEL = "mlxcel, docs/benchmarks.md (4 bits)"
_GEMMACLAW = "gemmaclaw 133 (CUDA)"
_OWN = "this project, by this command, on a CPU"
PUBLISHED = (
    Published("E4B", None, 0.43, 3, "mlx-vlm 1121 (bfloat16)"),
    Published("12B", "code", 0.784, 3, _MLXCEL),
    Published("12B", "prose", 0.489, 3, _MLXCEL),
    Published("12B", "repeat", 0.997, 3, _MLXCEL),
    Published("26B-A4B", "code", 0.66, 3, _GEMMACLAW),
    Published("26B-A4B", "prose", 0.31, 3, _GEMMACLAW),
    Published("26B-A4B", "chat", 0.508, 3, "oMLX 1909 (4 bits)"),
    Published("31B", None, 0.735, 4, "club-3090 274 (vLLM; .92 .78 .67 .57 by position)"),
    Published(BUILT_IN, "code", 0.64, 4, _OWN),
    Published(BUILT_IN, "prose", 0.30, 4, _OWN),
    Published(BUILT_IN, "chat", 0.89, 4, _OWN),
    Published(BUILT_IN, "json", 0.45, 4, _OWN),
    Published(BUILT_IN, "repeat", 0.86, 4, _OWN),
)


def size_of(config: ModelConfig) -> str | None:
    """Return the size by which figures are published, None for one of which there are none."""
    built_in = (config.hidden_size, len(config.layers), config.vocab_size) == (192, 12, 4096)
    return BUILT_IN if built_in else size_name(config)


def published(config: ModelConfig) -> tuple[Published, ...]:
    """Return what is known of a target's size."""
    size = size_of(config)
    return tuple(known for known in PUBLISHED if known.size == size)


def ratio(config: ModelConfig, found: Agreement) -> float | None:
    """Return what is kept as a share of what is published of the same kinds; None if nothing is."""
    shares = {kept.kind: kept.share for kept in found.kinds}
    pairs = [
        (found.whole.share if known.kind is None else shares[known.kind], known.share)
        for known in published(config)
        if known.kind is None or known.kind in shares
    ]
    return sum(mine for mine, _ in pairs) / sum(theirs for _, theirs in pairs) if pairs else None
