"""The swizzles of Metal's vectors, as clang's properties: v.zy is v.get_zy()."""

import itertools

COMPONENTS = "xyzw"
# Of the 256 swizzles of four components only these: each is text that every kernel compiles.
OF_FOUR = ("xyzw", "wzyx", "yxwz", "zwxy", "yzwx", "wxyz", "xxyy", "zzww", "xzyw")


def swizzles_header() -> str:
    """Return a header that vectors.h includes in vec<T, N>, where SWIZZLES_OF is N."""
    lines = []
    for size in (2, 3, 4):
        lines.append(f"#if SWIZZLES_OF == {size}")
        for length in (2, 3, 4):
            for picked in itertools.product(range(size), repeat=length):
                name = "".join(COMPONENTS[i] for i in picked)
                if length < 4 or name in OF_FOUR:
                    lines.extend(_swizzle(name, picked))
        lines.append("#endif")
    lines.append("#undef SWIZZLES_OF")
    return "\n".join(lines) + "\n"


def _swizzle(name: str, picked: tuple[int, ...]) -> list[str]:
    vector = f"vec<T, {len(picked)}>"
    values = ", ".join(f"elements[{i}]" for i in picked)
    lines = [f"SHIM constexpr {vector} get_{name}() const {{ return {{{values}}}; }}"]
    if len(set(picked)) < len(picked):
        return [*lines, f"__declspec(property(get = get_{name})) {vector} {name};"]
    stores = " ".join(f"elements[{i}] = v.elements[{j}];" for j, i in enumerate(picked))
    return [
        *lines,
        f"SHIM void put_{name}({vector} v) {{ {stores} }}",
        f"__declspec(property(get = get_{name}, put = put_{name})) {vector} {name};",
    ]
