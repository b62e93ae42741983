"""Markdown that is shown while it grows is what it would be if it were shown at the end."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gemma_mtp_mlx.markdown import Growing, Line, Look, render

BLOCKS = [
    "# Title\n",
    "A paragraph with `code`, **bold** and a\nsecond line.\n",
    "- one\n- two\n  - nested\n\n- three, after a blank line\n",
    "1. first\n2. second\n",
    "```python\ndef f(x):\n\n    return x\n```\n",
    "~~~\n# no title\n\n- no list\n~~~\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "> a quote\n",
    "    indented code\n",
    "---\n",
    "Title\n===\n",
    "<div>no *tag* here</div>\n",
]
CONSOLE = Console(file=io.StringIO(), width=40, force_terminal=True)


def _text(lines: list[Line]) -> list[str]:
    return ["".join(segment.text for segment in line) for line in lines]


def _shown(block: str, look: Look = "markdown") -> list[str]:
    return _text(render(block, look, CONSOLE, CONSOLE.options))


def _grown(look: Look, pieces: list[str]) -> list[str]:
    growing, blocks = Growing(look), []
    for piece in pieces:
        blocks += growing.add(piece)
    return blocks + growing.finish()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(BLOCKS), max_size=6), st.integers(1, 30))
def test_blocks_are_shown_as_the_whole_is(parts: list[str], size: int) -> None:
    text = "\n".join(parts)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    blocks = _grown("markdown", pieces)
    assert "".join(blocks) == text
    lines = [line for block in blocks for line in _shown(block) if line]
    assert lines == [line for line in _shown(text) if line]


def test_a_block_is_handed_out_before_the_text_ends() -> None:
    growing = Growing("markdown")
    assert growing.add("one\n\ntwo\n\n- a\n") == ["one\n\n", "two\n\n"]
    assert growing.add("- b\n\n  more of b\n") == []
    assert growing.add("#") == []  # a title, or no more than a word
    assert growing.add(" Title\n") == ["- a\n- b\n\n  more of b\n"]


@given(st.text("ab \n", max_size=40), st.integers(1, 5))
def test_plain_text_is_shown_as_it_is(text: str, size: int) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    lines = [line for block in _grown("plain", pieces) for line in _shown(block, "plain")]
    assert [line for line in lines if line] == [
        line for line in map(str.rstrip, text.split("\n")) if line
    ]


@pytest.mark.parametrize(
    "look, text",
    [
        ("markdown", "```python\n" + 'def f(x):\n    """x\n    is long enough to wrap it"""\n' * 5),
        ("plain", "words that go on and on and are wrapped " * 5 + "\n\nx"),
    ],
)
def test_lines_that_are_shown_early_stay(look: Look, text: str) -> None:
    growing, before = Growing(look), list[str]()
    for end in range(len(text)):
        whole = growing.rest + text[end]
        growing.add(text[end])
        lines = _shown(whole, look)
        assert lines[: len(before)] == before
        before = lines[:-3] if growing.rest and growing.lines_stay else []
    assert look == "plain" or len(before) > 10


def test_lines_of_a_table_do_not_stay() -> None:
    growing = Growing("markdown")
    growing.add("| a | b |\n|---|---|\n| 1 | 2 |\n")
    assert not growing.lines_stay


def test_what_looks_like_html_is_shown() -> None:
    assert _shown("A List<T> <b>and</b> more\n") == ["A List<T> <b>and</b> more"]


@pytest.mark.parametrize("look", ["markdown", "plain", "dim"])
def test_a_terminal_is_not_told_what_to_do(look: Look) -> None:
    text = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\re\x7f\n"
    assert _grown(look, [text]) == ["a[2Jb]0;titlec31mde\n"]


def test_nothing_is_copied_with_spaces_at_its_end() -> None:
    text = "```python\nx = 1\n```\n\n> quote\n\ntext\n"
    assert all(line == line.rstrip() for line in _shown(text))
