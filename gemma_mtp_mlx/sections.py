"""From token ids to what a model says in them: its thinking, its text and its tool calls.

Where one ends and the next begins is told by special tokens, which are not in decoded text, so
tokens are split, not text.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper

from gemma_mtp_mlx.constraint import Thinking
from gemma_mtp_mlx.tokens import TextStream

Kind = Literal["reasoning", "text", "tool_call"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain of an answer. Reasoning and text come in parts, tool calls whole.

    text: of a tool call all of it, its special tokens included; calls: what it says, never empty.
    """

    kind: Kind
    text: str
    calls: tuple[ToolCall, ...] = ()


class SectionStream:
    """The sections of one answer's tokens; a stop text in its text ends it and is cut off.

    kinds: of the tokens so far, as far as they are certain; a marker is of the kind it opens or
    closes. text: all of kind "text", as far as it is certain. A stop text counts in one stretch of
    text, not in reasoning or tool calls. What looks like a tool call and is none is text.
    """

    def __init__(self, tokenizer: TokenizerWrapper, stop: tuple[str, ...] = ()) -> None:
        self.kinds: list[Kind] = []
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = stop
        self._opens: dict[tuple[int, ...], Kind] = {}
        self._closes: dict[Kind, tuple[int, ...]] = {}
        thinking = Thinking.of(tokenizer)
        if thinking is not None:
            self._opens[thinking.start] = "reasoning"
            self._closes["reasoning"] = thinking.end
        if tokenizer.has_tool_calling and tokenizer.tool_call_end_tokens:
            self._opens[tuple(tokenizer.tool_call_start_tokens)] = "tool_call"
            self._closes["tool_call"] = tuple(tokenizer.tool_call_end_tokens)
        self._held: deque[int] = deque()  # may turn out to be a marker
        self._pieces: list[Piece] = []  # not taken yet
        self._ended = False
        self._begin("text")

    def add(self, token: int) -> bool:
        """Take one more token. Returns whether a stop text is now complete."""
        if not self._ended:
            self._held.append(token)
            self._settle(final=False)
        return self._ended

    def finish(self) -> None:
        """Decode what waits for more; nothing follows."""
        if not self._ended:
            self._settle(final=True)
            self._end()
            self._ended = True

    def take(self) -> list[Piece]:
        """Return what became certain since the last call, neighbours of one kind joined."""
        self._show(self._section.take())
        taken, self._pieces = self._pieces, []
        return taken

    def _settle(self, *, final: bool) -> None:
        """Give held tokens to their sections, but for those that may yet be a marker."""
        while self._held and not self._ended:
            held = tuple(self._held)
            awaited = self._awaited()
            if held in awaited:
                self._switch(held)
            elif not final and any(mark[: len(held)] == held for mark in awaited):
                return
            else:
                self.kinds.append(self._kind)
                self._ended = self._section.add(self._held.popleft())
        if self._ended:
            self.kinds += [self._kind] * len(self._held)
            self._held.clear()

    def _awaited(self) -> Sequence[tuple[int, ...]]:
        return list(self._opens) if self._kind == "text" else [self._closes[self._kind]]

    def _switch(self, mark: tuple[int, ...]) -> None:
        """Pass over a marker into the section behind it."""
        opened = self._opens[mark] if self._kind == "text" else None
        self.kinds += [opened or self._kind] * len(mark)
        self._held.clear()
        self._end(() if opened else mark)
        self._begin(opened or "text", mark)

    def _begin(self, kind: Kind, mark: Sequence[int] = ()) -> None:
        self._kind: Kind = kind
        self._section: _Text | _Call
        if kind == "tool_call":
            self._section = _Call(self._tokenizer, mark)
        else:
            self._section = _Text(self._tokenizer, kind, self._stop if kind == "text" else ())

    def _end(self, mark: Sequence[int] = ()) -> None:
        """Show the rest of a section, which the marker closes."""
        self._section.finish(mark)
        self._show(self._section.take())

    def _show(self, piece: Piece | None) -> None:
        if piece is None:
            return
        if piece.kind == "text":
            self.text += piece.text
        last = self._pieces[-1] if self._pieces else None
        if last is not None and last.kind == piece.kind != "tool_call":
            self._pieces[-1] = Piece(piece.kind, last.text + piece.text)
        else:
            self._pieces.append(piece)


class _Text:
    """A stretch of text or reasoning. Reasoning stands between line ends, which are dropped."""

    def __init__(self, tokenizer: TokenizerWrapper, kind: Kind, stop: tuple[str, ...]) -> None:
        self._kind = kind
        self._stream = TextStream(tokenizer, stop)
        self._begun = self._finished = False
        self._held = ""  # the end of a line, which may be the last one

    def add(self, token: int) -> bool:
        return self._stream.add(token)

    def finish(self, mark: Sequence[int] = ()) -> None:
        self._stream.finish()
        self._finished = True

    def take(self) -> Piece | None:
        text = self._stream.take()
        if self._kind == "reasoning":
            text = self._between_lines(text)
        return Piece(self._kind, text) if text else None

    def _between_lines(self, text: str) -> str:
        if text and not self._begun:
            self._begun, text = True, text.removeprefix("\n")
        text = self._held + text
        shown = text.removesuffix("\n")
        self._held = "" if self._finished else text[len(shown) :]
        return shown


class _Call:
    """What stands in one pair of a tool call's markers."""

    def __init__(self, tokenizer: TokenizerWrapper, mark: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._mark, self._inside = list(mark), list[int]()
        self._piece: Piece | None = None

    def add(self, token: int) -> bool:
        self._inside.append(token)
        return False

    def finish(self, mark: Sequence[int] = ()) -> None:
        whole = self._decode([*self._mark, *self._inside, *mark])
        calls = parse_calls(self._tokenizer, self._decode(self._inside))
        self._piece = Piece("tool_call", whole, calls) if calls else Piece("text", whole)

    def take(self) -> Piece | None:
        piece, self._piece = self._piece, None
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))


def parse_calls(tokenizer: TokenizerWrapper, text: str) -> tuple[ToolCall, ...]:
    """Read what stands between the markers of a tool call; nothing if it cannot be read."""
    try:
        found = tokenizer.tool_parser(text, None)
        calls = found if isinstance(found, list) else [found]
        read = tuple(ToolCall(call["name"], dict(call["arguments"])) for call in calls)
        return read if all(_is_finite(call.arguments) for call in read) else ()
    except Exception:  # whatever a parser raises, it is the model's text that is no call
        return ()


def _is_finite(value: Any) -> bool:
    """Whether JSON can spell it: NaN and the infinities are none of its numbers."""
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
