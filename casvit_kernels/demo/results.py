"""What the demo found out: the one source of the terminal's tables, the report and the JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .check import Parity
from .speed import Speed
from .training import Training


@dataclass(frozen=True)
class ModelFacts:
    name: str
    parameters: int
    checkpoint: str | None  # path; None: initial weights, untrained
    mixers: int
    backend: str  # that serves float32 on the CPU


@dataclass(frozen=True)
class GateRange:
    """The lowest and highest value of a stage's spatial gates over all photographs."""

    mixer: str
    q: tuple[float, float]
    k: tuple[float, float]


@dataclass(frozen=True)
class Results:
    version: str
    environment: dict[str, Any]
    quick: bool
    photographs: list[str]  # names of those used
    photographs_found: int
    model: ModelFacts
    parity: Parity
    speed: Speed | None = None  # None: parity failed, nothing was timed
    training: Training | None = None
    gates: list[GateRange] | None = None
    report: str | None = None  # path

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and finite numbers."""
        found: dict[str, Any] = finite({"command": "demo", **asdict(self)})
        return found


def finite(value: Any) -> Any:
    """`value` with NaN and infinity as None, which is all that JSON can say, and keys as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
