"""Executed instructions of the CUDA kernels, from their loops (sass.py) and how often these go round
(cuda_work.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cuda_work import LANES, WARPS, Plan, Rounds, Shape, rounds
from sass import Function, Instruction, Loop, kinds


class Phase(NamedTuple):
    """One phase of a kernel in machine code."""

    name: str
    own: int  # instructions of its innermost loop
    items: int  # of them those that stand for its work: copies, mma, loads, ...
    mma: int
    around: tuple[
        int, ...
    ]  # of the loops around it, the outermost first, without what does its work
    inside: int  # of a loop inside
    barriers: int  # in any of these loops

    def instructions(self, times: Rounds) -> float:
        """Warp-instructions of a block."""
        around = times.around[len(times.around) - len(self.around) :] if self.around else ()
        return (
            times.items * self.own / self.items
            + sum(n * each for n, each in zip(around, self.around, strict=True))
            + times.inside * self.inside
        )


def _has(*names: str) -> Callable[[Sequence[Instruction]], int]:
    """How many instructions have one of these names, options in any order: LDSM.T, STG.64, ..."""

    def count(code: Sequence[Instruction]) -> int:
        found = 0
        for i in code:
            options = i.name.split(".")
            for name in names:
                kind, *wanted = name.split(".")
                found += options[0] == kind and all(w in options for w in wanted)
        return found

    return count


_TRANSPOSED = _has("LDSM.MT88")
_EXPONENTIAL = _has("MUFU.EX2")


def phase_of(kernel: str, loop: Loop) -> str | None:
    """Which phase an outermost loop is, by what it has."""
    n = kinds(loop.code)
    if n["LDGSTS"]:
        return "copy"
    if n["HMMA"]:
        if _TRANSPOSED(loop.code):
            return "pooled sums"
        if kernel != "combine":
            return "sweep"
        if _EXPONENTIAL(loop.code):
            return "channel gates"
        return "sweep u" if n["LDS"] else "sweep out"  # u is a product with v, which lies there
    if n["LDG"] and n["STS"]:
        return "make a" if _has("STS.64")(loop.code) else "means"
    if _EXPONENTIAL(loop.code):
        return "pixels"
    if _has("STG.64", "STG.128")(loop.code) and n["LDS"]:
        return "store"
    if n["STS"] and not n["LDS"]:
        return "zeros"
    return None  # out as NCHW, or with channels that are no multiple of 4


# What stands for a phase's work.
_ITEMS = {
    "copy": _has("LDGSTS"),
    "means": _has("LDG"),
    "channel gates": _has("HMMA"),
    "make a": _has("STS.64"),
    "sweep": _has("HMMA"),
    "sweep u": _has("HMMA"),
    "sweep out": _has("HMMA"),
    "store": _has("STG.64"),
    "zeros": _has("STS"),
    "pixels": _EXPONENTIAL,
    "pooled sums": _has("HMMA"),
}


def _main(loop: Loop, items: Callable[[Sequence[Instruction]], int]) -> tuple[Loop, ...]:
    """The way from an outermost loop to the one with most of the phase's work in its own code, which is
    the body of an unrolled loop and not one of its remainders."""
    ways = [(loop,)]
    for inner in loop.inner:
        ways.append((loop, *_main(inner, items)))
    # The innermost of those with work: what an unrolled loop left over stands in the loop around it.
    return max(ways, key=lambda way: (len(way) > 1 and items(way[-1].own) > 0, items(way[-1].own)))


def phases(kernel: str, function: Function) -> dict[str, Phase]:
    found: dict[str, tuple[Loop, ...]] = {}
    for loop in function.loops:
        name = phase_of(kernel, loop)
        if name is None:
            continue
        way = _main(loop, _ITEMS[name])
        if name not in found or _ITEMS[name](way[-1].own) > _ITEMS[name](found[name][-1].own):
            found[name] = way
    result = {}
    for name, way in found.items():
        body, count = way[-1].own, _ITEMS[name]
        items = count(body)
        if not items:
            raise ValueError(f"{function.name}: no work in the loop of {name!r}")
        each = len(body) / items
        result[name] = Phase(
            name,
            len(body),
            items,
            kinds(body)["HMMA"],
            tuple(max(0, round(len(loop.own) - count(loop.own) * each)) for loop in way[:-1]),
            sum(len(inner.own) for inner in way[-1].inner),
            _has("BAR")(way[0].code),
        )
    return result


class Counted(NamedTuple):
    """Of one launch, for each pixel and channel of the output."""

    loops: dict[str, float]  # thread-instructions by phase
    straight: float  # outside of loops, if all of it ran
    mma: float  # for 128 of them


def count(
    kernel: str, function: Function, plan: Plan, shape: Shape, parts: int
) -> tuple[dict[str, Phase], Counted]:
    of = phases(kernel, function)
    slices = plan.slices(shape)
    blocks = plan.blocks(shape) * (1 if kernel == "combine" else 2)
    loops = dict.fromkeys(of, 0.0)
    mma = 0.0
    for chunks in slices:
        times = rounds(kernel, plan, shape, chunks, parts)
        if set(times) != set(of):
            raise ValueError(f"{function.name}: loops of {sorted(of)}, expected {sorted(times)}")
        for name, phase in of.items():
            loops[name] += blocks * phase.instructions(times[name])
            mma += blocks * times[name].items * phase.mma / phase.items
    straight = blocks * len(slices) * WARPS * len(function.straight)
    outputs = shape.unit / 2
    scale = LANES / outputs
    return of, Counted(
        {name: n * scale for name, n in loops.items()}, straight * scale, mma * 128 / outputs
    )


def instance(kernel: str, dtype: str, plan: Plan, names: Sequence[str]) -> str:
    """The mangled name of the kernel that a plan launches."""
    halo = f"ELb{int(plan.halo)}" if kernel == "combine" else ""
    wanted = re.compile(rf"{kernel}_kernelI\w*{dtype.capitalize()}ELi{plan.rows}{halo}EE")
    found = [name for name in names if wanted.search(name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} functions are {wanted.pattern}")
    return found[0]


def blocks_together(registers: int, shared: int, target_shared: int, threads: int) -> int:
    """Blocks that a multiprocessor holds at a time."""
    by_registers = 65536 // (WARPS * LANES * (-(-registers // 8) * 8))
    return min(by_registers, (target_shared + 1024) // (shared + 1024), threads // (WARPS * LANES))
