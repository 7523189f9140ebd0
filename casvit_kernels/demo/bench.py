"""The `bench` verb: the demo's measurement alone, on random images, of the stages one wants."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import benchmark
from ..surgery import fuse
from . import check, network, speed
from .progress import phase
from .speed import Speed

SIZE = 224  # pixels


@dataclass(frozen=True)
class Bench:
    """Speed is None where parity failed: nothing was timed."""

    model: str
    environment: dict[str, Any]
    parity: check.Parity
    speed: Speed | None


def run(model: str, batch: int, stages: Sequence[int] | None, quick: bool, seed: int) -> Bench:
    """Check, then measure the mixers of `stages` (1 to 4; None: all, and the whole model)."""
    reference = network.build(model, None, seed)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    network.calibrate(reference, x)
    fused = copy.deepcopy(reference)
    fuse(fused)
    inputs = network.mixer_inputs(reference, x)
    with phase("parity", len(inputs) + 1) as bar:
        parity = check.check(reference, fused, x, inputs, bar.advance)
    measured = None
    if parity.passed:
        measured = speed.measure(reference, x, inputs, quick, stages)
    return Bench(model, benchmark.environment(), parity, measured)
