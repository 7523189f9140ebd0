"""How many times as fast as eager PyTorch two mixers are here, beside what was committed.

A sanity check of seconds, which other processes disturb: what it says is never a problem, but a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .. import benchmark
from ..backends.cpu import active_instruction_set
from ..models.rcvit import CONFIGS
from ..ops.mixer.reference import AdditiveTokenMixer
from . import threads
from .cpu_numbers import MEASURED
from .facts import Facts
from .finding import Finding

TOLERANCE = 2.0  # times less or more than the committed ratio
SIDE = 224  # of the images
ROUNDS = 5


class Probe(NamedTuple):
    """A mixer in float32, its model and stage as in bench/results."""

    model: str
    stage: int
    batch: int

    def __str__(self) -> str:
        return f"{self.model} stage {self.stage}, batch {self.batch}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        side = SIDE // (2 << self.stage)
        return self.batch, CONFIGS[f"rcvit_{self.model}"].dims[self.stage - 1], side, side


PROBES = (Probe("xs", 1, 8), Probe("t", 4, 8))


def findings(facts: Facts, advance: Callable[[], object]) -> Iterator[Finding]:
    """One for each probe, where the CPU's kernels can be used.

    Args:
        advance: called after each.
    """
    name = active_instruction_set()
    if name is None:
        return
    for probe in PROBES:
        committed = MEASURED.get(name, {}).get(probe)
        count = facts.threads if committed is None else min(facts.threads, committed[1])
        yield judged(probe, name, ratio(probe, count), count, facts)
        advance()


def ratio(probe: Probe, count: int) -> float:
    """Measured here: eager PyTorch's time over the fused mixer's, on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with torch.random.fork_rng(devices=[]):
            mixer = AdditiveTokenMixer(probe.shape[1])
            x = torch.randn(probe.shape)
        candidates = benchmark.mixer_candidates(mixer, x, include=("eager", "fused"), backend="cpu")
        timings = benchmark.interleave(candidates, rounds=ROUNDS)
    finally:
        torch.set_num_threads(before)
    return timings["eager"].median / timings["fused"].median


def judged(probe: Probe, name: str, here: float, count: int, facts: Facts) -> Finding:
    """What a ratio says, measured with this instruction set."""
    title = f"speed of the mixer {probe}"
    on = "1 thread" if count == 1 else f"{count} threads"
    found = f"{here:.2f} times as fast as eager, on {on}"
    committed = MEASURED.get(name, {}).get(probe)
    if committed is None:
        return Finding(title, "ok", f"{found}; no committed figure for {name}")
    expected, threads_then, date = committed
    found += f"; committed for {name}: {expected:.2f} ({threads_then} threads, {date})"
    if expected <= TOLERANCE * here and here <= TOLERANCE * expected:
        return Finding(title, "ok", found)
    if here > expected:
        found += "; it is eager that is slow"
    if threads.is_loaded(facts):
        return Finding(
            title, "note", f"{found}; the machine is busy", "run it again when it is idle"
        )
    return Finding(
        title,
        "note",
        found,
        "run it again; if it stays, look for other processes, a CPU quota, and what else is noted here",
    )
