"""What the demo of token clustering found out: the source of its text, its page and its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..results import finite


@dataclass(frozen=True)
class Model:
    name: str
    parameters: int  # without the classifier
    checkpoint: str | None  # path; None: initial weights, untrained
    backend: str  # that serves float32 on the CPU


@dataclass(frozen=True)
class Expedited:
    """What `tokens.expedite` did, as its report says; MACs are of one image."""

    blocks: str
    depth: int
    at: int
    until: int
    grid: tuple[int, int]
    prefix: int
    map: tuple[int, int]
    tokens_before: int
    tokens_after: int
    macs_before: int
    macs_after: int
    text: str  # the report printed


@dataclass(frozen=True)
class Photograph:
    name: str
    clusters: int  # that are some token's nearest
    similarity: float  # cosine of a token's feature with and without clustering, mean over the map


@dataclass(frozen=True)
class Latency:
    """Seconds of a call: the median and the quartiles over the rounds."""

    seconds: float
    p25: float
    p75: float


@dataclass(frozen=True)
class Speed:
    """Both models in turn, one image at a time."""

    threads: int
    rounds: int
    plain: Latency
    expedited: Latency
    ratio: float  # of the medians: images a second, expedited over plain


@dataclass(frozen=True)
class Results:
    version: str
    environment: dict[str, Any]
    model: Model
    size: int  # pixels of an image, both ways
    expedited: Expedited
    photographs: list[Photograph]
    photographs_found: int
    speed: Speed
    report: str  # path of the page

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and finite numbers."""
        found: dict[str, Any] = finite({"command": "tokens", **asdict(self)})
        return found
