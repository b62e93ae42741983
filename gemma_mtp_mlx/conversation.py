"""A conversation: questions, their answers, a system message; on disk a JSON file of messages."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_mtp_mlx.fields import Fields, shown

LARGEST_FILE = 1 << 26
_KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning_content", "stopped"},
}


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer. stopped: whether the answer was cut short by whoever asked.

    reasoning: what was thought before the answer; later questions do not show it to the model.
    """

    question: str
    answer: str
    reasoning: str = ""
    stopped: bool = False


@dataclass(slots=True)
class Conversation:
    """What was said so far; nothing in it knows of a model or a terminal."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return what a chat template takes, with a new question last."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.answer})
        return [*found, {"role": "user", "content": question}]

    def text(self, question: str) -> str:
        """Return everything as one text that a model without a chat template continues."""
        parts = [turn.question + turn.answer for turn in self.turns]
        return "\n\n".join([*(part.rstrip("\n") for part in parts), question])

    def save(self, file: Path) -> None:
        """Write it to a file, in one go. A file that holds anything else is not overwritten.

        Raises: ValueError if the file is not a conversation; OSError.
        """
        if file.exists():
            try:
                load(file)
            except ValueError as error:
                raise ValueError(f"{file} is there and no conversation; name another") from error
        partial = file.with_name(file.name + ".part")
        content = json.dumps({"messages": self._records()}, ensure_ascii=False, indent=1)
        partial.write_text(content + "\n", "utf-8")
        partial.replace(file)

    def _records(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        if self.system is not None:
            records.append({"role": "system", "content": self.system})
        for turn in self.turns:
            records.append({"role": "user", "content": turn.question})
            answer: dict[str, Any] = {"role": "assistant", "content": turn.answer}
            if turn.reasoning:
                answer["reasoning_content"] = turn.reasoning
            if turn.stopped:
                answer["stopped"] = True
            records.append(answer)
        return records


def load(file: Path) -> Conversation:
    """Read a conversation that `save` has written, or anybody, in the same form.

    Raises: ValueError naming the file, the message and what is wrong with it; OSError.
    """
    with file.open("rb") as stream:
        data = stream.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{file}: it has more than {LARGEST_FILE} bytes, too many for one")
    try:
        content = json.loads(data)
    except RecursionError as error:
        raise ValueError(f"{file}: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{file}: it is not JSON ({' '.join(str(error).split())})") from error
    records = Fields(content, f"{file}: ", {}).values.get("messages")
    if not isinstance(records, list):
        raise ValueError(f'{file}: it has no list of "messages"; /save writes such files')
    places = ((record, f"{file}: message {n}: ") for n, record in enumerate(records, 1))
    return _read([_message(record, where) for record, where in places], file)


def _message(record: Any, where: str) -> Fields:
    """Check a message by itself."""
    message = Fields(record, where, {})
    role = message.one_of("role", tuple(_KEYS))
    unknown = message.values.keys() - _KEYS[role]
    if unknown:
        raise ValueError(f"{where}{shown(min(unknown))} is not known of the {role}")
    for name in ("content", "reasoning_content"):
        text = message.values.get(name, None if name == "content" else "")
        if not isinstance(text, str) or not _encodable(text):
            raise message.wrong(name, "a text")
    message.flag("stopped")
    return message


def _read(messages: list[Fields], file: Path) -> Conversation:
    """Put messages together: a system message or none, then questions and answers in turn."""
    values = [message.values for message in messages]
    first = bool(values) and values[0]["role"] == "system"
    found = Conversation(values[0]["content"] if first else None)
    for number, message in enumerate(values[first:], 1 + first):
        expected = "user" if (number - first) % 2 else "assistant"
        if message["role"] != expected:
            raise ValueError(
                f"{file}: message {number} is the {message['role']}'s and must be the {expected}'s"
            )
    if len(values[first:]) % 2:
        raise ValueError(f"{file}: message {len(values)} is a question without an answer")
    for question, answer in zip(values[first::2], values[first + 1 :: 2], strict=True):
        found.turns.append(
            Turn(
                question["content"],
                answer["content"],
                answer.get("reasoning_content", ""),
                bool(answer.get("stopped")),
            )
        )
    return found


def _encodable(text: str) -> bool:
    """Whether it can be written: halves of characters, which JSON can spell, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
