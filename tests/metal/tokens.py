"""The tokens of a C++ text."""

import re

_TOKEN = re.compile(
    r"""
      //[^\n]* | /\*.*?\*/                      # comments
    | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*'     # strings, characters
    | ^[ \t]*\#(?:\\\n|[^\n])*                  # directives
    | [A-Za-z_]\w*                              # words
    | \.?\d(?:[eEpP][+-]|[\w.])*                # numbers
    | :: | -> | \s+ | .
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
WORD = re.compile(r"[A-Za-z_]\w*")


def split(text: str) -> list[str]:
    """Return the tokens of a text, which joined are the text."""
    return _TOKEN.findall(text)


def is_blank(token: str) -> bool:
    """Return whether a token is space, a comment or a directive."""
    return token.isspace() or token.startswith(("//", "/*")) or token.lstrip().startswith("#")


def without_comments(text: str) -> str:
    """Blank out comments; every other character keeps its place."""
    return "".join(
        re.sub(r"[^\n]", " ", token) if token.startswith(("//", "/*")) else token
        for token in split(text)
    )
