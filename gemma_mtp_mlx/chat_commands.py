"""What a chat does with a line that begins with a slash."""

from collections.abc import Callable
from pathlib import Path

from gemma_mtp_mlx import conversation
from gemma_mtp_mlx.chat import Chat
from gemma_mtp_mlx.chat_report import count, statistics
from gemma_mtp_mlx.conversation import Conversation

Words = list[str]
EXIT = "/exit"


def question_in(line: str) -> str | None:
    """Return what a line asks, None if it is a command; // is a slash that begins no command."""
    text = line.strip()
    if text.startswith("//"):
        return text[1:]
    return None if text.startswith("/") else text


def run(chat: Chat, line: str) -> Words | None:
    """Do what a command says. Returns the lines that answer it, None to end the chat.

    Raises: ValueError, OSError for what cannot be done; nothing has changed then.
    """
    name, _, rest = line.strip().partition(" ")
    if name == EXIT:
        return None
    if name not in _COMMANDS:
        raise ValueError(f"there is no command {name}; /help lists them, a text begins with //")
    return _COMMANDS[name][1](chat, rest.strip())


def _help(chat: Chat, rest: str) -> Words:
    width = 11
    more = {
        EXIT: "end the chat; so does Ctrl-D",
        "//": "begins a text with a slash",
        "Alt-Enter": "begins a line; Enter sends them all",
    }
    listed = {name: says for name, (says, _) in _COMMANDS.items()} | more
    return [f"{name:<{width}}{says}" for name, says in listed.items()]


def _system(chat: Chat, rest: str) -> Words:
    talk = chat.conversation
    if not rest:
        return [talk.system or "There is no system message; /system TEXT sets one"]
    if not chat.template:
        raise ValueError("a system message needs a chat template, and here text is continued")
    talk.system = None if rest == "-" else rest
    return ["There is no system message now" if rest == "-" else "From now on with this message"]


def _reset(chat: Chat, rest: str) -> Words:
    forgotten = len(chat.conversation.turns)
    chat.begin(Conversation(chat.conversation.system))
    return [f"A new conversation; {count(forgotten, 'question')} forgotten"]


def _save(chat: Chat, rest: str) -> Words:
    chat.conversation.save(_file(rest, "/save"))
    return [f"Saved {count(len(chat.conversation.turns), 'question')} to {rest}"]


def _load(chat: Chat, rest: str) -> Words:
    found = conversation.load(_file(rest, "/load"))
    if found.system is not None and not chat.template:
        raise ValueError(f"{rest} has a system message, which needs a chat template")
    chat.begin(found)
    lines = [f"Loaded {count(len(found.turns), 'question')} from {rest}"]
    if found.turns:
        lines.append(f"The last one: {' '.join(found.turns[-1].question.split())}")
    return lines


def _file(rest: str, name: str) -> Path:
    if not rest:
        raise ValueError(f"say which file: {name} FILE")
    return Path(rest).expanduser()


def _stats(chat: Chat, rest: str) -> Words:
    return statistics(chat)


_COMMANDS: dict[str, tuple[str, Callable[[Chat, str], Words]]] = {
    "/help": ("this list", _help),
    "/system": ("TEXT: set the system message; - for none; show it", _system),
    "/reset": ("begin a new conversation", _reset),
    "/save": ("FILE: write the conversation to a file", _save),
    "/load": ("FILE: go on with the conversation in a file", _load),
    "/stats": ("what this conversation has cost", _stats),
}
COMMANDS = (*_COMMANDS, EXIT)
