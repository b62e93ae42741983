"""An answer splits into thinking, text and tool calls, the same however its tokens arrive."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from gemma_mtp_mlx import hub
from gemma_mtp_mlx.sections import Kind, Piece, SectionStream, ToolCall
from gemma_mtp_mlx.tokens import TextStream
from tests.gemma_text import write_tokenizer

THOUGHT = "<|channel>thought\nhm\n\nso\n<channel|>"
CALL = '<|tool_call>call:f{a:<|"|>x{,}日<|"|>,b:[1,{c:true}]}<tool_call|>'
CALLED = ToolCall("f", {"a": "x{,}日", "b": [1, {"c": True}]})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return load(write_tokenizer(folder))


def split(
    tokenizer: TokenizerWrapper,
    tokens: Sequence[int],
    stop: tuple[str, ...] = (),
    ends: Sequence[int] = (),
) -> list[Piece]:
    """Return the pieces, taken after each of the ends, neighbours of a kind joined."""
    stream, pieces = SectionStream(tokenizer, stop), list[Piece]()
    for place, token in enumerate(tokens):
        ended = stream.add(token)
        if place in ends:
            pieces += stream.take()
        if ended:
            break
    stream.finish()
    pieces += stream.take()
    assert stream.take() == []
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].kind == piece.kind != "tool_call":
            piece = Piece(piece.kind, joined.pop().text + piece.text)
        joined.append(piece)
    assert "".join(piece.text for piece in joined if piece.kind == "text") == stream.text
    return joined


def spelled(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == text
    return list(ids)


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("plain 日本".replace("本", "é"), [Piece("text", "plain 日é")]),
        (
            THOUGHT + "yes",
            [Piece("reasoning", "hm\n\nso"), Piece("text", "yes")],
        ),
        (CALL, [Piece("tool_call", CALL, (CALLED,))]),
        (
            "one " + CALL + CALL + " two",
            [
                Piece("text", "one "),
                Piece("tool_call", CALL, (CALLED,)),
                Piece("tool_call", CALL, (CALLED,)),
                Piece("text", " two"),
            ],
        ),
        (
            "<|tool_call>call:f{}call:g-1{n:-2.5}<tool_call|>",
            [
                Piece(
                    "tool_call",
                    "<|tool_call>call:f{}call:g-1{n:-2.5}<tool_call|>",
                    (ToolCall("f", {}), ToolCall("g-1", {"n": -2.5})),
                )
            ],
        ),
        # Not a call: text, markers included.
        ("a<|tool_call>what?<tool_call|>b", [Piece("text", "a<|tool_call>what?<tool_call|>b")]),
        (
            "<|tool_call>call:f{n:NaN}<tool_call|>",
            [Piece("text", "<|tool_call>call:f{n:NaN}<tool_call|>")],
        ),
        ("<|tool_call>call:f{a:", [Piece("text", "<|tool_call>call:f{a:")]),
        # Complete but for its marker: a text may end there.
        (
            "<|tool_call>call:f{a:1}",
            [Piece("tool_call", "<|tool_call>call:f{a:1}", (ToolCall("f", {"a": 1}),))],
        ),
        # Half a marker, and one that closes nothing.
        ("a<|channel>thou", [Piece("text", "athou")]),
        (
            "<|channel>though<|channel>thought\nx<channel|>",
            [Piece("text", "though"), Piece("reasoning", "x")],
        ),
        ("a<channel|>b<tool_call|>c", [Piece("text", "abc")]),
        (THOUGHT[:-10], [Piece("reasoning", "hm\n\nso")]),
        ("", []),
    ],
)
def test_sections(tokenizer: TokenizerWrapper, text: str, pieces: list[Piece]) -> None:
    tokens = spelled(tokenizer, text)
    assert split(tokenizer, tokens) == pieces
    assert split(tokenizer, tokens, ends=range(len(tokens))) == pieces


PARTS = [
    *("a", " stop", "sto", "日", "é\n", "🙂", "\n", "thought", "call:g{", "}", '<|"|>'),
    *("<|channel>", "<|channel>thought", "<channel|>", "<|tool_call>", "<tool_call|>"),
    *(THOUGHT, CALL),
]


@settings(deadline=None)
@given(data=st.data())
def test_pieces_do_not_depend_on_how_tokens_arrive(
    tokenizer: TokenizerWrapper, data: st.DataObject
) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(PARTS), max_size=8)))
    tokens = spelled(tokenizer, text)
    tokens = tokens[: len(tokens) - data.draw(st.integers(0, 3))]  # it may end in a character
    ends = data.draw(st.just(range(len(tokens))) | st.lists(st.integers(0, len(tokens))))
    stop = data.draw(st.sampled_from([(), ("stop",), ("\n", "aa"), ("日",)]))
    whole = split(tokenizer, tokens, stop)
    assert split(tokenizer, tokens, stop, ends) == whole


@settings(deadline=None)
@given(data=st.data())
def test_without_markers_it_is_a_text_stream(
    tokenizer: TokenizerWrapper, data: st.DataObject
) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(PARTS[:10]), max_size=8)))
    stop = data.draw(st.sampled_from([(), ("stop",), ("\n", "aa"), ("日",)]))
    stream, plain = SectionStream(tokenizer, stop), TextStream(tokenizer, stop)
    for token in spelled(tokenizer, text):
        ended = plain.add(token)
        assert stream.add(token) == ended
        assert "".join(piece.text for piece in stream.take()) == plain.take()
        if ended:
            break


def test_a_stop_text_ends_text_only(tokenizer: TokenizerWrapper) -> None:
    def said(text: str) -> list[Piece]:
        return split(tokenizer, spelled(tokenizer, text), ("so", "f{"))

    assert said(THOUGHT + "yes, so what") == [
        Piece("reasoning", "hm\n\nso"),
        Piece("text", "yes, "),
    ]
    assert said(CALL) == [Piece("tool_call", CALL, (CALLED,))]
    assert said("s" + THOUGHT + "o") == [
        Piece("text", "s"),
        Piece("reasoning", "hm\n\nso"),
        Piece("text", "o"),
    ]


def test_every_token_has_a_kind(tokenizer: TokenizerWrapper) -> None:
    stream = SectionStream(tokenizer)
    expected: list[Kind] = []
    for text, kind in ((THOUGHT, "reasoning"), ("ab", "text"), (CALL, "tool_call")):
        tokens = spelled(tokenizer, text)
        expected += [kind] * len(tokens)  # type: ignore[list-item]
        for token in tokens:
            stream.add(token)
    stream.finish()
    assert stream.kinds == expected


def test_a_tokenizer_without_markers_has_text_only() -> None:
    builtin = load(hub.builtin())
    text = "def f():\n    return '日' # <tool_call|>"
    tokens = builtin.encode(text, add_special_tokens=False)
    assert split(builtin, tokens, ("'",)) == [Piece("text", "def f():\n    return ")]
