"""The progress bar of a command, on stderr."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Phase:
    """One bar, or none where tqdm is not installed."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def advance(self, steps: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(steps)

    def say(self, doing: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(doing)

    def reach(self, done: int, total: int) -> None:
        """For callers that count themselves."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)


@contextmanager
def phase(title: str, total: int | None = None) -> Iterator[Phase]:
    """A bar of `total` steps that stays when it is full and goes when an error ends it."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ModuleNotFoundError:  # a comfort, no reason to refuse work
        yield Phase(None)
        return
    bar = tqdm(
        total=total,
        desc=f"{title:<9}",
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,  # seconds; a log wants few lines
        bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}{postfix}",  # tqdm begins it with a comma
    )
    try:
        yield Phase(bar)
    except BaseException:
        bar.leave = False
        raise
    finally:
        bar.close()
