"""Metal's text as C++: the few things that the shim's macros cannot express.

Each line keeps its number.
"""

import re
from collections.abc import Callable

from tests.metal.signature import Parameter, Signature
from tests.metal.tokens import WORD, is_blank, split

_BEFORE_DECLARATION = frozenset({";", "{", "}", ")", ":", "else", ""})
_BFLOAT_LITERAL = re.compile(r"(\d*\.?\d*(?:[eE][+-]?\d+)?)bf")
_FLOAT_LITERAL = re.compile(r"(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?")
_INSTANCE_ATTRIBUTES = re.compile(r"^template \[\[host_name.*?\]\] \[\[kernel\]\] ", re.MULTILINE)
_UNROLL = re.compile(r"^[ \t]*#[ \t]*pragma (clang loop )?unroll.*$", re.MULTILINE)
_METAL_INCLUDE = re.compile(r"^#include <metal_\w+>", re.MULTILINE)

# Declares a threadgroup variable: (type, name, dimensions, number of it) -> text.
Declare = Callable[[str, str, str, int], str]

# Threadgroups have (threads, 1, 1) threads, and simdgroups are full: Executor sees to it.
_ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "at->threads / 4",
    "dispatch_simdgroups_per_threadgroup": "at->threads / 32",
    "dispatch_threads_per_threadgroup": "uint3(at->threads, 1, 1)",
    "grid_origin": "uint3(0, 0, 0)",
    "grid_size": "uint3(at->groups[0] * at->threads, at->groups[1], at->groups[2])",
    "quadgroup_index_in_threadgroup": "at->index / 4",
    "quadgroups_per_threadgroup": "at->threads / 4",
    "simdgroup_index_in_threadgroup": "at->index / 32",
    "simdgroups_per_threadgroup": "at->threads / 32",
    "thread_execution_width": "32",
    "thread_index_in_quadgroup": "at->index % 4",
    "thread_index_in_simdgroup": "at->index % 32",
    "thread_index_in_threadgroup": "at->index",
    "thread_position_in_grid": (
        "uint3(at->group[0] * at->threads + at->index, at->group[1], at->group[2])"
    ),
    "thread_position_in_threadgroup": "uint3(at->index, 0, 0)",
    "threadgroup_position_in_grid": "uint3(at->group[0], at->group[1], at->group[2])",
    "threadgroups_per_grid": "uint3(at->groups[0], at->groups[1], at->groups[2])",
    "threads_per_grid": "uint3(at->groups[0] * at->threads, at->groups[1], at->groups[2])",
    "threads_per_simdgroup": "32",
    "threads_per_threadgroup": "uint3(at->threads, 1, 1)",
}


def program(text: str, signature: Signature, *, unroll: bool) -> str:
    """Return a translation unit with the kernel and `metal_entry`, which calls it.

    unroll: as the text says. That changes nothing but how fast the kernel and the compiler are.
    """
    text = text if unroll else _UNROLL.sub("", text)
    return (
        f'#include "mlx.h"\n#line 1 "kernel"\n{translate(text, _allocate)}\n'
        f'#line 1 "entry"\n{_entry(signature)}'
    )


def spaces_program(text: str) -> str:
    """Return a translation unit in which pointers have address spaces, only to be compiled."""
    rewritten = translate(
        text,
        lambda kind, name, dimensions, _: (
            f"extern threadgroup {kind} {name}{dimensions};"  # not static: that would construct it
        ),
    )
    return f'#include "mlx.h"\n#line 1 "kernel"\n{_with_made_vectors(rewritten)}'


def translate(text: str, declare: Declare) -> str:
    """Rewrite threadgroup variables, literals, and what names the kernel for Metal."""
    text = _METAL_INCLUDE.sub("", _INSTANCE_ATTRIBUTES.sub("template ", text))
    tokens = split(text)
    result: list[str] = []
    last, variables, i = "", 0, 0
    while i < len(tokens):
        token = tokens[i]
        if token == "threadgroup" and last in _BEFORE_DECLARATION:
            end = _end_of_variables(tokens, i + 1)
            if end:
                parts = _variables(tokens[i + 1 : end])
                result.extend(declare(*part, variables + n) for n, part in enumerate(parts))
                result.append("\n" * sum(t.count("\n") for t in tokens[i:end]))
                variables, last, i = variables + len(parts), ";", end + 1
                continue
        result.append(_literal(token))
        last = last if is_blank(token) else token
        i += 1
    return "".join(result)


_VECTOR_NAMES = r"(?:float|half|bfloat|u?int|u?short|u?char|u?long|bool)[234]"
_VECTOR_ALIAS = re.compile(r"\busing (\w+) = (?:metal::)?vec\s*<")


def _with_made_vectors(text: str) -> str:
    """Write make_vector<float4>(...) for float4(...): clang's own vectors have no constructors."""
    aliases = "|".join([_VECTOR_NAMES, *_VECTOR_ALIAS.findall(text)])
    vector = re.compile(aliases)
    tokens = split(text)
    result: list[str] = []
    i = 0
    while i < len(tokens):
        end = i + 1
        if tokens[i] == "vec" and tokens[end] == "<":
            end = _after_angles(tokens, end)
        is_vector = end > i + 1 or vector.fullmatch(tokens[i])
        name = "".join(tokens[i:end])
        is_made = is_vector and tokens[end : end + 1] == ["("]
        result.append(f"make_vector<{name}>" if is_made else name)
        i = end
    return "".join(result)


def _after_angles(tokens: list[str], start: int) -> int:
    depth = 0
    for i in range(start, len(tokens)):
        depth += (tokens[i] == "<") - (tokens[i] == ">")
        if depth == 0:
            return i + 1
    return start


def _literal(token: str) -> str:
    """Without doubles, 1.0 is a float. A bfloat's suffix is unknown to clang."""
    if _FLOAT_LITERAL.fullmatch(token):
        return token + "f"
    bfloat = _BFLOAT_LITERAL.fullmatch(token)
    return f"bfloat({bfloat[1]}f)" if bfloat else token


def _end_of_variables(tokens: list[str], start: int) -> int | None:
    """Return the place of the `;` if this declares variables; None for pointers, references and
    functions."""
    brackets = angles = 0
    for i in range(start, len(tokens)):
        token = tokens[i]
        brackets += (token == "[") - (token == "]")
        if brackets:
            continue
        angles += (token == "<") - (token == ">")
        if angles == 0 and token in ("*", "&", "(", ")", "{", "="):
            return None
        if angles == 0 and token == ";":
            return i
    return None


def _variables(tokens: list[str]) -> list[tuple[str, str, str]]:
    """Split `float a[2], b` into (type, name, dimensions) of each."""
    tokens = [token for token in tokens if not is_blank(token) or token.isspace()]
    declarators: list[list[str]] = [[]]
    nesting = 0
    for token in tokens:
        nesting += (token in "[<") - (token in "]>")
        if token == "," and nesting == 0:
            declarators.append([])
        else:
            declarators[-1].append(token)
    parts = []
    kind = ""
    for declarator in declarators:
        head, dimensions = _split_dimensions(declarator)
        name = max(i for i, token in enumerate(head) if WORD.fullmatch(token))
        kind = kind or " ".join("".join(head[:name]).split())
        parts.append((kind, head[name], " ".join("".join(dimensions).split())))
    return parts


def _split_dimensions(declarator: list[str]) -> tuple[list[str], list[str]]:
    angles = 0
    for i, token in enumerate(declarator):
        angles += (token == "<") - (token == ">")
        if token == "[" and angles == 0:
            return declarator[:i], declarator[i:]
    return declarator, []


def _allocate(kind: str, name: str, dimensions: str, number: int) -> str:
    alias = f"threadgroup_{number}_{name}"
    return (
        f"typedef {kind} {alias}{dimensions}; "
        f"{alias}& {name} = *({alias}*)metal_threadgroup_variable({number}, sizeof({alias}), "
        f'alignof({alias}), scalar_size<{alias}>, "{name}");'
    )


def _entry(signature: Signature) -> str:
    buffers = iter(range(len(signature.parameters)))
    arguments = [
        _buffer(p, next(buffers)) if p.is_buffer else _ATTRIBUTES[p.attribute]
        for p in signature.parameters
    ]
    return (
        'extern "C" __attribute__((visibility("default"), no_sanitize("thread", "bounds")))\n'
        "void metal_entry(void** buffers, const metal_abi::Position* at) {\n"
        f"  {signature.name}{signature.arguments}({', '.join(arguments)});\n}}\n"
    )


def _buffer(parameter: Parameter, buffer: int) -> str:
    pointer = f"({parameter.type}*)buffers[{buffer}]"
    return pointer if parameter.mark == "*" else f"*{pointer}"
