"""Kinds of values on a command line; what does not fit is said by argparse, with what came."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def integer(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text!r}")
        return int(text)

    return convert


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):
            span = f">= {least:g}" if math.isinf(most) else f"in [{least:g}, {most:g}]"
            raise argparse.ArgumentTypeError(f"expected a number {span}, got {text!r}")
        return value

    return convert


def sizes(text: str) -> tuple[int, ...]:
    return tuple(integer(1)(part) for part in text.split(","))


def four(text: str) -> tuple[int, int, int, int]:
    parts = tuple(integer(1)(part) for part in text.split(","))
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"expected four integers N,N,N,N, got {text!r}")
    return parts
