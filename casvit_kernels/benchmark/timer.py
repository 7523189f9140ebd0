"""Times several ways to compute one thing, in turn, so that all of them meet the same conditions.

On the CPU a wall clock measures, on a GPU its own events (`gpu.CudaStopwatch`). May import: torch.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]
BF16 = " bf16"  # suffix of the names of what runs under bfloat16 autocast


class Unavailable(RuntimeError):
    """A candidate cannot be built on this machine; the message says why."""


class Timing(NamedTuple):
    """Seconds per call over the rounds: the median and the quartiles."""

    median: float
    p25: float
    p75: float
    rounds: int
    calls: int  #: per round
    samples: tuple[float, ...]  #: seconds per call of each round, in the order measured


class Timings(dict[str, Timing]):
    """By candidate; `absent` has the reason for each candidate that could not be built."""

    def __init__(self) -> None:
        super().__init__()
        self.absent: dict[str, str] = {}


class Stopwatch(Protocol):
    """Measures for `interleave`."""

    def __call__(self, call: Call, count: int) -> float:
        """Seconds that `count` calls take together."""
        ...


class WallStopwatch:
    """Seconds of a monotonic clock around a loop of calls.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def __call__(self, call: Call, count: int) -> float:
        start = self._clock()
        for _ in itertools.repeat(None, count):
            call()
        return self._clock() - start


def interleave(
    candidates: Mapping[str, Call],
    *,
    rounds: int = 15,
    min_round_seconds: float = 0.05,
    pause_seconds: float = 0.05,
    progress: Callable[[int, int], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    stopwatch: Stopwatch | None = None,
) -> Timings:
    """Time each candidate `rounds` times, all of them in every round, in rotated order.

    A first call that is not timed builds and warms up each candidate. Everything runs under
    `torch.inference_mode`, with Python's garbage collection off.

    Args:
        candidates: name and what to call. One whose first call raises `Unavailable` is left out and
            its reason kept; any other exception is raised.
        rounds: at least 1.
        min_round_seconds: calls are repeated within a round until they last that long.
        pause_seconds: before each turn. The thread pools of PyTorch and ONNX Runtime spin for a
            while after a call (measured: up to 35 ms), on the cores that the next candidate needs.
        progress: called as ``progress(done, total)``, in turns.
        clock: seconds, monotonic.
        stopwatch: what measures instead of `clock`.

    Raises:
        ValueError: `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    measure = stopwatch or WallStopwatch(clock)
    done, total = 0, len(candidates) * (rounds + 1)
    found = Timings()
    calls: dict[str, int] = {}
    samples: dict[str, list[float]] = {}

    def turn(name: str, count: int) -> float:
        call = candidates[name]
        time.sleep(pause_seconds)
        if count > 1:
            call()  # wakes the candidate's own threads
        return measure(call, count)

    def report(turns: int) -> None:
        nonlocal done
        done += turns
        if progress is not None:
            progress(done, total)

    collecting = gc.isenabled()
    with torch.inference_mode():
        try:
            for name, call in candidates.items():
                try:
                    call()
                except Unavailable as error:
                    found.absent[name] = str(error)
                    report(rounds + 1)
                    continue
                calls[name] = enough_calls(partial(turn, name), min_round_seconds)
                samples[name] = []
                report(1)
            gc.collect()
            gc.disable()
            names = list(samples)
            for r in range(rounds):
                first = r % max(len(names), 1)
                for name in names[first:] + names[:first]:
                    samples[name].append(turn(name, calls[name]) / calls[name])
                    report(1)
        finally:
            if collecting:
                gc.enable()
    for name in names:
        found[name] = summary(samples[name], calls[name])
    return found


def summary(samples: list[float], calls: int) -> Timing:
    """Median and quartiles (linear between neighbours) of at least one sample."""
    if len(samples) == 1:
        p25 = median = p75 = samples[0]
    else:
        p25, median, p75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, p25, p75, len(samples), calls, tuple(samples))


def is_bf16(name: str) -> bool:
    """Whether the candidate of this name runs under bfloat16 autocast."""
    return name.endswith(BF16)


def ratio_to_best(timings: Mapping[str, Timing], of: str = "fused") -> tuple[float, str]:
    """How many times faster `of` is than the fastest baseline of its dtype, and that one's name.

    Raises:
        ValueError: `of` or every baseline is missing from `timings`.
    """
    rivals = [n for n in timings if not n.startswith("fused") and is_bf16(n) == is_bf16(of)]
    if of not in timings or not rivals:
        raise ValueError(f"timings: expected {of!r} and a baseline, got {', '.join(timings)}")
    best = min(rivals, key=lambda n: timings[n].median)
    return timings[best].median / timings[of].median, best


def enough_calls(seconds_of: Callable[[int], float], least: float) -> int:
    """How many calls last `least` seconds."""
    calls = 1
    while (seconds := seconds_of(calls)) < least:
        guess = math.ceil(1.1 * calls * least / seconds) if seconds > 0 else 10 * calls
        calls = min(max(guess, calls + 1), 10 * calls)
    return calls
