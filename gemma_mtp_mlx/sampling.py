"""How a token is drawn: argmax of filtered logits / temperature + Gumbel noise.

The noise is keyed by the request's seed and the token's absolute position, never by row, round or
depth, so a draw does not depend on who else is in the batch or on how many tokens are drafted.
Greedy rows add no noise. Filters are mlx_lm's: they look at the distribution before temperature.
"""

import hashlib
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # tokens [n], logits [1, V] -> [1, V]
MOST_TOP_LOGPROBS = 20
MOST_TOP_K = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is generated.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. seed: 0 .. 2^32 - 1
    or None for a fresh one. stop: texts that end the output and are not part of it.
    num_draft_tokens: most drafts per round for this request, None for no limit of its own.
    repetition_penalty: 1 is off; presence_penalty, frequency_penalty: 0 is off; each looks at its
    context_size last tokens, the prompt's included, as mlx_lm's. logit_bias: added to the logits
    of those token ids. logprobs: None is off, n reports each token's log-probability and the n
    best alternatives. thinking: whether a chat template asks the model to think first, None if
    its tokenizer has tokens for that, as mlx_lm; thinking_budget: most tokens of thinking before
    its end is forced.
    json_schema (a mapping, {} for any object), regex, grammar (Lark or GBNF): what the text must
    match; at most one. logits_processors: called with (tokens so far, logits [1, V]), in order,
    after penalties and bias; they must be pure functions of their arguments.
    Raises: ValueError for a value out of range, naming it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_draft_tokens: int | None = None
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    thinking: bool | None = None
    thinking_budget: int | None = None
    json_schema: Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name in ("temperature", "presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be between 0 (off) and 1")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be between 0 and {2**32 - 1}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is off)"
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError("stop must be a tuple of texts, none of them empty")
        if self.logprobs is not None and self.logprobs > MOST_TOP_LOGPROBS:
            raise ValueError(f"logprobs is {self.logprobs}; it must be at most {MOST_TOP_LOGPROBS}")
        if sum(rule is not None for rule in (self.json_schema, self.regex, self.grammar)) > 1:
            raise ValueError("give one of json_schema, regex and grammar, not several")

    def choices(self, count: int) -> "list[SamplingParams]":
        """Return settings for `count` answers to one prompt; their seeds derive from this one's."""
        seed = fresh_seed() if self.seed is None else self.seed
        return [replace(self, seed=derived_seed(seed, choice)) for choice in range(count)]


_LEAST = {
    "max_tokens": 1,
    "temperature": 0,
    "top_k": 0,
    "num_draft_tokens": 0,
    "repetition_context_size": 1,
    "presence_context_size": 1,
    "frequency_context_size": 1,
    "logprobs": 0,
    "thinking_budget": 0,
}


def derived_seed(seed: int, choice: int) -> int:
    """Return the seed of a request's answer number `choice`; the first one's is the request's."""
    if choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def fresh_seed() -> int:
    """Return a seed nobody has chosen."""
    return secrets.randbits(32)


class Sampling(NamedTuple):
    """The sampling settings of a batch's rows, [B] each; the flags say what any row needs."""

    temperature: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array
    seed: mx.array
    noisy: bool
    filtered: bool


def batch_sampling(params: Sequence[SamplingParams], seeds: Sequence[int]) -> Sampling:
    """Collect the rows' settings. seeds: the seed in use for each row."""
    sampled = [p for p in params if p.temperature > 0]
    return Sampling(
        temperature=mx.array([p.temperature for p in params], mx.float32),
        top_k=mx.array([min(p.top_k, MOST_TOP_K) for p in params], mx.int32),
        top_p=mx.array([p.top_p for p in params], mx.float32),
        min_p=mx.array([p.min_p for p in params], mx.float32),
        seed=mx.array(list(seeds), mx.uint32),
        noisy=bool(sampled),
        filtered=any(p.top_k or p.top_p < 1 or p.min_p for p in sampled),
    )


def gumbel(sampling: Sampling, positions: mx.array, vocab_size: int) -> mx.array | None:
    """Noise for the tokens at positions [B, L]: [B, L, V] float32, or None if every row is greedy.

    Gumbel = -log(-log1p(-v)) with v = (bits + .5) / 2^32 from the counter-based generator's raw
    32-bit words: large values come from small v, which floats resolve.
    """
    if not sampling.noisy:
        return None
    seeds = mx.broadcast_to(sampling.seed[:, None], positions.shape)
    keys = mx.stack([seeds, positions.astype(mx.uint32)], axis=-1).reshape(-1, 2)
    words = mx.vmap(lambda key: mx.random.split(key, (vocab_size + 1) // 2))(keys)
    words = words.reshape(*positions.shape, -1)[..., :vocab_size]
    v = (words.astype(mx.float32) + 0.5) * 2.0**-32
    return -mx.log(-mx.log1p(-mx.minimum(v, 1 - 2.0**-24)))


def draw(
    logits: mx.array, noise: mx.array | None, sampling: Sampling, ids: mx.array | None = None
) -> mx.array:
    """Draw one token per position.

    logits: [B, L, N] float32; noise: [B, L, V] of `gumbel`; ids: [B, L, N] tokens the logits
    belong to, None if N = V in order. Returns: [B, L] int32.
    """
    if noise is not None:
        if sampling.filtered:
            logits = keep_likely(logits, sampling)
        if ids is not None:
            noise = mx.take_along_axis(noise, ids, axis=-1)
        temperature = sampling.temperature[:, None, None]
        sampled = logits / mx.maximum(temperature, 1e-6) + noise
        logits = mx.where(temperature > 0, sampled, logits)
    best = mx.argmax(logits, axis=-1)
    if ids is not None:
        best = mx.take_along_axis(ids, best[..., None], axis=-1)[..., 0]
    return best.astype(mx.int32)


def keep_likely(logits: mx.array, sampling: Sampling) -> mx.array:
    """Set what top-k, top-p and min-p exclude to -inf; each sees the whole distribution."""
    ordered = -mx.sort(-logits, axis=-1)
    top = ordered[..., :1]
    size = logits.shape[-1]
    top_k = mx.where(sampling.top_k > 0, mx.minimum(sampling.top_k, size), size)[:, None, None]
    least = mx.take_along_axis(ordered, mx.broadcast_to(top_k - 1, (*logits.shape[:2], 1)), axis=-1)
    probs = mx.softmax(ordered, axis=-1, precise=True)
    before = mx.cumsum(probs, axis=-1) - probs
    top_p = sampling.top_p[:, None, None]
    kept = mx.maximum(((before < top_p) | (top_p >= 1)).sum(axis=-1, keepdims=True), 1)
    least = mx.maximum(least, mx.take_along_axis(ordered, kept - 1, axis=-1))
    min_p = sampling.min_p[:, None, None]
    least = mx.where(min_p > 0, mx.maximum(least, top + mx.log(min_p)), least)
    return mx.where(logits >= least, logits, -mx.inf)
