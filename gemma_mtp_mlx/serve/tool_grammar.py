"""A grammar that makes a model call a tool: Gemma 4's spelling of calls, for llguidance.

    <|tool_call>call:NAME{key:<|"|>text<|"|>,other:[1,true,{deep:null}]}<tool_call|>

The markers are single special tokens, which no text of the model can spell.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

QUOTE = '<|"|>'
_RULES = r"""
object: "{" (pair ("," pair)*)? "}"
pair: KEY ":" value
value: text | NUMBER | "true" | "false" | "null" | object | array
array: "[" (value ("," value)*)? "]"
KEY: /[A-Za-z_][A-Za-z0-9_]*/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?/
TEXT: /(.|\n)+/
"""


@dataclass(frozen=True, slots=True)
class Markers:
    """The ids of the tokens that begin a call, end it, and quote a text in it."""

    start: int
    end: int
    quote: int

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper) -> "Markers | None":
        """Return a tokenizer's, or None if it does not have them."""
        quote = tokenizer.get_vocab().get(QUOTE)
        if not tokenizer.has_tool_calling or quote is None:
            return None
        start, end = tokenizer.tool_call_start_tokens, tokenizer.tool_call_end_tokens
        return cls(start[0], end[0], quote) if len(start) == len(end) == 1 else None


def answer_grammar(
    names: Sequence[str], markers: Markers, *, several: bool, schema: Mapping[str, Any] | None
) -> str:
    """Return the grammar, in Lark, of answers that call one of these functions.

    several: whether they may make more calls than one. schema: of JSON that may be the answer
    instead, None if a call has to be made.
    """
    calls = "call+" if several else "call"
    instead = "" if schema is None else f" | json\njson: %json {json.dumps(schema or _OBJECT)}"
    spelled = " | ".join(json.dumps(name) for name in names)
    return (
        f"start: {calls}{instead}\n"
        f'call: <[{markers.start}]> "call:" name object <[{markers.end}]>\n'
        f"name: {spelled}\n"
        f"text: <[{markers.quote}]> TEXT? <[{markers.quote}]>"
        f"{_RULES}"
    )


_OBJECT = {"type": "object"}
