"""The rate of multiply-adds that this CPU reaches: what a model's share of peak is a share of."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from ..backends import native

PRECISIONS = {"fp32": 0, "bf16": 1}
WINDOW_SECONDS = 0.02

Loop = Callable[[int, int], int]  # precision, repetitions -> multiply-adds done


def fma_peak(
    precision: str = "fp32", threads: int = 1, windows: int = 5, loop: Loop | None = None
) -> float | None:
    """Multiply-adds a second of a loop that does nothing else, on all threads; the best window.

    It runs the multiply-adds of the instruction set that the kernels use, out of registers.

    Args:
        precision: ``"fp32"`` or ``"bf16"``.
        threads: as many as the models that are compared with it have.
        windows: of some hundredths of a second each.
        loop: what to run; None: the native library's.

    Returns:
        None where the native library or, in it, that precision is missing.

    Raises:
        ValueError: `precision` is not known, or `threads` or `windows` less than 1.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    for name, value in (("threads", threads), ("windows", windows)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    run = loop or _native_loop()
    number = PRECISIONS[precision]
    if run is None or run(number, 1) <= 0:
        return None
    repetitions = _enough(run, number)
    start = Barrier(threads)

    def work(_: int) -> tuple[float, float, int]:
        start.wait()
        begin = time.perf_counter()
        done = run(number, repetitions)
        return begin, time.perf_counter(), done

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(windows):
            found = list(pool.map(work, range(threads)))
            # The rate of each thread while it ran: one that began later would shorten the others'.
            best = max(best, sum(done / (end - begin) for begin, end, done in found))
    return best


def _native_loop() -> Loop | None:
    library, _ = native.load()
    return None if library is None else library.casvit_cpu_fma_loop


def _enough(run: Loop, number: int) -> int:
    """Repetitions that take about a window."""
    repetitions = 1
    while True:
        begin = time.perf_counter()
        run(number, repetitions)
        seconds = time.perf_counter() - begin
        if seconds >= WINDOW_SECONDS:
            return repetitions
        repetitions = max(2 * repetitions, int(repetitions * WINDOW_SECONDS / max(seconds, 1e-6)))
