"""The model that a server serves, as its clients know it."""

import time
from dataclasses import dataclass, field

from gemma_mtp_mlx.serve.errors import Refusal
from gemma_mtp_mlx.serve.tool_grammar import Markers


@dataclass(frozen=True, slots=True)
class Served:
    """A model's names and facts.

    aliases: what it may be called beside its name, in lower case; drafter: its name, None if
    there is none; fingerprint: of the weights; context: positions, prompt and answer together;
    thinks: whether it can; markers: how it spells tool calls, None if it does not.
    """

    name: str
    aliases: frozenset[str]
    drafter: str | None
    fingerprint: str
    context: int
    thinks: bool
    markers: Markers | None
    created: int = field(default_factory=lambda: int(time.time()))

    def check(self, model: str | None) -> None:
        """Raise Refusal if a request names another model; naming none is fine."""
        if model is None or model == self.name or model.lower() in self.aliases:
            return
        known = ", ".join(sorted({self.name, *self.aliases}))
        raise Refusal(
            404,
            f"the model {model[:200]!r} is not served here; there is {known}",
            param="model",
            code="model_not_found",
        )
