"""Times that were already measured, handed to pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator


class Replay:
    """A timer for pytest-benchmark that runs through times already measured.

    The tool times one callable after the other; ours are timed in turn. So each test replays its
    candidate's rounds, and the tool lists and saves them.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: Iterator[float] = iter(())

    def load(self, samples: tuple[float, ...]) -> None:
        self._samples = iter(samples)

    def step(self) -> None:
        self._now += next(self._samples, 0.0)

    def __call__(self) -> float:
        return self._now


REPLAY = Replay()


def replayed(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test for that timer, where pytest is; `bench/gpu` runs these files without it."""
    try:
        import pytest
    except ImportError:
        return test
    marked: Callable[..., None] = pytest.mark.benchmark(timer=REPLAY)(test)
    return marked
