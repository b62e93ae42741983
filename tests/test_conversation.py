"""A conversation comes back from its file as it was, and a file that holds another is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_mtp_mlx.conversation import Conversation, Turn, load

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TURNS = st.builds(Turn, TEXTS, TEXTS, TEXTS, st.booleans())
USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@given(st.none() | TEXTS, st.lists(TURNS, max_size=3))
def test_what_was_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, system: str | None, turns: list[Turn]
) -> None:
    file = tmp_path_factory.getbasetemp() / "conversation.json"
    saved = Conversation(system, turns)
    saved.save(file)
    assert load(file) == saved
    assert not list(file.parent.glob("*.part"))


def test_messages_are_what_was_said_without_the_thinking() -> None:
    talk = Conversation("s", [Turn("q", "a", "hm", stopped=True)])
    assert talk.messages("q") == [SYSTEM, USER, ASSISTANT, USER]
    assert Conversation().messages("q") == [USER]


def test_a_text_to_be_continued_goes_on_where_the_answer_ended() -> None:
    talk = Conversation(None, [Turn("def f(x):", "\n    return x\n\n")])
    assert talk.text("def g") == "def f(x):\n    return x\n\ndef g"
    assert Conversation().text("x") == "x"


@pytest.mark.parametrize(
    "content, problem",
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe{", "it is not JSON"),
        ([], "is not an object"),
        ({}, 'no list of "messages"'),
        ({"messages": {}}, 'no list of "messages"'),
        ({"messages": [1]}, "message 1: 1 is not an object"),
        ({"messages": [{"role": "tool", "content": ""}]}, "message 1: role is 'tool'"),
        ({"messages": [{"role": "user"}]}, "message 1: content is None; it must be a text"),
        ({"messages": [{**USER, "content": ["a"]}]}, "content is ['a']; it must be a text"),
        ({"messages": [{**USER, "content": "\ud800"}]}, "message 1: content is "),
        ({"messages": [{**USER, "name": "x"}]}, "message 1: 'name' is not known of the user"),
        ({"messages": [USER, {**ASSISTANT, "stopped": 1}]}, "message 2: stopped is 1"),
        ({"messages": [USER, USER]}, "message 2 is the user's and must be the assistant's"),
        ({"messages": [ASSISTANT]}, "message 1 is the assistant's and must be the user's"),
        ({"messages": [USER, ASSISTANT, SYSTEM]}, "message 3 is the system's"),
        ({"messages": [SYSTEM, USER]}, "message 2 is a question without an answer"),
    ],
)
def test_another_file_is_refused_in_one_line_and_not_overwritten(
    tmp_path: Path, content: Any, problem: str
) -> None:
    file = tmp_path / "file.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"file\.json: ") as refused:
        load(file)
    message = str(refused.value)
    assert problem in message and "\n" not in message and len(message) < 300
    with pytest.raises(ValueError, match="no conversation; name another"):
        Conversation().save(file)
    assert file.read_bytes() == before


def test_an_older_conversation_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    Conversation("old").save(file)
    Conversation("new").save(file)
    assert load(file).system == "new"
