"""The mixer of each stage on the maps that it gets in a dense backbone, see `test_dense.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.harness.case import Case, Choice, Settings
from bench.harness.measure import measure
from bench.harness.replay import replayed
from bench.harness.results import Measured
from bench.harness.statistics import randomise_statistics
from bench.harness.stepwise import Watcher
from bench.levels.test_dense import case_of, problems
from casvit_kernels.benchmark import MIXER_NAMES, mixer_candidates
from casvit_kernels.models import CONFIGS
from casvit_kernels.ops.mixer.reference import AdditiveTokenMixer

LEVEL = "dense-mixer"
STRIDES = (4, 8, 16, 32)
NAMES = MIXER_NAMES
GPU_NAMES = ()


def cases(choice: Choice) -> list[Case]:
    return [
        case_of(LEVEL, model, stage, channels, *maps(stage, height, width), batch)
        for model, height, width, batch in problems(choice)
        for stage, channels in enumerate(CONFIGS[f"rcvit_{model}"].dims, 1)
        if stage == 4 or not choice.quick
    ]


def maps(stage: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a stage's maps, whose strides round up."""
    stride = STRIDES[stage - 1]
    return -(-height // stride), -(-width // stride)


def run(
    case: Case, names: list[str], settings: Settings, watcher: Watcher | None = None
) -> Measured:
    torch.manual_seed(0)
    mixer, x = randomise_statistics(AdditiveTokenMixer(case.channels)), torch.randn(case.shape)
    candidates = mixer_candidates(mixer, x, include=names, backend=settings.backend)
    return measure(case, mixer, x, candidates, settings, watcher=watcher)


@replayed
def test_dense_mixer(show: Callable[[], None]) -> None:
    show()
