"""Lines of a kernel's text as places in the .metal files that it is made of."""

from gemma_mtp_mlx.kernels import kernel


def describe(text: str, line: int) -> str:
    """Return "file.metal:12: the line" for a line of a text."""
    lines = text.splitlines()
    if not 0 < line <= len(lines):
        return ""
    length, file, number = max(_alike(lines, line - 1), default=(0, "", 0))
    # A few lines may be alike by chance; what is in no file is of the kernel's source.
    where = f"{file}:{number}" if length > 2 else f"line {line}"
    return f"  {where}: {lines[line - 1].strip()}"


def _alike(lines: list[str], at: int) -> list[tuple[int, str, int]]:
    """Return (how many lines around are the same, file, line) wherever this line is in a file."""
    found = []
    for path in kernel.FOLDER.glob("*.metal"):
        others = path.read_text().splitlines()
        for other, content in enumerate(others):
            if content == lines[at]:
                length = _run(lines, others, at, other, 1) + _run(lines, others, at, other, -1) - 1
                found.append((length, path.name, other + 1))
    return found


def _run(lines: list[str], others: list[str], at: int, other: int, step: int) -> int:
    length = 0
    while 0 <= at < len(lines) and 0 <= other < len(others) and lines[at] == others[other]:
        length += 1
        at += step
        other += step
    return length
