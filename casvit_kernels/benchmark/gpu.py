"""A GPU's own clock, the time that a call takes of the CPU, and calls recorded as a CUDA graph.

May import: torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from .timer import Call, Unavailable

CYCLES_PER_SECOND = 2e9  # of `torch.cuda._sleep`, at most: on a slower clock it sleeps longer
AT_ONCE = 8  # calls that are queued together: a GPU's queue takes about a thousand kernels
LONGEST_HOLD = 0.1  # seconds
RECORDED_AFTER = 3  # calls before a graph is recorded: compilers, caches, libraries' work spaces


class CudaStopwatch:
    """Device seconds of calls: between events on the current stream, with no launch in between.

    The GPU is held by a kernel that only waits while the calls are queued, so it never waits for the
    CPU, and the time is that of the kernels back to back. With `cold`, twice the GPU's L2 cache is
    overwritten before each call, outside the events; else one pair of events is around many calls.
    What launches more kernels than the queue takes is timed with what launches are then waited for.

    Args:
        device: a CUDA device.
        cold: whether a call finds another L2 cache than the one before it left.
    """

    def __init__(self, device: torch.device, cold: bool) -> None:
        self._flush = None
        if cold:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def __call__(self, call: Call, count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        launching = time.perf_counter() - start
        torch.cuda.synchronize()
        seconds, left = 0.0, count
        while left:
            together = min(left, AT_ONCE, max(1, int(LONGEST_HOLD / (2 * launching + 1e-6))))
            hold = min(2 * together * launching + 1e-4, LONGEST_HOLD)
            torch.cuda._sleep(int(hold * CYCLES_PER_SECOND))
            seconds += self._queued(call, together)
            left -= together
        return seconds

    def _queued(self, call: Call, count: int) -> float:
        pairs = []
        for _ in range(count if self._flush is not None else 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self._flush is not None:
                self._flush.zero_()
            start.record()
            for _ in range(1 if self._flush is not None else count):
                call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in pairs) / 1e3


def call_time(
    call: Call, device: torch.device, rounds: int = 15, clock: Callable[[], float] | None = None
) -> float:
    """Seconds of the CPU until a call returns; the median. The GPU is idle when it begins.

    Args:
        call: what to time; it was called before.
        rounds: at least 1; no more begin once they have taken half a second together.
        clock: seconds, monotonic; None: `time.perf_counter`.

    Raises:
        ValueError: `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    now = clock or time.perf_counter
    found: list[float] = []
    with torch.inference_mode():
        while len(found) < rounds and sum(found) < 0.5:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = now()
            call()
            found.append(now() - start)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return statistics.median(found)


def graphed(call: Call, device: torch.device) -> Call:
    """The same call recorded once as a CUDA graph; each call of the result replays it.

    Raises:
        Unavailable: there is no CUDA device, or the call cannot be recorded.
    """
    if device.type != "cuda":
        raise Unavailable(f"a CUDA graph needs a CUDA device, this is {device.type}")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(RECORDED_AFTER):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = call()
    except RuntimeError as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise Unavailable(f"it cannot be recorded: {type(error).__name__}: {text}") from error

    def replay() -> object:
        graph.replay()
        return out

    return replay
