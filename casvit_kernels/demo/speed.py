"""How long the model and its mixers take, fused and otherwise, measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import benchmark
from . import network
from .progress import Phase, phase

BATCH = 8
ROUNDS, QUICK_ROUNDS = 15, 3
MODEL = (*benchmark.MIXER_NAMES, "fused compile", benchmark.NETWORK)
# What has to be compiled or exported first takes minutes and is left out of a quick run.
QUICK = ("eager", "eager channels_last", "fused", "fused channels_last", benchmark.NETWORK)


@dataclass(frozen=True)
class Latency:
    """Seconds per call: the median and the quartiles over the rounds."""

    name: str
    seconds: float
    p25: float
    p75: float
    speedup: float  # eager's median over this one


@dataclass(frozen=True)
class Stage:
    """One mixer of a stage, on its real input."""

    name: str  # "stage 1"
    shape: tuple[int, ...]
    count: int  # mixers of this shape in the network
    latencies: list[Latency]  # of one call of one mixer


@dataclass(frozen=True)
class Absent:
    """What could not be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Speed:
    batch: int
    threads: int
    rounds: int
    model: list[Latency]  # empty where only some stages were asked for
    stages: list[Stage]
    mixers: list[Latency]  # sum over all stages of count times one mixer; empty likewise
    absent: list[Absent]


def is_fused(name: str) -> bool:
    return name.startswith("fused")


def best(latencies: list[Latency], fused: bool) -> Latency:
    """The fastest of the fused ones, or of all others."""
    return min((x for x in latencies if is_fused(x.name) is fused), key=lambda x: x.seconds)


def measure(
    model: nn.Module,
    x: Tensor,
    inputs: Mapping[str, Tensor],
    quick: bool,
    only: Sequence[int] | None = None,
) -> Speed:
    """Measure the whole model and one mixer of each stage.

    Args:
        model: with plain mixers, in eval mode.
        x: ``(B, 3, H, W)``.
        inputs: what each mixer receives for `x`, by name.
        quick: few rounds, and nothing that has to be compiled or exported first.
        only: stages (from 1) to measure, without the whole model; None for everything.
    """
    rounds = QUICK_ROUNDS if quick else ROUNDS
    mixers = network.mixers(model)
    groups = list(enumerate(network.stages(list(mixers)), 1))
    groups = [(i, names) for i, names in groups if only is None or i in only]
    jobs = {
        f"stage {i}": benchmark.mixer_candidates(
            mixers[names[-1]], inputs[names[-1]], include=_wanted(benchmark.MIXER_NAMES, quick)
        )
        for i, names in groups
    }
    if only is None:
        include = _wanted(MODEL, quick)
        jobs = {"whole model": benchmark.model_candidates(model, x, include=include), **jobs}

    absent: dict[str, str] = {}
    if quick:
        absent = {n: "left out by --quick" for n in MODEL if n not in QUICK}
    found = {}
    with phase("speed", sum(len(job) for job in jobs.values()) * (2 + rounds)) as bar:
        for label, candidates in jobs.items():
            found[label] = _latencies(label, candidates, rounds, absent, bar)
    stages = [
        Stage(f"stage {i}", tuple(inputs[names[-1]].shape), len(names), found[f"stage {i}"])
        for i, names in groups
    ]
    return Speed(
        batch=len(x),
        threads=torch.get_num_threads(),
        rounds=rounds,
        model=found.get("whole model", []),
        stages=stages,
        mixers=_sum(stages) if only is None else [],
        absent=[Absent(name, reason) for name, reason in absent.items()],
    )


def _wanted(names: Iterable[str], quick: bool) -> list[str]:
    return [name for name in names if name in QUICK or not quick]


def _latencies(
    label: str,
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    absent: dict[str, str],
    bar: Phase,
) -> list[Latency]:
    """Build each candidate, then time all in turn; notes in `absent` what cannot be built."""
    ready = {}
    for name, call in candidates.items():
        bar.say(f"{label}: preparing {name}")
        try:
            with torch.inference_mode():
                call()
            ready[name] = call
        except benchmark.Unavailable as error:
            absent[name] = str(error)
            bar.advance(1 + rounds)
        bar.advance()
    bar.say(label)
    timings = benchmark.interleave(
        ready,
        rounds=rounds,
        min_round_seconds=0.01 if rounds == QUICK_ROUNDS else 0.05,
        progress=lambda *_: bar.advance(),
    )
    eager = timings["eager"].median
    return [Latency(n, t.median, t.p25, t.p75, eager / t.median) for n, t in timings.items()]


def _sum(stages: Sequence[Stage]) -> list[Latency]:
    """The mixers of the network one after the other, for what was measured in every stage."""
    totals: dict[str, tuple[float, float, float]] = {}
    for name in dict.fromkeys(row.name for stage in stages for row in stage.latencies):
        rows = [(s.count, row) for s in stages for row in s.latencies if row.name == name]
        if len(rows) == len(stages):
            totals[name] = (
                sum(n * row.seconds for n, row in rows),
                sum(n * row.p25 for n, row in rows),
                sum(n * row.p75 for n, row in rows),
            )
    eager = totals["eager"][0]
    return [Latency(name, *t, eager / t[0]) for name, t in totals.items()]
