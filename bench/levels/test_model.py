"""Whole classification models, fused by `fuse`: forward, and on a GPU forward with backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.harness.case import Case, Choice, Settings
from bench.harness.measure import measure
from bench.harness.replay import replayed
from bench.harness.results import Measured
from bench.harness.statistics import randomise_statistics
from bench.harness.stepwise import Watcher
from bench.levels.test_mixer import dtypes
from casvit_kernels import models as family
from casvit_kernels.benchmark import (
    GPU_MODEL_NAMES,
    GPU_MODEL_TRAINING_NAMES,
    MODEL_NAMES,
    model_candidates,
    model_training_candidates,
)

NAMES, GPU_NAMES = MODEL_NAMES, GPU_MODEL_NAMES
TRAINING_GPU_NAMES = GPU_MODEL_TRAINING_NAMES
COMPARED = 8  # images of a training step, which in float64 needs gigabytes for each


def cases(choice: Choice) -> list[Case]:
    levels = ["model", "model-training"] if choice.gpu else ["model"]
    return [
        Case(level, model, None, 3, 64 if choice.quick else pixels, batch, dtypes(choice, batch)[0])
        for level in levels
        for pixels in choice.inputs
        for model in choice.models
        for batch in choice.batches
    ]


def run(
    case: Case, names: list[str], settings: Settings, watcher: Watcher | None = None
) -> Measured:
    torch.manual_seed(0)
    trains = case.level == "model-training"
    model = getattr(family, f"rcvit_{case.model}")(distillation=not trains)  # then one output
    randomise_statistics(model)
    model.to(settings.device)
    x = torch.randn(case.batch, case.channels, case.size, case.size, device=settings.device)
    if not trains:
        candidates = model_candidates(model, x, include=names, backend=settings.backend)
        return measure(case, model, x, candidates, settings, watcher=watcher)
    candidates = model_training_candidates(model, x, include=names, backend=settings.backend)
    few = x[:COMPARED]
    compared = [n for n in names if n.startswith(("eager", "fused")) and "compile" not in n]
    trial = model_training_candidates(model, few, include=compared, backend=settings.backend)
    return measure(case, model, x, candidates, settings, (few, trial), watcher)


@replayed
def test_model(show: Callable[[], None]) -> None:
    show()
