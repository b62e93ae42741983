"""Where a text declares variables: each scope of Metal allows other ones."""

from tests.metal.signature import Signature
from tests.metal.tokens import is_blank

_TYPES = frozenset({"class", "struct", "union", "enum", "namespace"})


def findings(tokens: list[str], signature: Signature) -> list[tuple[int, str]]:
    """Return (line, message) of variables that are where Metal does not allow them."""
    found = []
    functions: list[bool] = []  # of each open brace: whether it is a function's
    statement: list[str] = []
    line = 1
    for token in tokens:
        line += token.count("\n")
        if is_blank(token):
            continue
        if token not in (";", "{", "}"):
            statement.append(token)
            continue
        for message in _of_statement(statement, any(functions), line >= signature.body_line):
            found.append((line, message))
        if token == "{":
            functions.append(any(functions) or _opens_function(statement))
        elif token == "}":
            functions.pop()
        statement = []
    return found


def _opens_function(statement: list[str]) -> bool:
    """Whether a brace after this is of code, not of a type or an initial value."""
    return ")" in statement and not _TYPES & set(_without_template(statement))


def _without_template(statement: list[str]) -> list[str]:
    if statement[:2] != ["template", "<"]:
        return statement
    depth = 0
    for i, token in enumerate(statement):
        depth += (token == "<") - (token == ">")
        if token == ">" and depth == 0:
            return statement[i + 1 :]
    return statement


def _of_statement(statement: list[str], in_function: bool, in_kernel: bool) -> list[str]:
    words = _without_template(statement)
    declares_threadgroup = words[:1] == ["threadgroup"] and not {"*", "&", "("} & set(words)
    if declares_threadgroup and not in_kernel:
        return ["a threadgroup variable outside the kernel's own body"]
    if in_function and words[:1] == ["static"]:
        return ["a static variable in a function"]
    is_constant = {"constexpr", "const"} & set(words) and "(" not in words and "using" not in words
    if not in_function and is_constant and "constant" not in words and "=" in words:
        return ["a variable outside functions that is not `constant`"]
    return []
