"""What Metal's compiler refuses and a C++ compiler lets through.

Three looks at a text: at its words; at what clang says where pointers have address spaces; and at
what clang makes of it, where recursion and storage are plain to see. None of them is Apple's
compiler: see the package's docstring.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

from tests.metal import scopes
from tests.metal.intermediate import intermediate_findings
from tests.metal.signature import Signature
from tests.metal.tokens import is_blank, split
from tests.metal.toolchain import cache_folder, compile_spaces, digest, shim
from tests.metal.translate import spaces_program

NOT_METAL, ADDRESS_SPACE = "not Metal", "address space"  # kinds of findings

_WORDS = {
    "double": "there is no double",
    "goto": "there is no goto",
    "new": "there is no heap",
    "delete": "there is no heap",
    "malloc": "there is no heap",
    "virtual": "there are no virtual functions",
    "dynamic_cast": "there are no types at run time",
    "typeid": "there are no types at run time",
    "throw": "there are no exceptions",
    "try": "there are no exceptions",
    "thread_local": "there is no such storage",
    "asm": "there is no assembler",
    "__asm__": "there is no assembler",
    "std": "there is no standard library; Metal's is metal::",
    "printf": "there is no output",
}
_SPACES = frozenset({"device", "threadgroup", "constant", "thread"})
# `T* p` and `T& r`: marks of a declaration stand at the type, operators apart from it.
_MARKS = frozenset({"*", "&"})
_INCLUDE = re.compile(r'#\s*include\s*[<"](.*?)[>"]')
_MATRIX = "metal_simdgroup_matrix"
_ERROR = re.compile(r"kernel:(\d+):\d+: (?:fatal )?error: (.*)")
_TO_BFLOAT = re.compile(r"kernel:(\d+):\d+: warning: implicit conversion .* to '.*__bf16'")


class Finding(NamedTuple):
    """Something that is not Metal."""

    line: int  # of the text
    kind: str
    message: str


def check(text: str, signature: Signature) -> list[Finding]:
    """Return findings, and remember texts that have none."""
    passed = cache_folder() / f"metal-{digest([text, _version()])}"
    if passed.exists():
        return []
    found = findings(text, signature)
    if not found:
        passed.touch()
    return found


@functools.cache
def _version() -> str:
    """What else findings depend on."""
    files = ("rules", "scopes", "intermediate", "signature", "tokens", "translate", "toolchain")
    return digest([*(Path(__file__).with_name(f"{f}.py").read_text() for f in files), shim()[1]])


def findings(text: str, signature: Signature) -> list[Finding]:
    """Return what is wrong with a kernel's text."""
    found = [Finding(line, NOT_METAL, message) for line, message in _of_words(text, signature)]
    if found:
        return found
    said, intermediate = compile_spaces(spaces_program(text))
    for line in said.splitlines():
        if error := _ERROR.match(line):
            found.append(Finding(int(error[1]), ADDRESS_SPACE, error[2]))
        elif narrowing := _TO_BFLOAT.match(line):
            message = "bfloat only by an explicit conversion"
            found.append(Finding(int(narrowing[1]), NOT_METAL, message))
    if not found and not intermediate:
        found.append(Finding(0, ADDRESS_SPACE, said))
    found.extend(Finding(line, NOT_METAL, m) for line, m in intermediate_findings(intermediate))
    return found


def _of_words(text: str, signature: Signature) -> list[tuple[int, str]]:
    found = []
    tokens = split(text)
    line = 1
    before = ""  # the last token that is not blank
    for i, token in enumerate(tokens):
        if token in _WORDS:
            found.append((line, _WORDS[token]))
        elif token == "[" and not _is_index(before) and tokens[i + 1] != "[" and before != "[":
            found.append((line, "there are no lambdas"))
        elif token in _MARKS and _is_mark(tokens, i) and not _has_space(tokens, i):
            found.append((line, f"no address space: {_declaration(tokens, i)}"))
        elif token.lstrip().startswith("#"):
            found.extend((line, message) for message in _of_directive(token))
        line += token.count("\n")
        before = before if is_blank(token) else token
    if "simdgroup_matrix" in tokens and _MATRIX not in text:
        found.append((1, f"simdgroup matrices need #include <{_MATRIX}>"))
    found.extend(scopes.findings(tokens, signature))
    return found


def _is_index(before: str) -> bool:
    """Whether a [ after this token indexes something or gives a dimension."""
    return before in ("]", ")", ">") or bool(re.fullmatch(r"\w+", before))


def _is_mark(tokens: list[str], i: int) -> bool:
    previous, following = tokens[i - 1], tokens[i + 1]
    at_type = bool(re.fullmatch(r"\w+|>|\*", previous)) and not previous[0].isdigit()
    return at_type and previous != "operator" and (following.isspace() or following in ",)>*&")


def _declaration(tokens: list[str], i: int) -> str:
    """Return what a mark is part of, from the beginning of the declaration."""
    start, depth = i, 0
    while start > 0:
        token = tokens[start - 1]
        depth += (token in ">)]") - (token in "<([") if len(token) == 1 else 0
        if depth < 0 or (depth == 0 and token in (";", "{", "}", ",")):
            break
        start -= 1
    return "".join(t for t in tokens[start : i + 1] if not is_blank(t) or t.isspace()).strip()


def _has_space(tokens: list[str], i: int) -> bool:
    words = set(re.findall(r"\w+", _declaration(tokens, i)))
    return bool(words & _SPACES) or "auto" in words


def _of_directive(directive: str) -> list[str]:
    included = _INCLUDE.search(directive)
    if included and not included[1].startswith("metal_"):
        return [f"#include of {included[1]}"]
    return []
