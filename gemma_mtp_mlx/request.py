"""One request: its prompt, its settings, what it has produced and when it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gemma_mtp_mlx.constraint import Constraint
from gemma_mtp_mlx.outcome import Logprob
from gemma_mtp_mlx.sampling import SamplingParams, fresh_seed
from gemma_mtp_mlx.sections import SectionStream
from gemma_mtp_mlx.tokens import TextStream


@dataclass(slots=True)
class Stats:
    """What a request cost and what its drafts were worth.

    cached_tokens: prompt tokens taken over from earlier prompts; queued_s: from submission to
    admission; prompt_s: from there to the first token, whatever else ran meanwhile; generation_s:
    from the first token to the last; draft_rounds: verify passes; draft_blocks: those that had
    drafts; draft_n: tokens drafted; draft_n_accepted: drafts that were emitted;
    accepted_per_position: how many rounds emitted their first, second, ... draft.
    """

    seed: int
    prompt_tokens: int
    cached_tokens: int = 0
    queued_s: float = 0.0
    prompt_s: float = 0.0
    generation_tokens: int = 0
    generation_s: float = 0.0
    peak_memory_bytes: int = 0
    draft_rounds: int = 0
    draft_blocks: int = 0
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
    """A request's life on the host.

    finish_reason: None while it lives, then "stop", "length", "cancelled" or "error"; error: what
    went wrong in the last case. text, sections: how its tokens are read, where stop texts are
    found; either or none. constraint: what its tokens must obey, None if nothing.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        eos: frozenset[int],
        text: TextStream | None = None,
        constraint: Constraint | None = None,
        max_tokens: int | None = None,
        sections: SectionStream | None = None,
    ) -> None:
        """max_tokens: a lower limit than the settings', where the context ends before."""
        self.prompt = list(prompt)
        self.params = params
        self.seed = fresh_seed() if params.seed is None else params.seed
        self.max_tokens = min(params.max_tokens, max_tokens or params.max_tokens)
        self.text = text
        self.sections = sections
        self.constraint = constraint
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []  # one per token if the settings ask for them
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.stats = Stats(seed=self.seed, prompt_tokens=len(self.prompt))
        self._eos = eos
        self._submitted = self._admitted = self._first = 0.0

    @property
    def positions(self) -> int:
        """Most positions it can ever have in the cache."""
        return len(self.prompt) + self.max_tokens

    def host_decides(self, length: int) -> bool:
        """Whether the host has a say in any of the next `length` tokens."""
        if self.params.logits_processors:
            return True
        return self.constraint is not None and self.constraint.active(length)

    def submitted(self, now: float) -> None:
        """Take note of when it was submitted, in seconds of any clock."""
        self._submitted = now

    def admitted(self, now: float) -> None:
        """Take note of when it was given memory."""
        self._admitted = now
        self.stats.queued_s = now - self._submitted

    def emitted(self, now: float) -> None:
        """Take note of when tokens came; the first ones end the prompt's time."""
        if not self._first:
            self._first = now
            self.stats.prompt_s = now - self._admitted
        self.stats.generation_s = now - self._first

    def extend(self, tokens: Sequence[int], logprobs: Sequence[Logprob] = ()) -> list[int]:
        """Append tokens up to the one that ends the request. Returns those appended."""
        before, reader = len(self.tokens), self.text or self.sections
        for token in tokens:
            self.tokens.append(token)
            if token in self._eos or (reader is not None and reader.add(token)):
                self.finish_reason = "stop"
            elif len(self.tokens) == self.max_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        added = self.tokens[before:]
        if self.params.logprobs is not None:
            most = self.params.logprobs
            self.logprobs += [Logprob(own, top[:most]) for own, top in logprobs[: len(added)]]
        if self.constraint is not None and not self.finish_reason:
            self.constraint.advance(added)
        if self.finish_reason and reader is not None:
            reader.finish()
        self.stats.generation_tokens = len(self.tokens)
        return added

    def end(self, reason: str, error: Exception | None = None) -> None:
        """End the request from outside: "cancelled", or "error" with what went wrong."""
        self.finish_reason, self.error = reason, error

    def record_round(self, drafted: int, accepted: int) -> None:
        """Count one verify pass of which `accepted` drafts were emitted."""
        stats = self.stats
        stats.draft_rounds += 1
        stats.draft_blocks += drafted > 0
        stats.draft_n += drafted
        stats.draft_n_accepted += accepted
        stats.accepted_per_position += [0] * (drafted - len(stats.accepted_per_position))
        for position in range(accepted):
            stats.accepted_per_position[position] += 1
