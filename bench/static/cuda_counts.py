"""Executed instructions of the CUDA kernels, from their loops (sass.py) and how often these go round
(cuda_forward.py, cuda_backward.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from cuda_backward import BACKWARD_COMBINE, BACKWARD_DEPTHWISE, BACKWARD_GATE
from cuda_forward import COMBINE, GATES, STATISTICS
from cuda_single_pass import SINGLE_PASS
from cuda_work import LANES, WARPS, Kernel, Launch, Plan, Rounds, Rule
from sass import Function, Loop, kinds, named, ways

# In the order in which the emulation gives plans. What is asked of them stands in cuda_table.PASSES.
KERNELS = {
    kernel.name: kernel
    for kernel in (
        GATES,
        STATISTICS,
        COMBINE,
        BACKWARD_COMBINE,
        BACKWARD_GATE,
        BACKWARD_DEPTHWISE,
        SINGLE_PASS,
    )
}


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
    other: int = 0  # of the other side of the innermost loop's fork

    def instructions(self, times: Rounds) -> float:
        """Warp-instructions of a block."""
        around = times.around[len(times.around) - len(self.around) :] if self.around else ()
        return (
            times.items * self.own / self.items
            + sum(n * each for n, each in zip(around, self.around, strict=True))
            + times.inside * self.inside
            + times.other * self.other
        )


def rule_of(kernel: Kernel, loop: Loop) -> Rule:
    """By what an outermost loop has."""
    for rule in kernel.rules:
        lacks = not rule.lacks or not named(loop.code, *rule.lacks)
        if lacks and all(named(loop.code, name) for name in rule.has):
            return rule
    raise ValueError(f"{kernel.name}: no phase has {dict(kinds(loop.code))}")


def _main(loop: Loop, item: str) -> tuple[Loop, ...]:
    """The way from an outermost loop to the one with most of the phase's work in its own code, which is
    the body of an unrolled loop and not one of its remainders."""
    ways = [(loop,)]
    for inner in loop.inner:
        ways.append((loop, *_main(inner, item)))
    # The innermost of those with work: what an unrolled loop left over stands in the loop around it.
    return max(
        ways,
        key=lambda way: (len(way) > 1 and named(way[-1].own, item) > 0, named(way[-1].own, item)),
    )


def _loops(kernel: Kernel, function: Function) -> dict[str, tuple[Rule, tuple[Loop, ...]]]:
    """Each phase's rule and way to its work, as they stand in the code."""
    found: dict[str, tuple[Rule, tuple[Loop, ...]]] = {}
    for rule in kernel.rules:
        item = rule.has[0]
        ways = [_main(loop, item) for loop in function.loops if rule_of(kernel, loop) is rule]
        if len(rule.names) > 1:
            if len(ways) != len(rule.names):
                raise ValueError(f"{function.name}: {len(ways)} loops are {rule.names}")
            found |= {name: (rule, way) for name, way in zip(rule.names, ways, strict=True)}
        elif rule.names and ways:  # an unrolled loop and its remainder, which may stand apart
            found[rule.names[0]] = rule, max(ways, key=lambda way: named(way[-1].own, item))
    return dict(sorted(found.items(), key=lambda one: one[1][1][0].first))


def phases(kernel: Kernel, function: Function) -> dict[str, Phase]:
    result = {}
    for name, (rule, way) in _loops(kernel, function).items():
        body, item = way[-1].own, rule.has[0]
        own, items, other = len(body), named(body, item), 0
        if not items:
            raise ValueError(f"{function.name}: no work in the loop of {name!r}")
        if rule.fork:
            own, items, other = _fork(function, name, way[-1], item)
        each = own / items
        beside = () if rule.beside is None else _beside(way)
        result[name] = Phase(
            name,
            own,
            items,
            kinds(body)["HMMA"],
            tuple(max(0, round(len(loop.own) - named(loop.own, item) * each)) for loop in way[:-1]),
            sum(len(inner.own) for inner in way[-1].inner),
            named(way[0].code, "BAR") - sum(named(loop.code, "BAR") for loop in beside),
            other,
        )
        if rule.beside is not None:
            result[rule.beside[0]] = _turns(function, *rule.beside, beside)
    return result


def _fork(function: Function, name: str, loop: Loop, item: str) -> tuple[int, int, int]:
    """Of a round with several pieces of work: instructions and pieces; instructions of one with one.
    What does the one, or either, may lie on all ways, then under a condition."""
    found, pieces = ways(loop, item), named(loop.own, item) - 1
    most = max(found, default=0)
    alone = max((found[n][1] for n in found if n < 2), default=found[most][1] if found else 0)
    if pieces < 2 or most not in (pieces, pieces + 1) or not found.keys() <= {0, 1, most}:
        raise ValueError(f"{function.name}: no fork in the loop of {name!r}: {found}")
    return found[most][1], pieces, alone


def _beside(way: tuple[Loop, ...]) -> tuple[Loop, ...]:
    return tuple(loop for outer in way[:-1] for loop in outer.inner if loop not in way)


def _turns(function: Function, name: str, item: str, loops: tuple[Loop, ...]) -> Phase:
    """A loop beside the work: its rounds do all of their own work, or the rest of it without what
    stands for it, or go round for other warps, by the shortest way."""
    if len(loops) != 1:
        raise ValueError(f"{function.name}: {len(loops)} loops are {name!r}")
    (loop,) = loops
    found = ways(loop, item)
    if not max(found, default=0) or 0 not in found:
        raise ValueError(f"{function.name}: no turns in the loop of {name!r}: {found}")
    barriers, most = named(loop.code, "BAR"), max(found)
    idle = min(fewest for fewest, _ in found.values())
    return Phase(name, found[most][1], most, 0, (idle,), 0, barriers, found[0][1])


class Counted(NamedTuple):
    """Of one launch, for each pixel and channel of the output."""

    loops: dict[str, float]  # thread-instructions by phase
    straight: float  # outside of loops, if all of it ran
    mma: float  # for 128 of them


def count(kernel: Kernel, function: Function, launch: Launch) -> tuple[dict[str, Phase], Counted]:
    of = phases(kernel, function)
    shape, plan, _ = launch
    slices = plan.slices(shape)
    blocks = plan.blocks(shape) * kernel.gates
    loops = dict.fromkeys(of, 0.0)
    mma = 0.0
    for chunks in slices:
        times = kernel.rounds(launch, chunks)
        if set(times) != set(of):
            raise ValueError(f"{function.name}: loops of {sorted(of)}, expected {sorted(times)}")
        for name in kernel.forks:
            if of[name].items != plan.rows:
                raise ValueError(f"{function.name}: {of[name].items} rows in a round of {name!r}")
        for name, phase in of.items():
            loops[name] += blocks * phase.instructions(times[name])
            mma += blocks * times[name].items * phase.mma / phase.items
    straight = blocks * len(slices) * WARPS * len(function.straight)
    outputs = shape.unit / 2
    scale = LANES / outputs
    return of, Counted(
        {name: n * scale for name, n in loops.items()}, straight * scale, mma * 128 / outputs
    )


def instance(kernel: Kernel, dtype: str, plan: Plan, names: Sequence[str]) -> str:
    """The mangled name of the kernel that a plan launches."""
    wanted = re.compile(
        # Its length stands before a name, so that combine is not backward_combine.
        rf"\d{kernel.name}_kernelI\w*{dtype.capitalize()}ELi{plan.rows}(ELb{int(plan.halo)})?EE"
    )
    found = [name for name in names if wanted.search(name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} functions are {wanted.pattern}")
    return found[0]


def blocks_together(registers: int, shared: int, target_shared: int, threads: int) -> int:
    """Blocks that a multiprocessor holds at a time."""
    by_registers = 65536 // (WARPS * LANES * (-(-registers // 8) * 8))
    return min(by_registers, (target_shared + 1024) // (shared + 1024), threads // (WARPS * LANES))
