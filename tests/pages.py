"""Reads Markdown: blocks of code, commands, links and the anchors of headings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROGRAMS = ("casvit-kernels", "make", "pip", "pytest", "python", "python3", "torchrun")
_BEGINS = re.compile(rf"(?:\w+=\S+ )*(?:{'|'.join(PROGRAMS)}) ")


class Block(NamedTuple):
    """What stands between two fences."""

    language: str  # "" where none is named; "{toctree}" and the like are the site's, no code
    code: str  # without the block's own indentation
    line: int  # of the opening fence, from 1


class Page:
    """One file, in UTF-8."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks: list[Block] = []
        prose: list[str] = []
        fence, start, inside = "", 0, [""]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.match(r"\s*(`{3,}|~{3,})\s*(\S*)", line)
            if not fence and found:
                fence, start, inside = found[1], number, [found[2]]
            elif fence and line.strip() == fence:
                language, *code = inside
                self.blocks.append(Block(language, textwrap.dedent("\n".join(code)) + "\n", start))
                fence = ""
            elif fence:
                inside.append(line)
            else:
                prose.append(line)
        if fence:
            raise ValueError(f"{path}:{start}: this block has no end")
        self.prose = "\n".join(prose)

    def code(self, language: str) -> list[Block]:
        """The blocks of a language."""
        return [block for block in self.blocks if block.language == language]

    def commands(self, inline: bool = True) -> Iterator[str]:
        """Lines of sh blocks, and what begins as a command in indented blocks and, if asked, inline."""
        for block in self.code("sh"):
            lines = block.code.replace("\\\n", " ").splitlines()
            yield from (line for line in lines if line.strip() and line[0] != "#")
        indented = re.findall(r"^    (\S.*)$", self.prose, re.MULTILINE)
        spans = re.findall(r"`([^`\n]+)`", self.prose) if inline else []
        for text in (*indented, *spans):
            if _BEGINS.match(text) and " | " not in text:  # else a list of several
                yield from text.split(" && ")

    def links(self) -> list[str]:
        """Targets of links and pictures, as they are written."""
        text = re.sub(r"`[^`\n]*`", "", self.prose)
        return [
            *re.findall(r"\]\(\s*([^)\s]+)[^)]*\)", text),
            *re.findall(r"""(?:src|href)=["']([^"']+)["']""", text),
        ]

    def anchors(self) -> set[str]:
        """Of the headings, as Git hosts name them."""
        found: dict[str, int] = {}
        anchors = set()
        for title in re.findall(r"^#{1,6} +(.+?)\s*$", self.prose, re.MULTILINE):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
            name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
            count = found.get(name, 0)
            found[name] = count + 1
            anchors.add(f"{name}-{count}" if count else name)
        return anchors
