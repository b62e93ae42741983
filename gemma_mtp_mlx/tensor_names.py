"""What the tensors of a checkpoint are called, by whom, and where each one goes.

Our parameters are named as mlx_lm names them, so its folders map onto themselves; transformers,
mlx_lm's multimodal classes and mlx-vlm put other prefixes in front, and transformers stores an
expert's gate and up projection as one tensor. One table per kind of model says all of it. The first
rule that fits a stored name decides; a tensor that no rule knows is an error, never ignored.
Read the other way round, the table gives the published name of each of our parameters.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from gemma_mtp_mlx.config import ModelConfig


class Rule(NamedTuple):
    """Where tensors of one form go.

    stored: the form of their names, see `_PLACES`. names: our parameters, more than one if the
    tensor is cut into that many equal parts along its second last axis. skipped: instead of names,
    what the tensors are and why a text model has no use for them.
    """

    stored: str
    names: tuple[str, ...] = ()
    skipped: str = ""


class Piece(NamedTuple):
    """A stored tensor, or one of its equal parts."""

    stored: str
    part: int = 0
    parts: int = 1


TIED_HEAD = "tied head"
SHARED_KV = "keys and values of layers that share them"

_PLACES = {
    "text": r"model\.language_model\.|language_model\.model\.|model\.",
    "wrap": r"model\.|",
    "lm": r"language_model\.|",
    "vision": r"vision_tower|vision_embedder|embed_vision|multi_modal_projector",
    "audio": r"audio_tower|embed_audio",
    "kv": r"k_proj|v_proj|k_norm|v_norm",
    "layer": r"\d+",
    "rest": r".+",
}
_EXPERTS = "layers.{layer}.experts"
_TARGET = (
    Rule("{wrap}{vision}.{rest}", skipped="vision"),
    Rule("{wrap}{audio}.{rest}", skipped="audio"),
    Rule("{lm}lm_head.{rest}", skipped=TIED_HEAD),
    Rule("{text}layers.{sharing}.self_attn.{kv}.{rest}", skipped=SHARED_KV),
    Rule(
        f"{{text}}{_EXPERTS}.gate_up_proj",
        (
            f"model.{_EXPERTS}.switch_glu.gate_proj.weight",
            f"model.{_EXPERTS}.switch_glu.up_proj.weight",
        ),
    ),
    Rule(f"{{text}}{_EXPERTS}.down_proj", (f"model.{_EXPERTS}.switch_glu.down_proj.weight",)),
    Rule("{text}{rest}", ("model.{rest}",)),
)
_DRAFTER = (
    Rule("lm_head.{rest}", skipped=TIED_HEAD),
    Rule("{rest}", ("{rest}",)),
)


class Names:
    """The table of one kind of model. Made by `target_names` or `drafter_names`."""

    def __init__(self, rules: Sequence[Rule], sharing: Sequence[int] = ()) -> None:
        """sharing: the layers that use another layer's keys and values."""
        places = {**_PLACES, "sharing": "|".join(map(str, sharing)) or "(?!)"}
        self._rules = [(rule, _compile(rule.stored, places)) for rule in rules]
        self._ours = [
            (rule, part, _compile(name, places))
            for rule in rules
            for part, name in enumerate(rule.names)
        ]

    def read(self, stored: str) -> tuple[tuple[str, ...], str]:
        """Return the parameters a stored tensor holds and, if none, why it is skipped.

        Raises: ValueError for a name that no rule knows.
        """
        for rule, pattern in self._rules:
            if match := pattern.fullmatch(stored):
                names = tuple(name.format(**match.groupdict()) for name in rule.names)
                return names, rule.skipped
        raise ValueError(
            f"tensor {stored} does not belong in a Gemma 4 checkpoint; is it another model's?"
        )

    def published(self, name: str, text: str = "model.") -> Piece:
        """Return where transformers keeps our parameter.

        text: what stands before the text model's names: "model.", or "model.language_model." in a
        multimodal checkpoint.
        """
        for rule, part, pattern in self._ours:
            if match := pattern.fullmatch(name):
                stored = rule.stored.format(**{**match.groupdict(), "text": text})
                return Piece(stored, part, len(rule.names))
        raise ValueError(f"{name} is not a parameter of a Gemma 4 model")


def target_names(config: ModelConfig) -> Names:
    """Return the table of a target."""
    return Names(_TARGET, [layer.index for layer in config.layers if not layer.owns_kv])


def drafter_names() -> Names:
    """Return the table of a drafter."""
    return Names(_DRAFTER)


def _compile(form: str, places: dict[str, str]) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", form)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [f"(?P<{place}>{places[place]})" for place in parts[1::2]]
    return re.compile("".join(parts))
