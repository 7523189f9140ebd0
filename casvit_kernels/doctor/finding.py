"""What a check says."""

from __future__ import annotations

import textwrap
from typing import Literal, NamedTuple

WIDTH = 80  # characters of a line
_INDENT = 9

Status = Literal["ok", "note", "problem"]


class Finding(NamedTuple):
    """The verdict of one check.

    A note is worth a look and may be meant. A problem makes results wrong, or calls fail or be served
    far slower than they need be, and fails the checkup.
    """

    name: str  # what was looked at, e.g. "threads"
    status: Status
    found: str
    remedy: str | None = None  # what to do, where a command does it the command

    def __str__(self) -> str:
        lines = _wrap(f"{self.status:<{_INDENT}}{self.name}: {self.found}")
        if self.remedy is not None:
            lines += "\n" + _wrap(f"{'':<{_INDENT}}-> {self.remedy}")
        return lines


def _wrap(text: str) -> str:
    # A path or a command is copied, so no word of it is cut.
    return textwrap.fill(
        text,
        WIDTH,
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
