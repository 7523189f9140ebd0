"""All checks, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import gpu, installation, parity, processor, settings, speed, threads
from .facts import Facts, gather
from .finding import Finding


class Checkup(NamedTuple):
    """What was found; `str` of it is for people."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether there is no problem."""
        return not any(f.status == "problem" for f in self.findings)

    def __str__(self) -> str:
        counts = [_count(self.findings, "problem"), _count(self.findings, "note")]
        return "\n".join([*map(str, self.findings), "", f"{' and '.join(counts)}."])


def checkup(
    *, quick: bool = False, progress: Callable[[int, int], object] | None = None
) -> Checkup:
    """Look for what is wrong with this process, this installation and this machine.

    Args:
        quick: only look, which takes no time; else the kernels are checked against float64 and timed,
            too, in about a minute on two cores.
        progress: called as ``progress(done, total)`` while that goes on.
    """
    facts = gather()  # before this process itself loads the machine
    found = list(looks(facts))
    if not quick:
        found += _trials(facts, progress or (lambda done, total: None))
    return Checkup(tuple(found))


def looks(facts: Facts) -> Iterator[Finding]:
    """What facts tell, without computing anything."""
    for room in (installation, processor, threads, gpu, settings):
        yield from room.findings(facts)


def _trials(facts: Facts, progress: Callable[[int, int], object]) -> Iterator[Finding]:
    planned = parity.plan()
    total = sum(map(len, planned.values())) + len(parity.precisions()) + len(speed.PROBES)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    yield from parity.findings(planned, advance)
    yield from speed.findings(facts, advance)


def _count(findings: tuple[Finding, ...], status: str) -> str:
    number = sum(f.status == status for f in findings)
    return f"{number or 'no'} {status}{'s' * (number != 1)}"
