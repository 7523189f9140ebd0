"""Whole classification models at 224x224 input, fused by `fuse`, against every baseline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measure import REPLAY, Case, Measured, Settings, measure, randomise_statistics

from casvit_kernels import models as family
from casvit_kernels.timing import MODEL_NAMES, model_candidates

NAMES = MODEL_NAMES


def cases(models: list[str], batches: list[int], quick: bool) -> list[Case]:
    size = 64 if quick else 224
    return [Case("model", m, None, 3, size, b, "float32") for m in models for b in batches]


def run(case: Case, names: list[str], settings: Settings) -> Measured:
    torch.manual_seed(0)
    model = randomise_statistics(getattr(family, f"rcvit_{case.model}")())
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    candidates = model_candidates(model, x, include=names, backend=settings.backend)
    return measure(case, model, x, candidates, settings)


@pytest.mark.benchmark(timer=REPLAY)
def test_model(show: Callable[[], None]) -> None:
    show()
