"""Reads what a library of macOS asks of others. The release is audited on Linux, whose `nm` cannot.

Of 64-bit files for one architecture; the numbers are those of mach-o/loader.h and mach-o/nlist.h.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

MAGIC = b"\xcf\xfa\xed\xfe"
UNIVERSAL = b"\xca\xfe\xba\xbe"  # several files in one

_HEADER = 32  # bytes
_SYMBOL_TABLE = 0x2
_LIBRARIES = (0xC, 0x80000018, 0x8000001F)  # needed, weakly, and handed on
_SEARCH_PATH = 0x8000001C
_DEBUGGING, _KIND, _EXTERNAL = 0xE0, 0x0E, 0x01  # bits of a symbol's type


class Asked(NamedTuple):
    """What the dynamic linker has to find."""

    symbols: list[str]
    libraries: list[str]
    folders: list[str]  # that are searched for them


def asked(data: bytes) -> Asked:
    """Read from the bytes of a file.

    Raises:
        ValueError: it is another kind of file, or cut off.
    """
    if data[:4] != MAGIC:
        kind = "a universal file" if data[:4] == UNIVERSAL else f"one that begins with {data[:4]!r}"
        raise ValueError(f"library: expected a Mach-O file for one architecture, got {kind}")
    found = Asked([], [], [])
    try:
        (count,) = struct.unpack_from("<I", data, 16)
        at = _HEADER
        for _ in range(count):
            command, size = struct.unpack_from("<II", data, at)
            if command == _SYMBOL_TABLE:
                found.symbols.extend(_undefined(data, *struct.unpack_from("<4I", data, at + 8)))
            elif command in _LIBRARIES:
                found.libraries.append(_text(data, at + _offset(data, at)))
            elif command == _SEARCH_PATH:
                found.folders.append(_text(data, at + _offset(data, at)))
            at += size
    except (struct.error, ValueError) as error:
        raise ValueError("library: expected a whole Mach-O file, got a part of one") from error
    return found


def _undefined(data: bytes, symbols: int, number: int, strings: int, size: int) -> list[str]:
    if strings + size > len(data):
        raise ValueError("ends before its names")
    names = []
    for i in range(number):
        name, kind, _section, _description, value = struct.unpack_from(
            "<IBBHQ", data, symbols + 16 * i
        )
        if kind & _EXTERNAL and not kind & (_DEBUGGING | _KIND) and value == 0:
            names.append(_text(data, strings + name))
    return names


def _offset(data: bytes, at: int) -> int:
    """Of a command's text, from the command's beginning."""
    found: int = struct.unpack_from("<I", data, at + 8)[0]
    return found


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode("utf-8", "replace")
