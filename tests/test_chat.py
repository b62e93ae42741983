"""A chat: answers are the pair's own, prompts are reused, nothing is lost, commands obey."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import DummyInput
from prompt_toolkit.output import DummyOutput

from gemma_mtp_mlx import Pair, SamplingParams, chat_commands, hub, load
from gemma_mtp_mlx.chat import Chat
from gemma_mtp_mlx.chat_report import count, ending, fitting, statistics, status
from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.cli_chat import CONTINUATION
from gemma_mtp_mlx.conversation import Conversation, Turn
from gemma_mtp_mlx.terminal import Terminal
from tests.gemma_text import write_gemma_model

PARAMS = SamplingParams(max_tokens=20)
LONG = "What is it? " * 50  # more than a chunk
MakeChat = Callable[..., Chat]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that never ends by itself, so that a test decides how long an answer is."""
    target = write_gemma_model(tmp_path_factory.mktemp("model"))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    return target


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return load(folder)


@pytest.fixture
def make_chat(pair: Pair) -> MakeChat:
    """Return a function that begins a chat: (params, system, template, positions)."""

    def make(
        params: SamplingParams = PARAMS,
        system: str | None = None,
        template: bool = True,
        positions: int = 3000,
    ) -> Chat:
        session = pair.session(max_batch=1, positions=positions)
        return Chat(session, params, Conversation(system), template)

    return make


def _ask(chat: Chat, question: str) -> str:
    """Return the answer's text, thinking left out."""
    return "".join(piece.text for piece in chat.ask(question) if piece.kind != "reasoning")


def _stopped_after(chat: Chat, question: str, tokens: int) -> str:
    """Ask, and stop when so many tokens are there. Returns the text."""
    text = ""
    for piece in chat.ask(question):
        text += piece.text
        if chat.running is not None and chat.running.generation_tokens >= tokens:
            chat.stop()
    return text


@pytest.mark.parametrize(
    "params", [PARAMS, SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, seed=3)]
)
def test_answers_are_the_pair_s_own(
    make_chat: MakeChat, pair: Pair, params: SamplingParams
) -> None:
    chat = make_chat(params, system="Be brief")
    first, second = _ask(chat, "One?"), _ask(chat, "Two?")
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "One?"}]
    assert first == pair.generate(messages, params).text != ""
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Two?"}]
    assert second == pair.generate(messages, params, num_draft_tokens=0).text
    assert chat.conversation.turns == [Turn("One?", first), Turn("Two?", second)]


def test_a_prompt_takes_over_what_the_last_one_computed(make_chat: MakeChat, pair: Pair) -> None:
    chat = make_chat()
    first = _ask(chat, LONG)
    second = _ask(chat, "And this?")
    messages = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And this?"},
    ]
    assert second == pair.generate(messages, PARAMS).text
    assert [answer.stats.cached_tokens for answer in chat.answers] == [0, 512]
    assert "512 reused" in status(chat.answers[1], chat.context)


def test_without_a_template_the_text_is_continued(make_chat: MakeChat, pair: Pair) -> None:
    chat = make_chat(template=False)
    first = _ask(chat, "def f(x):")
    _ask(chat, "def g(x):")
    whole = "def f(x):" + first.rstrip("\n") + "\n\ndef g(x):"
    expected = pair.generate(pair.encode(whole, template=False), PARAMS)
    assert chat.conversation.turns[1].answer == expected.text


def _forced(pair: Pair, script: str) -> SamplingParams:
    """Return settings under which the model says a text, special tokens included."""
    ids = pair.encode(script, template=False)

    def force(tokens: mx.array, logits: mx.array) -> mx.array:
        spoken = tokens.size - prompt[0]
        wanted = mx.arange(logits.shape[-1]) == ids[min(spoken, len(ids) - 1)]
        return mx.where(wanted, logits, -mx.inf)

    prompt = [len(pair.encode([{"role": "user", "content": "Q"}]))]
    return SamplingParams(max_tokens=len(ids), logits_processors=(force,))


def test_thinking_is_kept_but_not_shown_to_later_questions(make_chat: MakeChat, pair: Pair) -> None:
    chat = make_chat(_forced(pair, "<|channel>thought\nhm, so\n<channel|>Yes"))
    pieces = list(chat.ask("Q"))
    assert "".join(p.text for p in pieces if p.kind == "reasoning") == "hm, so"
    assert chat.conversation.turns == [Turn("Q", "Yes", "hm, so")]
    assert {"role": "assistant", "content": "Yes"} in chat.conversation.messages("Next")


@pytest.mark.parametrize("hide", [False, True])
def test_thinking_is_shown_unless_it_is_to_be_hidden(
    make_chat: MakeChat,
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hide: bool,
) -> None:
    monkeypatch.setattr("gemma_mtp_mlx.terminal._silent_keys", nullcontext)  # there are none
    chat = make_chat(_forced(pair, "<|channel>thought\nhm, so\n<channel|>**Yes**"))
    with create_app_session(input=DummyInput(), output=DummyOutput()):
        Terminal(hide_thinking=hide).show(chat, "Q")
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[:-2] == (["Yes"] if hide else ["hm, so", "Yes"])
    assert "--max-tokens" in lines[-2]  # the model's end is none of these tokens
    assert f"context {chat.answers[0].used} of {chat.context}" in lines[-1]


def test_a_stopped_answer_stays_and_the_chat_goes_on(make_chat: MakeChat, pair: Pair) -> None:
    chat = make_chat(SamplingParams(max_tokens=1000))
    text = _stopped_after(chat, "One?", 5)
    assert chat.conversation.turns == [Turn("One?", text, stopped=True)]
    answer = chat.answers[0]
    assert answer.end == "stopped" and 5 <= answer.stats.generation_tokens < 100
    assert ending(answer, chat) == "stopped"
    chat.params = PARAMS
    second = _ask(chat, "Two?")
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "Two?"},
    ]
    assert second == pair.generate(messages, PARAMS).text


def test_what_is_stopped_before_it_began_was_not_asked(make_chat: MakeChat) -> None:
    chat = make_chat()
    assert _stopped_after(chat, LONG * 2, 0) == ""
    assert not chat.conversation.turns
    assert "the question is forgotten" in ending(chat.answers[0], chat)
    assert _ask(chat, "Two?") and len(chat.conversation.turns) == 1
    assert "Answers: 2, 1 of them stopped" in statistics(chat)


def test_an_answer_that_is_left_does_not_disturb_the_next(make_chat: MakeChat, pair: Pair) -> None:
    chat = make_chat()
    answer = chat.ask("One?")
    next(answer)
    answer.close()
    assert not chat.conversation.turns and chat.running is None
    assert _ask(chat, "Two?") == pair.generate("Two?", PARAMS).text


def test_a_full_context_is_said_with_the_numbers_and_loses_nothing(make_chat: MakeChat) -> None:
    chat = make_chat(positions=100)
    assert chat.context == 84
    _ask(chat, "x" * 20)
    assert chat.answers[0].end == "max_tokens"
    assert "--max-tokens" in ending(chat.answers[0], chat)
    before = list(chat.conversation.turns)
    with pytest.raises(ValueError, match=r"has \d+ tokens and the context is 84; /save") as refused:
        _ask(chat, "y" * 60)
    assert "\n" not in str(refused.value) and chat.conversation.turns == before
    chat.begin(Conversation())
    _ask(chat, "x" * 50)
    answer = chat.answers[0]
    assert (answer.end, answer.used) == ("context", 84)
    assert "84 tokens is full; /save" in ending(answer, chat)


def test_what_fails_leaves_the_conversation_as_it_was(make_chat: MakeChat) -> None:
    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        raise KeyError("broken")

    chat = make_chat(SamplingParams(logits_processors=(fail,)))
    with pytest.raises(ValueError, match=r"the answer failed: .*broken"):
        _ask(chat, "One?")
    assert not chat.conversation.turns and not chat.answers and chat.running is None


@pytest.mark.parametrize(
    "line, question",
    [
        (" x ", "x"),
        ("//etc/hosts?", "/etc/hosts?"),
        ("/stats", None),
        ("/nothing", None),
        ("", ""),
        ("a\n/b", "a\n/b"),
    ],
)
def test_a_slash_begins_a_command_and_two_a_text(line: str, question: str | None) -> None:
    assert chat_commands.question_in(line) == question


def test_commands(make_chat: MakeChat, tmp_path: Path) -> None:
    chat, file = make_chat(), tmp_path / "talk.json"
    assert chat_commands.run(chat, "/exit") is None
    assert chat_commands.run(chat, "/stats") == ["Nothing was asked yet"]
    chat_commands.run(chat, "/system Be brief")
    assert chat_commands.run(chat, "/system") == ["Be brief"]
    text = _ask(chat, "One?")
    chat_commands.run(chat, f"/save {file}")
    chat_commands.run(chat, "/reset")
    assert chat.conversation == Conversation("Be brief") and not chat.answers
    chat_commands.run(chat, "/system -")
    assert chat.conversation.system is None
    lines = chat_commands.run(chat, f"/load {file}")
    assert lines == [f"Loaded 1 question from {file}", "The last one: One?"]
    assert chat.conversation == Conversation("Be brief", [Turn("One?", text)])
    listed = chat_commands.run(chat, "/help")
    assert listed is not None
    assert {line.split()[0] for line in listed} >= set(chat_commands.COMMANDS)


@pytest.mark.parametrize(
    "line, problem",
    [
        ("/nothing", "no command /nothing; /help"),
        ("/save", "/save FILE"),
        ("/load", "/load FILE"),
        ("/load /nowhere/at.all", "No such file"),
        ("/save /nowhere/at.all", "No such file"),
        ("/system x", "needs a chat template"),
    ],
)
def test_what_cannot_be_done_changes_nothing(make_chat: MakeChat, line: str, problem: str) -> None:
    chat = make_chat(template=False)
    with pytest.raises((ValueError, OSError), match=problem):
        chat_commands.run(chat, line)
    assert chat.conversation == Conversation()


def test_statistics_are_the_sums_of_the_answers(make_chat: MakeChat) -> None:
    chat = make_chat()
    for question in ("One?", "Two?"):
        _ask(chat, question)
    every = [answer.stats for answer in chat.answers]
    lines = "\n".join(statistics(chat))
    drafted = sum(stats.draft_n for stats in every)
    accepted = sum(stats.draft_n_accepted for stats in every)
    for words in (
        "Answers: 2\n",
        f"Prompts: {sum(stats.prompt_tokens for stats in every)} tokens",
        "Generation: 40 tokens",
        f"{accepted / drafted:.0%} of {drafted} accepted" if drafted else "Drafts: none",
        f"Context: {chat.answers[-1].used} of {chat.context} tokens",
    ):
        assert words in lines


def test_a_status_line_says_what_fits() -> None:
    parts = ["12.3 tokens/s", "50% accepted", "context 12 of 99"]
    assert fitting(parts, 80) == "12.3 tokens/s · 50% accepted · context 12 of 99"
    assert fitting(parts, 30) == "12.3 tokens/s · 50% accepted"
    assert fitting(parts, 5) == "12.3 "
    assert (count(1, "question"), count(2, "question")) == ("1 question", "2 questions")


def _options(folder: Path, *more: str) -> list[str]:
    return ["chat", "--model", str(folder), "--max-tokens", "20", *more]


def test_lines_of_a_pipe_are_questions(folder: Path, make_chat: MakeChat) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "gemma_mtp_mlx", *_options(folder)],
        input=b"One?\n\n//two\n/stats\n",
        capture_output=True,
        timeout=300,
        check=False,
    )
    chat = make_chat()
    expected = "".join(_ask(chat, question) + "\n" for question in ("One?", "/two"))
    assert (done.returncode, done.stdout.decode()) == (0, expected)
    assert b"Answers: 2" in done.stderr and b"Traceback" not in done.stderr


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Return a function that puts lines where the program reads from."""
    return lambda data: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_line_that_cannot_be_done_fails_the_run_but_not_the_others(
    folder: Path, pipe: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(b"/nothing\n" + b"One?" * 20 + b"\n/load /nowhere/at.all\nTwo?\n/exit\nThree?")
    assert main(_options(folder, "--context", "60")) == 1
    shown = capsys.readouterr()
    assert shown.out.count("\n") >= 1
    problems = [line for line in shown.err.splitlines() if "error" in line]
    for number, (line, problem) in enumerate(
        zip(problems, ("no command /nothing", "the context is 60", "No such file"), strict=True), 1
    ):
        assert line.startswith(f"mlx-gemma-mtp: error: line {number}: ") and problem in line
    assert "cut after 20 tokens; --max-tokens allows more" in shown.err


def test_the_built_in_pair_continues_what_is_typed(
    pipe: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(b"def mean(xs):\n")
    assert main(["chat"]) == 0
    pair = load(hub.builtin())
    ids = pair.encode("def mean(xs):", template=False)
    expected = pair.generate(ids, SamplingParams(max_tokens=CONTINUATION))
    assert capsys.readouterr().out == expected.text + "\n"


@pytest.mark.parametrize(
    "data, options, problem",
    [
        (b"x", ("--context", "0"), "--context is 0"),
        (b"x", ("--ignore-chat-template", "--system-prompt", "s"), "needs a chat template"),
        (b"x", ("--thinking-budget", "3"), "the model names no EOS token"),
        (b"\xff\n", (), "standard input, line 1: byte 0 is not UTF-8"),
    ],
)
def test_what_is_wrong_from_the_start_is_one_line(
    folder: Path,
    pipe: Callable[[bytes], None],
    capsys: pytest.CaptureFixture[str],
    data: bytes,
    options: tuple[str, ...],
    problem: str,
) -> None:
    pipe(data)
    assert main(_options(folder, *options)) == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]


def test_without_the_extra_a_terminal_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("gemma_mtp_mlx.cli_chat.find_spec", lambda name: None)
    assert main(["chat"]) == 2
    problem = capsys.readouterr().err
    assert "pip install 'mlx-gemma-mtp[chat]'" in problem and problem.count("\n") == 1
