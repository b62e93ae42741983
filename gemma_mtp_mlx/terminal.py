"""A chat on a terminal: a prompt with history and editing, answers while they grow."""

import sys
import termios
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from gemma_mtp_mlx.chat import Chat
from gemma_mtp_mlx.chat_report import ending, fitting, progress, status
from gemma_mtp_mlx.markdown import shown
from gemma_mtp_mlx.scroll import Scroll

THEME = Theme({"markdown.code": "cyan", "markdown.h1": "bold", "markdown.h2": "bold"})


class Terminal:
    """Where questions are typed and answers are shown. hide_thinking: thinking is only counted."""

    def __init__(self, hide_thinking: bool) -> None:
        self._hide = hide_thinking
        self._console = Console(theme=THEME, highlight=False)
        self._prompt: PromptSession[str] = PromptSession(
            history=InMemoryHistory(), key_bindings=_keys(), multiline=True
        )

    def read(self) -> str | None:
        """Let a line be typed, or several. Returns None if the chat is over (Ctrl-D)."""
        while True:
            try:
                return self._prompt.prompt(HTML("<b>&gt;</b> "), prompt_continuation="  ")
            except KeyboardInterrupt:
                self.say(["Ctrl-D or /exit ends the chat"])
            except EOFError:
                return None

    def say(self, lines: Iterable[str]) -> None:
        """Show lines that are about the chat, not of it."""
        for line in lines:
            self._console.print(Text(shown(line), style="dim"))

    def fail(self, problem: str) -> None:
        """Show what cannot be done."""
        self._console.print(Text(shown(problem), style="red"))

    def show(self, chat: Chat, question: str) -> None:
        """Ask, and show the answer while it is generated, then what it cost."""
        with _silent_keys(), Scroll(self._console) as screen:
            for piece in chat.ask(question):
                stats, hidden = chat.running, False
                if piece.kind == "reasoning":
                    hidden = self._hide
                    if not hidden:
                        screen.add("dim", piece.text)
                else:
                    screen.add("markdown" if chat.template else "plain", piece.text)
                assert stats is not None
                words = [*(["thinking"] if hidden else []), *progress(stats), "Ctrl-C stops"]
                screen.draw(fitting(words, self._console.width))
        answer = chat.answers[-1]
        cut = ending(answer, chat)
        if cut:
            self._console.print(Text(f"({cut})", style="yellow"))
        self.say([fitting(status(answer, chat.context), self._console.width), ""])


@contextmanager
def _silent_keys() -> Iterator[None]:
    """Do not echo what is typed meanwhile; the next prompt gets it."""
    before = termios.tcgetattr(sys.stdin)
    silent = list(before)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter begins a line; Ctrl-C empties what is typed."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if not event.current_buffer.text:
            raise KeyboardInterrupt
        event.current_buffer.reset()

    return keys
