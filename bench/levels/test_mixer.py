"""The mixer of every stage and model size at 224x224 input, against every baseline."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.harness.case import Case, Choice, Settings
from bench.harness.measure import measure
from bench.harness.replay import replayed
from bench.harness.results import Measured
from bench.harness.statistics import randomise_statistics
from bench.harness.stepwise import Watcher
from casvit_kernels.benchmark import GPU_MIXER_NAMES, MIXER_NAMES, mixer_candidates
from casvit_kernels.models import CONFIGS
from casvit_kernels.ops.mixer.reference import AdditiveTokenMixer

NAMES, GPU_NAMES = MIXER_NAMES, GPU_MIXER_NAMES
BF16_BATCH = 8


def cases(choice: Choice) -> list[Case]:
    return [
        Case("mixer", *mixer, batch, dtype)
        for mixer in mixers(choice)
        for batch in choice.batches
        for dtype in dtypes(choice, batch)
    ]


def mixers(choice: Choice) -> list[tuple[str, int, int, int]]:
    """Model, stage, channels, size."""
    return [
        (model, stage, CONFIGS[f"rcvit_{model}"].dims[stage - 1], pixels // (2 << stage))
        for pixels in choice.inputs
        for model in choice.models
        for stage in ([4] if choice.quick else [1, 2, 3, 4])
    ]


def dtypes(choice: Choice, batch: int) -> list[str]:
    if choice.gpu:
        return ["bfloat16"]
    return ["float32", "bfloat16"] if batch == BF16_BATCH else ["float32"]


def run(
    case: Case, names: list[str], settings: Settings, watcher: Watcher | None = None
) -> Measured:
    mixer, x = problem(case, settings)
    candidates = mixer_candidates(mixer, x, include=names, backend=settings.backend)
    return measure(case, mixer, x, candidates, settings, watcher=watcher)


def problem(case: Case, settings: Settings) -> tuple[AdditiveTokenMixer, torch.Tensor]:
    """A plain mixer and its input."""
    torch.manual_seed(0)
    mixer = AdditiveTokenMixer(case.channels)
    randomise_statistics(mixer)
    x = torch.randn(case.batch, case.channels, case.size, case.size, device=settings.device)
    return mixer.to(settings.device), x


@replayed
def test_mixer(show: Callable[[], None]) -> None:
    show()
