"""One request: its prompt, its settings, what it has produced and when it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gemma_mtp_mlx.sampling import SamplingParams, fresh_seed
from gemma_mtp_mlx.tokens import TextStream


@dataclass(slots=True)
class Stats:
    """What a request cost and what its drafts were worth.

    draft_rounds: verify passes; draft_n: tokens drafted; draft_n_accepted: drafts that were
    emitted; accepted_per_position: how many rounds emitted their first, second, ... draft.
    """

    seed: int
    prompt_tokens: int
    prompt_s: float = 0.0
    generation_tokens: int = 0
    generation_s: float = 0.0
    peak_memory_bytes: int = 0
    draft_rounds: int = 0
    draft_n: int = 0
    draft_n_accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """Emitted drafts per drafted token, 0 if none was drafted."""
        return self.draft_n_accepted / self.draft_n if self.draft_n else 0.0

    @property
    def mean_accept_len(self) -> float:
        """Tokens emitted per verify pass, the bonus token included; 0 before the first."""
        return (self.generation_tokens - 1) / self.draft_rounds if self.draft_rounds else 0.0

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second of prefill."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def generation_tps(self) -> float:
        """Tokens per second after the first token."""
        return (self.generation_tokens - 1) / self.generation_s if self.generation_s else 0.0


class Request:
    """A request's life on the host. `finish_reason` is None, "stop" or "length"."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        eos: frozenset[int],
        text: TextStream | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """max_tokens: a lower limit than the settings', where the context ends before."""
        self.prompt = list(prompt)
        self.params = params
        self.seed = fresh_seed() if params.seed is None else params.seed
        self.max_tokens = min(params.max_tokens, max_tokens or params.max_tokens)
        self.text = text
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.stats = Stats(seed=self.seed, prompt_tokens=len(self.prompt))
        self._eos = eos

    def extend(self, tokens: Sequence[int]) -> list[int]:
        """Append tokens up to the one that ends the request. Returns those appended."""
        before = len(self.tokens)
        for token in tokens:
            self.tokens.append(token)
            if token in self._eos or (self.text is not None and self.text.add(token)):
                self.finish_reason = "stop"
            elif len(self.tokens) == self.max_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        if self.finish_reason and self.text is not None:
            self.text.finish()
        self.stats.generation_tokens = len(self.tokens)
        return self.tokens[before:]

    def record_round(self, drafted: int, accepted: int) -> None:
        """Count one verify pass of which `accepted` drafts were emitted."""
        stats = self.stats
        stats.draft_rounds += 1
        stats.draft_n += drafted
        stats.draft_n_accepted += accepted
        stats.accepted_per_position += [0] * (drafted - len(stats.accepted_per_position))
        for position in range(accepted):
            stats.accepted_per_position[position] += 1
