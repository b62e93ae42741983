"""A chat in a real terminal, driven through tmux as somebody would at its keys."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from gemma_mtp_mlx.markdown import render
from gemma_mtp_mlx.scroll import Scroll
from gemma_mtp_mlx.terminal import Terminal
from tests.gemma_text import write_gemma_model

needs_tmux = pytest.mark.skipif(
    shutil.which("tmux") is None, reason="tmux is missing: NO TERMINAL IS TESTED"
)
PATIENCE_S = 120
STATUS = r"\n\d[^\n]* tokens/s · [^\n]*context \d+ of \d+"
PROMPT = r"\n>\s*$"
# Ctrl-C is for the command; the shell stays to say how it ended.
SHELL = 'trap : INT; "$@"; echo "exit code $?"; sleep 1000'
GROW = """\
import sys
from rich.console import Console
from gemma_mtp_mlx import scroll
scroll.DRAW_S = 0
text, size = sys.argv[1], int(sys.argv[2])
with scroll.Scroll(Console(highlight=False)) as answer:
    answer.add("dim", "so I think\\nabout it\\n")
    for at in range(0, len(text), size):
        answer.add("markdown", text[at : at + size])
        answer.draw(f"drawn {at}")
"""
TEXT = (
    "# Title\n\nA paragraph of `code`, and of words that need more than one line of so few "
    "columns.\n\n- a list\n"
    + "- longer than the screen\n" * 12
    + "\n```python\n"
    + "".join(f"line_{n} = {n}\n" for n in range(20))
    + "```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nIts last words\n"
)


class Tmux:
    """A terminal of its own, in which a command runs."""

    def __init__(self, columns: int, lines: int, command: list[str]) -> None:
        self.folder = tempfile.mkdtemp(prefix="tmux-")
        size = ["-x", str(columns), "-y", str(lines)]
        size = ["-x", str(columns), "-y", str(lines)]
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, "sh", "-c", SHELL, "sh", *command)

    def close(self) -> None:
        """End it, and what runs in it."""
        self._tmux("kill-server")
        shutil.rmtree(self.folder)

    def press(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        self._tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        """Type a text, and Enter."""
        self._tmux("send-keys", "-l", text)
        self.press("Enter")

    def screen(self) -> str:
        """Return everything there is to see, what has scrolled away included."""
        return self._tmux("capture-pane", "-p", "-S", "-")

    def wait(self, pattern: str) -> str:
        """Wait until the screen ends in something like that. Returns it."""
        end = time.monotonic() + PATIENCE_S
        while True:
            screen = self.screen().rstrip() + "\n"
            if re.search(pattern, screen):
                return screen
            assert time.monotonic() < end, f"no {pattern!r} in\n{screen}"
            time.sleep(0.1)

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-u", "-S", f"{self.folder}/socket", *words]
        # Sizes that another terminal's programs, or readline, left behind are none of this one's.
        env = {name: os.environ[name] for name in os.environ if name not in ("COLUMNS", "LINES")}
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=60, env=env
        )
        return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = write_gemma_model(tmp_path)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    return target


@pytest.fixture
def chat(folder: Path) -> Iterator[Tmux]:
    command = [sys.executable, "-P", "-m", "gemma_mtp_mlx", "chat", "--model", str(folder)]
    terminal = Tmux(80, 24, [*command, "--max-tokens", "3500"])
    yield terminal
    terminal.close()


@needs_tmux
def test_a_chat_at_the_keys(chat: Tmux, tmp_path: Path) -> None:
    chat.wait(f"Ctrl-D ends the chat{PROMPT}")
    chat.type("Hello?")
    chat.wait(r"tokens/s · \d{2,} tokens · Ctrl-C stops")
    chat.press("C-c")
    chat.wait(rf"\(stopped\){STATUS}\n*{PROMPT}")
    chat.type("/stats")
    shown = chat.wait(rf"Answers: 1, 1 of them stopped\n(.+\n)+{PROMPT[2:]}")
    generated = re.search(r"Generation: (\d+) tokens, ([\d.]+) per second", shown)
    assert generated is not None and 10 <= int(generated[1]) < 3500 and float(generated[2]) > 0
    assert re.search(r"Drafts: [\d.]+ tokens per round|Drafts: none", shown)

    file = tmp_path / "talk.json"
    chat.type(f"/save {file}")
    chat.wait(rf"Saved 1 question to\s[^>]*{PROMPT}")
    question, answer = json.loads(file.read_text())["messages"]
    assert question == {"role": "user", "content": "Hello?"}
    assert answer["stopped"] and answer["content"]

    chat.press("Up", "Up", "Up")  # through what was typed
    chat.wait(r"\n> Hello\?\s*$")
    chat.press("C-c")  # empties the line
    chat.wait(PROMPT)
    chat.press("C-c")
    chat.wait(rf"Ctrl-D or /exit ends the chat{PROMPT}")
    chat.press("a", "M-Enter", "b", "Enter")
    chat.wait(r"> a\n  b\n(.*\n)+.*tokens/s · \d+ tokens · Ctrl-C stops")
    chat.press("C-c")
    chat.wait(rf"\n  b\n(.*\n)+\(stopped\){STATUS}\n*{PROMPT}")
    chat.type("/exit")
    chat.wait(r"\nexit code 0\n$")


@pytest.mark.parametrize(
    "keys, line",
    [
        ("abc\r", "abc"),
        ("a\x1b\rb\r", "a\nb"),  # Alt-Enter
        ("\x1b[200~a\nb\x1b[201~\r", "a\nb"),  # pasted
        ("ac\x1b[Db\r", "abc"),  # an arrow
        ("abc\x03d\r", "d"),  # Ctrl-C
        ("\x03x\r", "x"),
        ("\x04", None),  # Ctrl-D
    ],
)
def test_a_line_is_edited(keys: str, line: str | None) -> None:
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text(keys)
        assert Terminal(hide_thinking=False).read() == line


@needs_tmux
def test_what_has_grown_stands_on_the_terminal_once() -> None:
    """Longer than the screen, in the end as it would be if it had been shown at once."""
    terminal = Tmux(40, 12, [sys.executable, "-P", "-c", GROW, TEXT, "3"])
    try:
        shown = terminal.wait(r"\nexit code 0\n$")
    finally:
        terminal.close()
    console = Console(width=40, force_terminal=True)
    lines = [
        "".join(s.text for s in line) for line in render(TEXT, "markdown", console, console.options)
    ]
    expected = ["so I think", "about it", *lines, "exit code 0"]
    found = [line for line in shown.splitlines() if line.strip()]
    assert found == [line for line in expected if line]


def test_what_a_file_says_does_not_reach_the_terminal_s_controls(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        Terminal(hide_thinking=False).say(["a\x1b]0;title\x07b"])
        Terminal(hide_thinking=False).fail("c\x9b2Jd")
    assert capsys.readouterr().out == "a]0;titleb\nc2Jd\n"


def test_the_end_of_what_is_longer_than_the_screen_is_redrawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gemma_mtp_mlx.scroll.DRAW_S", 0)
    shown = io.StringIO()
    console = Console(file=shown, width=40, height=12, force_terminal=True, color_system=None)
    with Scroll(console) as answer:
        answer.add("markdown", "".join(f"- item {n}\n" for n in range(20)))
        answer.draw("drawn")
        frame = shown.getvalue()
    assert [f"item {n}\n" in frame for n in (0, 19)] == [False, True]
    assert "drawn" in frame
    assert shown.getvalue().count("item 0\n") == 1
