"""What Ollama's clients are told of a model: its size, how it is packed, its template."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gemma_mtp_mlx.checkpoint import Folder, read_json
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.footprint import target_footprint
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import target_names
from gemma_mtp_mlx.weights import Plan, plan_weights

FAMILY = "gemma4"
_SAMPLING = ("temperature", "top_k", "top_p")


@dataclass(frozen=True, slots=True)
class Card:
    """Facts of a target.

    weights: how many numbers; packing: of most bytes, in Ollama's words (BF16, int4, mxfp4);
    sampling: temperature, top_k and top_p, as far as the model's own generation_config.json says;
    max_new_tokens: of an answer that nobody limits, as that says, None if it does not; template:
    its chat template, empty if it has none.
    """

    weights: int
    weights_bytes: int
    packing: str
    modified: str
    sampling: Mapping[str, float]
    max_new_tokens: int | None
    template: str
    info: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, config: ModelConfig, template: str) -> "Card":
        """Read a model's folder, but for its weights. Raises: ValueError for bad defaults in it."""
        plan = plan_weights(Target(config), Folder(folder), target_names(config))
        footprint = target_footprint(config, plan)
        count = sum(group.weights for group in footprint.groups)
        sampling, most = _defaults(folder)
        changed = (folder / "config.json").stat().st_mtime
        return cls(
            weights=count,
            weights_bytes=footprint.weights_bytes,
            packing=_packing(plan),
            modified=stamp(datetime.fromtimestamp(changed, UTC)),
            sampling=sampling,
            max_new_tokens=most,
            template=template,
            info=_info(config, count),
        )

    @property
    def size(self) -> str:
        """How many weights, to be read by people."""
        return f"{self.weights / 1e9:.1f}B" if self.weights >= 1e9 else f"{self.weights / 1e6:.1f}M"


def stamp(moment: datetime) -> str:
    """Return a time of UTC as Ollama spells it."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _packing(plan: Plan) -> str:
    sizes: Counter[str] = Counter()
    for name in plan.pieces:
        stored = plan.stored(name)
        packed = plan.quantization.get(name.rpartition(".")[0])
        kind = stored.dtype
        if packed is not None:
            kind = f"int{packed['bits']}" if packed["mode"] == "affine" else str(packed["mode"])
        sizes[kind] += stored.nbytes
    return sizes.most_common(1)[0][0]


def _defaults(folder: Path) -> tuple[dict[str, float], int | None]:
    """Return sampling and max_new_tokens of a model's generation_config.json."""
    file = folder / "generation_config.json"
    said = read_json(file) if file.is_file() else {}
    found = {name: said[name] for name in _SAMPLING if said.get(name) is not None}
    for name, value in found.items():
        if type(value) not in (int, float):
            raise ValueError(f"{file}: {name} is {str(value)[:40]!r}; it must be a number")
    SamplingParams(**found)
    most = said.get("max_new_tokens")
    if most is not None and (type(most) is not int or most < 1):
        raise ValueError(
            f"{file}: max_new_tokens is {str(most)[:40]!r}; it must be a whole number above 0"
        )
    return found, most


def _info(config: ModelConfig, count: int) -> dict[str, Any]:
    shape = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": len(config.layers),
        "vocab_size": config.vocab_size,
        "attention.sliding_window": config.sliding_window,
        "expert_count": config.num_experts or None,
    }
    named = {f"{FAMILY}.{name}": value for name, value in shape.items() if value is not None}
    return {"general.architecture": FAMILY, "general.parameter_count": count, **named}
