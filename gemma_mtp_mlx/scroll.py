"""An answer that grows on a terminal: what is over is printed once, the rest is redrawn."""

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.segment import SegmentLines
from rich.text import Text

from gemma_mtp_mlx.markdown import Growing, Line, Look, render

DRAW_S = 0.08  # between two times that it is drawn


class Scroll:
    """An answer that grows, over a line of words. Its width is the terminal's when it began."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._options = console.options
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._growing: Growing | None = None
        self._waiting = ""  # not given to it yet
        self._over: list[Line] = []  # to be printed for good
        self._shown = 0  # lines of the unfinished block that are
        self._gap = False  # whether a blank line comes before what is next
        self._drawn = -DRAW_S

    def __enter__(self) -> "Scroll":
        self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self._end()
            self._write([])
        finally:
            self._live.stop()

    def add(self, look: Look, text: str) -> None:
        """Append text. A blank line parts one look from another."""
        if not text:
            return
        if self._growing is not None and self._growing.look != look:
            self._end()
        if self._growing is None:
            self._growing = Growing(look)
        self._waiting += text

    def draw(self, words: str) -> None:
        """Show how far the answer is, if it is time, over a line with words."""
        now = time.monotonic()
        if now - self._drawn < DRAW_S:
            return
        self._drawn = now
        lines = [] if self._growing is None else self._advance(self._growing)
        self._write([SegmentLines(lines, new_lines=True), Text(words, "dim")])

    def _advance(self, growing: Growing) -> list[Line]:
        """Give the growing text what came. Returns what is to be redrawn."""
        self._finish(growing, growing.add(self._waiting))
        self._waiting = ""
        lines = self._lines(growing, growing.rest)
        room = max(self._console.height - 3, 3)
        if growing.lines_stay and len(lines) - room > self._shown:
            self._over += lines[self._shown : -room]
            self._shown = len(lines) - room
        return lines[max(self._shown, len(lines) - room) :]

    def _end(self) -> None:
        """Take the growing text as over."""
        if self._growing is not None:
            blocks = self._growing.add(self._waiting)
            self._finish(self._growing, [*blocks, *self._growing.finish()])
            self._waiting = ""
            self._gap = True
            self._growing = None

    def _finish(self, growing: Growing, blocks: list[str]) -> None:
        for block in blocks:
            lines = self._lines(growing, block)
            self._over += lines[self._shown :]
            self._shown = 0
            if lines:
                self._gap = growing.look == "markdown"

    def _lines(self, growing: Growing, block: str) -> list[Line]:
        lines = render(block, growing.look, self._console, self._options)
        return [[], *lines] if lines and self._gap else lines

    def _write(self, live: list[RenderableType]) -> None:
        """Print what is over, above what is redrawn, in one go."""
        self._live.update(Group(*live))
        if self._over:
            self._console.print(SegmentLines(self._over, new_lines=True), end="")
            self._over = []
        else:
            self._live.refresh()
