"""Text that grows on a terminal: which of its blocks are over, and how blocks look."""

from itertools import pairwise
from typing import Literal

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

Look = Literal["markdown", "plain", "dim"]
Line = list[Segment]

# Without HTML: rich leaves it out, and with it the T of List<T>.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
_FENCES = ("```", "~~~")
# A terminal obeys what a model writes as it obeys us: nothing that could move its cursor.
_CONTROL = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if code not in b"\n\t")


def shown(text: str) -> str:
    """Return what a terminal may be given of a text: everything but control characters."""
    return text.translate(_CONTROL)


class Growing:
    """A text that grows. What can no longer change is handed out once, in blocks.

    look: Markdown has blocks of its own; in plain text, and in thinking, which is dim, a block is
    one or more whole lines.
    """

    def __init__(self, look: Look) -> None:
        self.look = look
        self.rest = ""  # the block that is not over

    @property
    def lines_stay(self) -> bool:
        """Whether lines shown of the rest stay as they are, its last ones excepted."""
        return self.look != "markdown" or self.rest.lstrip().startswith(_FENCES)

    def add(self, text: str) -> list[str]:
        """Append what may be shown of a text. Returns the blocks that are over now."""
        self.rest += shown(text)
        whole = self.rest.rfind("\n") + 1
        if self.look == "markdown":
            cuts = [0, *_starts(self.rest[:whole])]
        else:
            cuts = [0, whole] if whole else [0]
        over = [self.rest[a:b] for a, b in pairwise(cuts)]
        self.rest = self.rest[cuts[-1] :]
        return over

    def finish(self) -> list[str]:
        """Return what is left; nothing follows."""
        rest, self.rest = self.rest, ""
        return [rest] if rest.strip() else []


def _starts(text: str) -> list[int]:
    """Return where the Markdown blocks of whole lines begin, but for the first."""
    offsets = [0]
    for line in text.split("\n"):
        offsets.append(offsets[-1] + len(line) + 1)
    blocks = [token.map for token in _PARSER.parse(text) if token.level == 0 and token.map]
    return [offsets[first] for first, _ in blocks[1:]]


def render(block: str, look: Look, console: Console, options: ConsoleOptions) -> list[Line]:
    """Return a block's lines, without blank ones around Markdown and without spaces at the end."""
    if look == "markdown":
        markdown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
        markdown.parsed = _PARSER.parse(block)
        lines = [_stripped(line) for line in console.render_lines(markdown, options, pad=False)]
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            lines.pop(0)
        return lines
    text = Text(block.removesuffix("\n"), style="dim" if look == "dim" else "")
    return [_stripped(line) for line in console.render_lines(text, options, pad=False)]


def _stripped(line: Line) -> Line:
    """Take off the spaces that fill a line up, so that they are not copied with it."""
    kept = list(line)
    while kept:
        last = kept.pop()
        text = last.text.rstrip()
        if text:
            return [*kept, last._replace(text=text)]
    return kept
