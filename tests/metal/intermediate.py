"""What clang's intermediate code shows of a kernel: recursion, storage, casts, foreign calls.

One function, variable or debug record is one line there.
"""

import re
from collections.abc import Iterator

_FUNCTION = re.compile(r'define .*?@("[^"]+"|[\w.$]+)\(')
_CALL = re.compile(r'\b(?:call|invoke) .*?@("[^"]+"|[\w.$]+)\(.*?(?:!dbg !(\d+))?$')
_INDIRECT = re.compile(r"\bcall [^@]*? %\d+\(.*!dbg !(\d+)")
_DOUBLE = re.compile(r" to double, !dbg !(\d+)")
_CAST = re.compile(r" = addrspacecast .*!dbg !(\d+)")
_VARIABLE = re.compile(r'@("[^"]+"|[\w.$]+) = (.*)')
_RECORD = re.compile(r"!(\d+) = !DILocation\(line: (\d+)")
# What the shim calls: the runtime, clang's intrinsics.
_SHIM = re.compile(r"llvm\.|metal_|__truncsfbf2|__extendhfsf2|memcpy|memset|memcmp")
# What clang's mathematical built-in functions may call.
_LIBM = re.compile(
    r"(acos|asin|atan2?|cosh?|sinh?|tanh?|exp2?|log2?|log10|pow|fmod|fma|fmax|fmin|frexp|ldexp"
    r"|modf|ilogb|round|rint|trunc|floor|ceil)f"
)


def intermediate_findings(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, message)."""
    lines = dict(_RECORD.findall(text))
    calls: dict[str, dict[str, str]] = {}
    function = ""
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            function = found[1]
            calls[function] = {}
        elif found := _VARIABLE.match(line):
            yield from _of_variable(found[1], found[2])
        elif found := _CALL.search(line):
            calls.setdefault(function, {}).setdefault(found[1], lines.get(found[2], "0"))
        elif found := _INDIRECT.search(line):
            yield int(lines.get(found[1], 0)), "a call of a function by pointer"
        if found := _CAST.search(line):
            yield int(lines.get(found[1], 0)), "a cast between address spaces"
        if found := _DOUBLE.search(line):
            yield int(lines.get(found[1], 0)), "there is no double"
    for function, called in calls.items():
        for name, line in called.items():
            if name not in calls and not _SHIM.match(name) and not _LIBM.fullmatch(name):
                yield int(line), f"there is no {name}"
            elif function in _reached(name, calls):
                yield int(line), f"recursion, of {function}"


def _reached(start: str, calls: dict[str, dict[str, str]]) -> set[str]:
    reached: set[str] = set()
    new = [start]
    while new:
        name = new.pop()
        if name not in reached:
            reached.add(name)
            new.extend(calls.get(name, {}))
    return reached


def _of_variable(name: str, definition: str) -> Iterator[tuple[int, str]]:
    if "addrspace(3)" in definition or definition.startswith("private"):
        return  # a threadgroup variable; a constant that is no variable in the text
    if " global " in f" {definition} ":
        yield 0, f"variable {name} is neither constant nor in a function"
