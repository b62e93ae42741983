"""The command chat: questions on a terminal or, a line each, from a pipe."""

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Protocol

from gemma_mtp_mlx.options import (
    NAME,
    DraftModel,
    DraftTokens,
    Fast,
    MinP,
    Model,
    NoTemplate,
    Seed,
    System,
    Temp,
    Think,
    ThinkingBudget,
    TopK,
    TopP,
    flag,
    load_pair,
    opt,
    read_depth,
)
from gemma_mtp_mlx.progress import say

if TYPE_CHECKING:
    from gemma_mtp_mlx.api import Pair
    from gemma_mtp_mlx.chat import Chat

FAILED = 1  # the exit code if a line from a pipe could not be done
ANSWER, CONTINUATION = 2048, 128  # most tokens, if nothing else is said


class Screen(Protocol):
    """Where questions come from and answers go: a terminal, or pipes."""

    def read(self) -> str | None:
        """Return the next line, None after the last one."""

    def say(self, lines: Iterable[str]) -> None:
        """Show lines that are about the chat."""

    def fail(self, problem: str) -> None:
        """Show what cannot be done."""

    def show(self, chat: "Chat", question: str) -> None:
        """Ask, and show the answer while it is generated."""


def chat(
    model: Model = None,
    draft_model: DraftModel = None,
    num_draft_tokens: DraftTokens = "auto",
    fast: Fast = False,
    max_tokens: Annotated[
        int | None, opt("N", "Most tokens of an answer; 2048 if not given.", "--max-tokens", "-m")
    ] = None,
    context: Annotated[
        int,
        opt("N", "Most tokens of a conversation, memory is taken for; or the model's, if less."),
    ] = 32768,
    temp: Temp = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    system_prompt: System = None,
    raw: NoTemplate = False,
    thinking: Think = None,
    thinking_budget: ThinkingBudget = None,
    hide_thinking: Annotated[bool, flag("Do not show the thinking.", "--hide-thinking")] = False,
) -> int:
    """Talk with a model on the terminal.

    From a pipe every line is a question, or a command; answers go to stdout as plain text.
    """
    drafts = read_depth(num_draft_tokens)
    if context < 1:
        raise ValueError(f"--context is {context}; it must be at least 1")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        _check_extra()
    from gemma_mtp_mlx import SamplingParams
    from gemma_mtp_mlx.cache import seat_size
    from gemma_mtp_mlx.chat import Chat
    from gemma_mtp_mlx.conversation import Conversation

    params = SamplingParams(
        max_tokens=ANSWER if max_tokens is None else max_tokens,
        temperature=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        thinking=thinking,
        thinking_budget=thinking_budget,
    )
    pair = load_pair(model, draft_model, fast=fast)
    template = _has_template(pair, raw or model is None)
    if not template and (system_prompt is not None or thinking):
        what = "thinking" if thinking else "a system message"
        raise ValueError(f"{what} needs a chat template, and here text is continued")
    if not template and max_tokens is None:
        params = replace(params, max_tokens=CONTINUATION)
    talk = Conversation(system_prompt)
    pair.prompts.request(
        talk.messages("x") if template else pair.encode("x", template=False), params
    )  # raises what is wrong with options before anything is asked
    most = min(context, pair.target.config.max_position_embeddings)
    session = pair.session(max_batch=1, num_draft_tokens=drafts, positions=seat_size(most))
    held = Chat(session, params, talk, template)
    if not on_terminal:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        return _converse(held, Pipe())
    from gemma_mtp_mlx.terminal import Terminal

    with _ctrl_c(held):
        screen = Terminal(hide_thinking)
        screen.say(_welcome(held))
        _converse(held, screen)
    return 0


class Pipe:
    """Questions from stdin, a line each, answers to stdout and the rest to stderr."""

    def __init__(self) -> None:
        self._line = 0

    def read(self) -> str | None:
        """Return the next line. Raises: ValueError if it is not UTF-8."""
        data = sys.stdin.buffer.readline()
        self._line += 1
        try:
            return data.decode() if data else None
        except UnicodeDecodeError as error:
            where = f"standard input, line {self._line}"
            raise ValueError(f"{where}: byte {error.start} is not UTF-8") from error

    def say(self, lines: Iterable[str]) -> None:
        """Print to stderr."""
        say(*lines)

    def fail(self, problem: str) -> None:
        """Print to stderr, with the line it is about."""
        say(f"{NAME}: error: line {self._line}: {problem}")

    def show(self, chat: "Chat", question: str) -> None:
        """Ask, and print the answer's text, without its thinking."""
        from gemma_mtp_mlx.chat_report import ending

        for piece in chat.ask(question):
            if piece.kind != "reasoning":
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        print(flush=True)
        cut = ending(chat.answers[-1], chat)
        if cut:
            self.say([cut])


def _converse(chat: "Chat", screen: Screen) -> int:
    """Answer line after line. Returns the exit code: whether all of them could be."""
    from gemma_mtp_mlx import chat_commands

    code = 0
    while (line := screen.read()) is not None:
        try:
            question = chat_commands.question_in(line)
            if question is None:
                words = chat_commands.run(chat, line)
                if words is None:
                    break
                screen.say(words)
            elif question:
                screen.show(chat, question)
        except (OSError, ValueError) as error:
            screen.fail(_problem(error))
            code = FAILED
    return code


def _problem(error: OSError | ValueError) -> str:
    """Return one line on what a user has caused. Raises any other error again."""
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    if error.filename is None:  # no file that was named: the terminal, a pipe
        raise error
    return f"{error.filename}: {error.strerror}"


def _welcome(chat: "Chat") -> list[str]:
    lines = ["/help lists commands, Ctrl-C stops an answer, Ctrl-D ends the chat"]
    if not chat.template:
        lines.insert(0, "No chat template is used: what you type is continued; try: def mean(xs):")
    return lines


def _has_template(pair: "Pair", unwanted: bool) -> bool:
    """Whether questions go through the chat template. Raises: ValueError without a tokenizer."""
    if pair.tokenizer is None:
        raise ValueError("this model's folder has no tokenizer, and a chat needs one")
    return pair.tokenizer.has_chat_template and not unwanted


def _check_extra() -> None:
    """Raise ValueError, with the remedy, if what only a terminal needs is not installed."""
    missing = [name for name in ("prompt_toolkit", "rich") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"chat on a terminal needs {' and '.join(missing)}: pip install 'mlx-gemma-mtp[chat]'"
        )


@contextmanager
def _ctrl_c(chat: "Chat") -> Iterator[None]:
    """Let Ctrl-C end the answer that is being generated, between two rounds, and nothing else."""
    before = signal.signal(signal.SIGINT, lambda *_: chat.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
