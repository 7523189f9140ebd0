"""The mixer in training mode at 224x224 input: forward with backward, and forward alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measure import REPLAY, Case, Measured, Settings, measure, randomise_statistics
from test_mixer import SIZES

from casvit_kernels.models import CONFIGS
from casvit_kernels.reference import AdditiveTokenMixer
from casvit_kernels.timing import TRAINING_NAMES, training_candidates

NAMES = TRAINING_NAMES
LEVELS = ("training", "training-forward")


def cases(models: list[str], batches: list[int], quick: bool) -> list[Case]:
    batch = max(batches)  # nobody trains on one image
    return [
        Case(level, m, s, CONFIGS[f"rcvit_{m}"].dims[s - 1], SIZES[s - 1], batch, dtype)
        for level in LEVELS
        for m in models
        for s in ([4] if quick else [1, 2, 3, 4])
        for dtype in (("float32", "bfloat16") if level == "training" else ("float32",))
    ]


def run(case: Case, names: list[str], settings: Settings) -> Measured:
    torch.manual_seed(0)
    mixer = randomise_statistics(AdditiveTokenMixer(case.channels))
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    candidates = training_candidates(
        mixer, x, backward=case.level == "training", include=names, backend=settings.backend
    )
    return measure(case, mixer, x, candidates, settings)


@pytest.mark.benchmark(timer=REPLAY)
def test_training(show: Callable[[], None]) -> None:
    show()
