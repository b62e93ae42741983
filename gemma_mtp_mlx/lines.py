"""A file of requests, one JSON object a line: a prompt and its own settings, checked key by key.

Lines are numbered from 0 here and from 1, as editors do, in what a user reads.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from gemma_mtp_mlx.prompts import Prompt
from gemma_mtp_mlx.sampling import SamplingParams

PROMPTS = ("prompt", "messages", "tokens")


@dataclass(frozen=True, slots=True)
class Line:
    """A request as its line says it. choices: answers wanted; digest: of what decides them."""

    index: int
    id: str | int | float | None
    prompt: Prompt
    params: SamplingParams
    choices: int
    template: bool
    system: str | None
    digest: str


def read_lines(source: Iterable[bytes], name: str, max_tokens: int) -> list[Line]:
    """Read requests, one a line; empty lines are passed over.

    name: of the file, for messages; max_tokens: of requests that do not say it.
    Raises: ValueError naming file, line and key for anything that is not understood.
    """
    lines = []
    for index, data in enumerate(source):
        if data.strip():
            with named(name, index):
                lines.append(_line(index, data, max_tokens))
    if not lines:
        raise ValueError(f'{name} has no requests; give lines such as {{"prompt": "Hello"}}')
    return lines


@contextmanager
def named(name: str, index: int) -> Iterator[None]:
    """Put file and line in front of a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}, line {index + 1}: {error}") from error


def _line(index: int, data: bytes, max_tokens: int) -> Line:
    """Read one request. Raises: ValueError naming the key."""
    given = {key: value for key, value in _object(data).items() if value is not None}
    unknown = given.keys() - _KINDS.keys()
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}; use {', '.join(sorted(_KINDS))}")
    for key, value in given.items():
        what, sound = _KINDS[key]
        if not sound(value):
            raise ValueError(f"{key} is {json.dumps(value)[:40]}; it must be {what}")
    sources = [key for key in PROMPTS if key in given]
    if len(sources) != 1:
        problem = f"{' and '.join(sources)} are given" if sources else "there is no prompt"
        raise ValueError(f"{problem}; give one of {', '.join(PROMPTS)}")
    kind = sources[0]
    if kind == "tokens" and "system" in given:
        raise ValueError("tokens are taken as they are; system does not go with them")
    if kind != "prompt" and "template" in given:
        raise ValueError(f"template does not go with {kind}, only with prompt")
    settings = {key: given[key] for key in _SETTINGS if key in given}
    settings.setdefault("max_tokens", max_tokens)
    content = json.dumps({**given, **settings}, sort_keys=True)
    if isinstance(settings.get("stop", ""), list):
        settings["stop"] = tuple(settings["stop"])
    elif "stop" in settings:
        settings["stop"] = (settings["stop"],)
    if "logit_bias" in settings:
        settings["logit_bias"] = {int(t): b for t, b in settings["logit_bias"].items()}
    return Line(
        index=index,
        id=given.get("id"),
        prompt=given[kind],
        params=SamplingParams(**settings),
        choices=given.get("n", 1),
        template=given.get("template", True),
        system=given.get("system"),
        digest=hashlib.sha256(content.encode()).hexdigest()[:16],
    )


def _object(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if len(counts) < len(pairs):
            raise ValueError(f"{counts.most_common(1)[0][0]!r} is given twice")
        return dict(pairs)

    try:
        found = json.loads(data.decode("utf-8-sig").strip(), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError('a request is an object, such as {"prompt": "Hello"}')
    return found


def _is_text(value: Any) -> bool:
    """Whether it is a text; halves of characters, which JSON can spell, are none."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_int(value: Any) -> bool:
    return type(value) is int  # True is an int too


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_list(value: Any, sound: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(sound, value))


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and _is_number(bias) for key, bias in value.items()
    )


Kind = tuple[str, Callable[[Any], bool]]
_INT: Kind = ("a whole number", _is_int)
_TEXT: Kind = ("a text", _is_text)
_FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
_OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))
_BY_TYPE: dict[Any, Kind] = {
    int: _INT,
    int | None: _INT,
    float: ("a number", _is_number),
    bool | None: _FLAG,
    str | None: _TEXT,
    tuple[str, ...]: ("a text or a list of texts", lambda v: _is_text(v) or _is_list(v, _is_text)),
    Mapping[int, float]: ('an object of token ids and numbers, {"7": -1.5}', _is_bias),
    Mapping[str, Any] | None: _OBJECT,
}
_SETTINGS = {f.name: _BY_TYPE[f.type] for f in fields(SamplingParams) if f.type in _BY_TYPE}
_KINDS: dict[str, Kind] = {
    **_SETTINGS,
    "prompt": _TEXT,
    "messages": (
        'a list of objects such as {"role": "user", "content": "Hello"}',
        lambda value: _is_list(value, _OBJECT[1]),
    ),
    "tokens": ("a list of token ids", lambda value: _is_list(value, _is_int)),
    "id": ("a text or a number", lambda value: _is_text(value) or _is_number(value)),
    "n": ("a whole number, at least 1", lambda value: _is_int(value) and value >= 1),
    "template": _FLAG,
    "system": _TEXT,
}
