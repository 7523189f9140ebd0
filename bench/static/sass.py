"""Reads machine code of NVIDIA GPUs: instructions, loops and registers of the functions of a cubin.

Loops are natural ones: a branch backwards whose target lies on every way to it, and all that leads from
the target to the branch. Compilers move rare paths behind a function's end and come back from there,
which is a branch backwards and no loop. What only warps in disorder run (BRA.DIV) counts as unreachable.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BYTES = 16  # of an instruction


class Instruction(NamedTuple):
    address: int
    predicate: str  # "@P0", "@!UP1" or ""
    name: str  # with options: LDSM.16.M88.4
    operands: str

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where it may lead, besides the next. On sm_80 calls under a condition are branches."""
        jumps = self.kind == "BRA" or (self.kind == "CALL" and self.predicate)
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if jumps else None
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or bool(re.match(r"!?U?P\d", self.operands))


class Loop(NamedTuple):
    first: int  # address of its head
    code: tuple[Instruction, ...]  # without padding
    own: tuple[Instruction, ...]  # without that of loops inside
    inner: tuple[Loop, ...]  # directly inside

    def all(self) -> list[Loop]:
        """It and those inside, outermost first."""
        return [self, *(loop for i in self.inner for loop in i.all())]


class Function(NamedTuple):
    name: str  # mangled
    code: tuple[Instruction, ...]  # that can be reached, without padding
    loops: tuple[Loop, ...]  # the outermost, by address
    registers: int
    spilled: int  # bytes of stack and of local memory a thread

    @property
    def straight(self) -> list[Instruction]:
        """What lies in no loop."""
        inside = {i.address for loop in self.loops for i in loop.code}
        return [i for i in self.code if i.address not in inside]


def kinds(code: Sequence[Instruction]) -> Counter[str]:
    return Counter(i.kind for i in code)


def named(code: Sequence[Instruction], *names: str) -> int:
    """How many instructions have one of these names, options in any order: LDSM.T, STG.64, ..."""
    found = 0
    for i in code:
        options = i.name.split(".")
        for name in names:
            kind, *wanted = name.split(".")
            found += options[0] == kind and all(w in options for w in wanted)
    return found


def ways(loop: Loop, name: str) -> dict[int, tuple[int, int]]:
    """Of the ways once round a loop, by how many instructions with this name they have: the fewest and
    the most instructions."""
    if loop.inner:
        raise ValueError(f"a way round the loop at {loop.first:#x} may go round others")
    found: dict[int, dict[int, tuple[int, int]]] = {i.address: {} for i in loop.code}
    around: dict[int, tuple[int, int]] = {}
    found[loop.first][0] = 0, 0
    changed = True
    while changed:
        changed = False
        for i in loop.code:
            for to in _leads(i) & found.keys():
                there = around if to == loop.first else found[to]
                for n, (fewest, most) in found[i.address].items():
                    have = n + named([i], name)
                    known = there.get(have, (fewest + 1, most + 1))
                    new = min(known[0], fewest + 1), max(known[1], most + 1)
                    changed |= there.get(have) != new
                    there[have] = new
    return around


def _leads(i: Instruction) -> set[int]:
    """Addresses of what may come next."""
    jumps = i.target is not None and ".DIV" not in i.name
    ends = i.kind in ("EXIT", "RET") and not i.predicate
    found = set() if ends or (jumps and not i.conditional) else {i.address + BYTES}
    return found | ({i.target} if jumps and i.target is not None else set())


_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,6})\*/\s+(?P<predicate>@!?U?P\w+\s+)?"
    r"(?P<name>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
)


def parse(text: str) -> list[Instruction]:
    return [
        Instruction(
            int(m["address"], 16), (m["predicate"] or "").strip(), m["name"], m["operands"].strip()
        )
        for m in _LINE.finditer(text)
    ]


def _next(code: list[Instruction]) -> dict[int, list[int]]:
    """Where each instruction may lead, by index."""
    index = {i.address: n for n, i in enumerate(code)}
    found: dict[int, list[int]] = {}
    for n, i in enumerate(code):
        to = [n + 1] if n + 1 < len(code) else []
        if i.kind in ("BRX", "JMP", "JMX"):
            raise ValueError(f"a branch that is not followed: {i}")
        if i.target is not None and ".DIV" not in i.name:
            to = [index[i.target]] + (to if i.conditional else [])
        elif i.kind in ("EXIT", "RET") and not i.predicate:
            to = []
        found[n] = to
    return found


def _dominators(after: dict[int, list[int]]) -> tuple[dict[int, set[int]], dict[int, list[int]]]:
    """Of each block head that can be reached, the heads on every way to it; and of each instruction
    that can be reached those that lead to it."""
    before: dict[int, list[int]] = {0: []}
    todo = [0]
    while todo:
        n = todo.pop()
        for to in after[n]:
            if to not in before:
                before[to] = []
                todo.append(to)
            before[to].append(n)
    place: dict[int, int] = {}  # of each instruction its block's head
    for n in sorted(before):
        place[n] = place[n - 1] if before[n] == [n - 1] and len(after[n - 1]) == 1 else n
    heads = sorted(set(place.values()))
    found = {h: set(heads) for h in heads}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for h in heads[1:]:
            new = {h} | set.intersection(*(found[place[b]] for b in before[h]))
            if new != found[h]:
                found[h], changed = new, True
    return {n: found[place[n]] for n in before}, before


def loops(code: list[Instruction]) -> tuple[tuple[Instruction, ...], tuple[Loop, ...]]:
    """The code that can be reached, and its outermost loops."""
    after = _next(code)
    dominators, before = _dominators(after)
    bodies: dict[int, set[int]] = {}
    for n in before:
        for head in after[n]:
            if head in dominators[n] and head <= n:
                body = bodies.setdefault(head, {head})
                todo = [n]
                while todo:
                    at = todo.pop()
                    if at not in body:
                        body.add(at)
                        todo += before[at]

    def pick(which: set[int]) -> tuple[Instruction, ...]:
        return tuple(code[n] for n in sorted(which) if code[n].kind != "NOP")

    def nest(heads: list[int]) -> tuple[Loop, ...]:
        found = []
        outer = [h for h in heads if not any(h in bodies[o] for o in heads if o != h)]
        for h in sorted(outer):
            inside = [i for i in heads if i != h and i in bodies[h]]
            own = bodies[h].difference(*(bodies[i] for i in inside))
            found.append(Loop(code[h].address, pick(bodies[h]), pick(own), nest(inside)))
        return tuple(found)

    return pick(set(before)), nest(list(bodies))


def functions(cubin: Path, cuobjdump: Path) -> dict[str, Function]:
    """Of a cubin, by mangled name."""

    def run(flag: str) -> str:
        command = [str(cuobjdump), flag, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = {
        m[1]: (int(m[2]), int(m[3]) + int(m[4]))
        for m in re.finditer(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run("-res-usage")
        )
    }
    found = {}
    for part in re.split(r"\n\s*Function : ", run("-sass"))[1:]:
        name, _, text = part.partition("\n")
        code, nest = loops(parse(text))
        found[name.strip()] = Function(name.strip(), code, nest, *usage[name.strip()])
    return found
