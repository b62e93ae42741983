"""What a request's tokens must obey beyond the model: a grammar and a thinking budget.

Decided on the host, as bits that say which tokens each position of a block allows. Everything
follows from the tokens alone: prompt, text so far, drafts. Looking at drafts changes nothing.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from mlx_lm.tokenizer_utils import TokenizerWrapper
from numpy.typing import NDArray

from gemma_mtp_mlx.sampling import SamplingParams

Words = NDArray[np.uint32]

# Models write compact, spaced and indented JSON, so all are allowed; the bound is there because
# a model that may write spaces for ever sometimes does. A schema's own "x-guidance" goes first.
JSON_WHITESPACE = r"[ \n\t]{1,32}"
REMEDIES = {
    "json_schema": 'change it, or add "x-guidance": {"lenient": true} to ignore unknown keywords',
    "regex": "write it without look-around, back-references and anchors inside",
    "grammar": "write llguidance's Lark with a rule start:, or GBNF with a rule root ::=",
}


@dataclass(frozen=True, slots=True)
class Thinking:
    """The tokens between which a model thinks. Gemma 4: <|channel>thought and <channel|>."""

    start: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper) -> "Thinking | None":
        """Return a tokenizer's, or None if it has none."""
        if not tokenizer.has_thinking:
            return None
        return cls(tuple(tokenizer.think_start_tokens), tuple(tokenizer.think_end_tokens))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a text stands.

    phase: before thinking and text, thinking, in the text, or over (ended or gone astray, so that
    nothing is constrained any more). matched: how much of the sequence awaited is there, thinking's
    end while thinking, else its start. spent: tokens of thinking in this turn.
    """

    phase: Literal["before", "thinking", "text", "over"]
    matched: int = 0
    spent: int = 0


def grammar_tokenizer(
    tokenizer: TokenizerWrapper, vocab_size: int, eos: frozenset[int]
) -> LLTokenizer:
    """Prepare a tokenizer for constraints; it takes a second, so keep the result.

    vocab_size: the model's, which may exceed the tokenizer's; the ids above are never allowed.
    Raises: ValueError if these do not belong together.
    """
    if not eos:
        raise ValueError("the model names no EOS token, and a constrained text needs one to end")
    backend = copy.copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return LLTokenizer(backend.to_str(), n_vocab=vocab_size, eos_token=sorted(eos))


def constraint_for(
    params: SamplingParams, prompt: Sequence[int], tokenizer: LLTokenizer, thinking: Thinking | None
) -> "Constraint | None":
    """Build what a request must obey, or None if its params ask for nothing.

    tokenizer: of `grammar_tokenizer`. thinking: the model's, or None if there is none.
    Raises: ValueError for a grammar that does not compile, and for a budget without thinking.
    """
    if params.thinking_budget is not None and thinking is None:
        raise ValueError(
            f"thinking_budget is {params.thinking_budget}, but thinking is off or this tokenizer "
            "has no tokens for it; leave the budget out"
        )
    matcher = _matcher(params, tokenizer)
    if matcher is None and params.thinking_budget is None:
        return None
    place = _Place("text")
    if thinking is not None:
        place = _after_prompt(prompt, thinking, tokenizer.eos_tokens)
        if matcher is not None and place.phase == "before":
            place = replace(place, matched=0)  # with a grammar the text holds the whole start
    return Constraint(tokenizer, matcher, thinking, params.thinking_budget, place)


class Constraint:
    """What one running request must obey. Made by `constraint_for`.

    While the model thinks the grammar does not apply; it applies to all that follows. Without a
    grammar, thinking may begin at any token; with one, only at the first.
    """

    def __init__(
        self,
        tokenizer: LLTokenizer,
        matcher: LLMatcher | None,
        thinking: Thinking | None,
        budget: int | None,
        place: _Place,
    ) -> None:
        self._eos = tokenizer.eos_tokens
        self._none = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        self._matcher = matcher
        self._pristine = None if matcher is None else matcher.deep_copy()
        self._fed: list[int] = []  # what the matcher has consumed
        self._thinking = thinking or Thinking((), ())
        self._budget = budget
        self._place = place
        self._problem = ""

    def masks(self, drafts: Sequence[int]) -> Words | None:
        """Return the tokens allowed at each position of a block.

        Position i follows the text and drafts[:i]. Returns: [len(drafts) + 1, ceil(V / 32)], bit
        t % 32 of word t // 32 set for an allowed token t; all bits set where anything is, and from
        the first position after a draft that ends the text or is not allowed, which is never used.
        None if that is so everywhere.
        Raises: ValueError if the text broke the rules, or nothing can follow it by them.
        """
        place, fed = self._place, len(self._fed)
        rows = [self._allowed()]
        if self._problem:
            raise ValueError(self._problem)
        for token in drafts:
            self._step(token)
            rows.append(self._allowed())
        self._return_to(place, fed)
        self._problem = ""  # the drafts'
        if all(row is None for row in rows):
            return None
        return np.stack([~self._none if row is None else row for row in rows])

    def advance(self, tokens: Sequence[int]) -> None:
        """Take tokens as part of the text."""
        for token in tokens:
            self._step(token)

    def active(self, length: int) -> bool:
        """Whether `masks` may have something to say about any of the next `length` positions."""
        place, budget = self._place, self._budget
        left = length if budget is None else max(budget - place.spent, 0)
        if place.phase == "over":
            return self._problem != ""
        if place.phase == "thinking":
            to_text = len(self._thinking.end) - place.matched
            return left < length or (self._matcher is not None and to_text < length)
        to_thinking = len(self._thinking.start) - place.matched
        return self._matcher is not None or to_thinking + left < length

    def _allowed(self) -> Words | None:
        """Return one row of `masks`, None for all bits set."""
        place = self._place
        forced = self._forced()
        if forced is not None:
            return _with_bits(self._none, [forced])
        if place.phase in ("thinking", "over") or self._matcher is None:
            return None
        fed = len(self._fed)
        fits = self._feed()
        # llguidance rounds V + 1 up to whole words.
        row = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(self._none)]
        problem = _one_line(self._matcher.get_error())
        self._return_to(place, fed)
        if place.phase == "before":
            alone = self._none if problem or not fits else row
            return _with_bits(alone, [self._thinking.start[place.matched]])
        if problem:
            self._problem = self._problem or problem
            row = ~_with_bits(self._none, self._eos)  # an EOS would look like a proper end
        return row

    def _step(self, token: int) -> None:
        """Move on by one token; one that is not allowed is a problem and ends all rules."""
        place = self._place
        if place.phase == "over":
            return
        starts = place.phase == "before" and token == self._thinking.start[place.matched]
        if place.phase == "thinking" or self._matcher is None or starts:
            allowed = self._forced() in (None, token)
            self._place = _follow(place, self._thinking, token)
        elif token in self._eos:
            allowed = self._feed() and self._matcher.is_accepting()
        else:
            allowed = self._feed(token)
            self._problem = self._problem or _one_line(self._matcher.get_error())
            self._place = replace(place, phase="text", matched=0)
        if token in self._eos or not allowed:
            self._place = _Place("over")
        if not allowed:
            self._problem = self._problem or f"token {token} is not what had to follow"

    def _forced(self) -> int | None:
        """Return the token that must follow because thinking has spent its budget."""
        place = self._place
        if place.phase != "thinking" or self._budget is None or place.spent < self._budget:
            return None
        return self._thinking.end[place.matched]

    def _feed(self, *tokens: int) -> bool:
        """Let the matcher consume what was held back, then tokens. Returns whether they fit.

        Held back is the beginning of a start of thinking, which might yet be the grammar's.
        """
        assert self._matcher is not None
        held = self._thinking.start[: self._place.matched] if self._place.phase == "before" else ()
        count = self._matcher.try_consume_tokens([*held, *tokens])
        self._fed.extend([*held, *tokens][:count])
        return count == len(held) + len(tokens)

    def _return_to(self, place: _Place, fed: int) -> None:
        """Return to where the text was `place` and the matcher had consumed `fed` tokens."""
        self._place = place
        if self._matcher is None or self._pristine is None:
            return
        self._matcher.rollback(len(self._fed) - fed)
        del self._fed[fed:]
        if self._matcher.is_error():  # a limit was met, from which a matcher cannot roll back
            self._matcher = self._pristine.deep_copy()
            self._matcher.consume_tokens(self._fed)


def apply_masks(logits: mx.array, words: mx.array) -> mx.array:
    """Set the logits of tokens that are not allowed to -inf, on the device.

    logits: [B, L, V] float32; words: [B, L, ceil(V / 32)] uint32 of `Constraint.masks`.
    """
    bits = mx.left_shift(mx.array(1, mx.uint32), mx.arange(32, dtype=mx.uint32))
    allowed = (words[..., None] & bits).astype(mx.bool_)
    allowed = allowed.reshape(*words.shape[:2], -1)[..., : logits.shape[-1]]
    return mx.where(allowed, logits, -mx.inf)


def _with_bits(row: Words, tokens: Sequence[int]) -> Words:
    """Return the row with the tokens' bits set."""
    row = row.copy()
    for token in tokens:
        row[token // 32] |= np.uint32(1 << token % 32)
    return row


def _after_prompt(prompt: Sequence[int], thinking: Thinking, eos: Sequence[int]) -> _Place:
    """Return where the text stands that begins after a prompt; its turn begins after an EOS."""
    ends = (at + 1 for at in range(len(prompt) - 1, -1, -1) if prompt[at] in eos)
    place = _Place("before")
    for token in prompt[next(ends, 0) :]:
        place = _follow(place, thinking, token)
    return place


def _follow(place: _Place, thinking: Thinking, token: int) -> _Place:
    """Return where a text stands after one more token, whatever the grammar."""
    if place.phase == "thinking":
        matched = _matched(thinking.end, place.matched, token)
        ended = matched == len(thinking.end)
        return _Place("text" if ended else "thinking", 0 if ended else matched, place.spent + 1)
    matched = _matched(thinking.start, place.matched, token)
    if matched == len(thinking.start):
        return _Place("thinking", 0, place.spent)
    return replace(place, matched=matched)


def _matched(sequence: tuple[int, ...], matched: int, token: int) -> int:
    """Return how much of a sequence a text ends with, given how much it did before the token."""
    if token == sequence[matched]:
        return matched + 1
    tail = (*sequence[:matched], token)
    return next(n for n in range(matched, -1, -1) if tail[len(tail) - n :] == sequence[:n])


def _matcher(params: SamplingParams, tokenizer: LLTokenizer) -> LLMatcher | None:
    """Compile the grammar of a request, None if it has none."""
    kind = next((kind for kind in REMEDIES if getattr(params, kind) is not None), None)
    if kind is None:
        return None
    try:
        matcher = LLMatcher(tokenizer, _grammar(params), log_level=0)
        matcher.compute_bitmask()  # a grammar that no text can match shows here
        problem = _one_line(matcher.get_error())
    except Exception as error:  # a bare one is what the translator of GBNF raises
        problem = _one_line(str(error))
    if problem:
        raise ValueError(f"{kind}: {problem}; {REMEDIES[kind]}")
    return matcher


def _grammar(params: SamplingParams) -> str:
    """Translate what a request asks for into what llguidance reads."""
    if params.json_schema is not None:
        schema = dict(params.json_schema) or {"type": "object"}
        return LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_pattern": JSON_WHITESPACE}
        )
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    assert params.grammar is not None
    if re.search(r"^\s*root\s*::=", params.grammar, re.MULTILINE):
        return LLMatcher.grammar_from_lark(gbnf_to_lark(params.grammar))
    return LLMatcher.grammar_from_lark(params.grammar)


def _one_line(problem: str) -> str:
    """Return what llguidance says without its drawing of the place and its dump of the parser."""
    lines = problem.partition("<state>")[0].splitlines()
    told = [line for line in lines if not re.fullmatch(r"\s*(\d+ \|.*|\^+\s*|<.*>)?", line)]
    return " ".join(" ".join(told).split()).replace("NoExtensionBias", "no text can match it")
