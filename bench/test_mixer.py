"""The mixer of every stage and model size at 224x224 input, against every baseline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measure import REPLAY, Case, Measured, Settings, measure, randomise_statistics

from casvit_kernels.models import CONFIGS
from casvit_kernels.reference import AdditiveTokenMixer
from casvit_kernels.timing import MIXER_NAMES, mixer_candidates

NAMES = MIXER_NAMES
SIZES = (56, 28, 14, 7)
BF16_BATCH = 8


def cases(models: list[str], batches: list[int], quick: bool) -> list[Case]:
    stages = [4] if quick else [1, 2, 3, 4]
    return [
        Case("mixer", m, s, CONFIGS[f"rcvit_{m}"].dims[s - 1], SIZES[s - 1], batch, dtype)
        for m in models
        for s in stages
        for batch in batches
        for dtype in (("float32", "bfloat16") if batch == BF16_BATCH else ("float32",))
    ]


def run(case: Case, names: list[str], settings: Settings) -> Measured:
    torch.manual_seed(0)
    mixer = randomise_statistics(AdditiveTokenMixer(case.channels))
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    candidates = mixer_candidates(mixer, x, include=names, backend=settings.backend)
    return measure(case, mixer, x, candidates, settings)


@pytest.mark.benchmark(timer=REPLAY)
def test_mixer(show: Callable[[], None]) -> None:
    show()
