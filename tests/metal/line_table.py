"""From a place in compiled code to the line of the text: DWARF 4 line tables of an ELF library.

Only the clang of toolchain.py writes what is read here, with -gdwarf-4 -gline-tables-only.
"""

import bisect
import struct
from pathlib import Path
from typing import NamedTuple

_STANDARD_OPERANDS = {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 0, 7: 0, 8: 0, 9: 1, 10: 0, 11: 0, 12: 1}


class Row(NamedTuple):
    """Code from `address` on, to the next row."""

    address: int
    file: str
    line: int


def read_rows(path: Path) -> list[Row]:
    """Return the line table of a library, by address."""
    data = path.read_bytes()
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<3H", data, 0x3A)
    headers = [struct.unpack_from("<2I4Q", data, sections + i * size) for i in range(count)]
    name_table = headers[names][4]
    rows: list[Row] = []
    for name, _, _, _, offset, length in headers:
        if _string(data, name_table + name)[0] == ".debug_line":
            rows = _read_units(data[offset : offset + length])
    return sorted(rows)


def memory_size(path: Path) -> int:
    """Return how much memory a library takes when it is loaded."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"  # 64 bits, little-endian
    (segments,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<2H", data, 0x36)
    end = 0
    for i in range(count):
        segment = struct.unpack_from("<2I6Q", data, segments + i * size)
        kind, address, memory = segment[0], segment[3], segment[6]
        if kind == 1:  # PT_LOAD
            end = max(end, address + memory)
    return end


def line_at(rows: list[Row], address: int, file: str) -> int | None:
    """Return the line of the code at an address, None if it is not of that file."""
    after = bisect.bisect_right(rows, address, key=lambda row: row.address)
    return rows[after - 1].line if after and rows[after - 1].file == file else None


def _string(data: bytes, at: int) -> tuple[str, int]:
    """Return a string and where it ends."""
    end = data.index(b"\0", at)
    return data[at:end].decode(), end + 1


def _number(data: bytes, at: int, *, signed: bool = False) -> tuple[int, int]:
    """Return a LEB128 number and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            break
    if signed and byte & 0x40:
        value -= 1 << shift
    return value, at


def _read_units(data: bytes) -> list[Row]:
    rows: list[Row] = []
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        rows.extend(_read_unit(data[at + 4 : at + 4 + length]))
        at += 4 + length
    return rows


def _read_unit(data: bytes) -> list[Row]:
    version, header_length = struct.unpack_from("<HI", data)
    assert version == 4
    unit, _, _, line_base, line_range, opcode_base = struct.unpack_from("<BBBbBB", data, 6)
    at = 12 + opcode_base - 1
    while data[at]:  # the folders
        at = _string(data, at)[1]
    at += 1
    files = [""]
    while data[at]:
        name, at = _string(data, at)
        for _ in range(3):
            _, at = _number(data, at)
        files.append(name)
    at = 6 + header_length
    rows: list[Row] = []
    address, file, line = 0, 1, 1
    while at < len(data):
        code = data[at]
        at += 1
        if code >= opcode_base:
            address += (code - opcode_base) // line_range * unit
            line += line_base + (code - opcode_base) % line_range
            rows.append(Row(address, files[file], line))
        elif code == 0:  # extended
            length, at = _number(data, at)
            if data[at] == 1:  # end of a sequence
                rows.append(Row(address, "", 0))
                address, file, line = 0, 1, 1
            elif data[at] == 2:
                (address,) = struct.unpack_from("<Q", data, at + 1)
            at += length
        elif code == 1:
            rows.append(Row(address, files[file], line))
        elif code == 3:
            step, at = _number(data, at, signed=True)
            line += step
        elif code == 8:
            address += (255 - opcode_base) // line_range * unit
        elif code == 9:
            address += struct.unpack_from("<H", data, at)[0]
            at += 2
        else:
            for _ in range(_STANDARD_OPERANDS[code]):
                operand, at = _number(data, at)
                if code == 2:
                    address += operand * unit
                elif code == 4:
                    file = operand
    return rows
