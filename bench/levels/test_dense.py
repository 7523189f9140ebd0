"""Dense backbones (`fork_feat`) at the sizes of detectors and segmenters.

512x512 (ADE20K) and 800x1333 (COCO), one and two images, fp32: the maps of all four stages from every
candidate, and the memory of a training step, plain and fused, with the BatchNorms frozen as in the
published recipes. Their mixers alone: `test_dense_mixer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness import compare
from bench.harness.case import Case, Choice, Settings
from bench.harness.process_memory import Calls, of_process
from bench.harness.replay import replayed
from bench.harness.results import Measured
from bench.harness.statistics import randomise_statistics
from bench.harness.stepwise import Watcher, in_turn
from casvit_kernels import models as family
from casvit_kernels.benchmark import (
    MIXER_NAMES,
    NETWORK,
    Unavailable,
    model_candidates,
)
from casvit_kernels.surgery import fuse

LEVEL = "dense"
SIZES: tuple[tuple[int, int], ...] = ((512, 512), (800, 1333))
BATCHES = (1, 2)
NAMES = (*MIXER_NAMES, NETWORK)
GPU_NAMES = ()
STEPS = ("eager", "fused")  # whose training step is weighed
SMALL = 64  # pixels of the image that warms up


def cases(choice: Choice) -> list[Case]:
    return [
        case_of(LEVEL, model, None, 3, height, width, batch)
        for model, height, width, batch in problems(choice)
    ]


def problems(choice: Choice) -> list[tuple[str, int, int, int]]:
    """Model, height, width and images."""
    if choice.gpu:
        return []
    sizes, batches = (((64, 96),), (1,)) if choice.quick else (SIZES, BATCHES)
    return [(m, h, w, n) for m in choice.models for h, w in sizes for n in batches]


def case_of(
    level: str, model: str, stage: int | None, channels: int, height: int, width: int, batch: int
) -> Case:
    """A case whose maps may be no squares."""
    other = None if width == height else width
    return Case(level, model, stage, channels, height, batch, "float32", other)


def run(
    case: Case, names: list[str], settings: Settings, watcher: Watcher | None = None
) -> Measured:
    torch.manual_seed(0)
    model, x = backbone(case.model), torch.randn(case.shape)
    calls = model_candidates(model, x, include=names, backend=settings.backend)
    measured = _measure(case, model, x, calls, settings)
    if measured.refused is None and not settings.quick:  # a process for each takes a while
        _weigh(case, settings, measured)
    return measured


def backbone(model: str) -> nn.Module:
    """With four outputs, statistics as after training."""
    return randomise_statistics(getattr(family, f"rcvit_{model}")(fork_feat=True))


def joined(out: Any) -> Tensor:
    """The maps of all stages in one vector, to be compared."""
    parts = [torch.from_numpy(o) if isinstance(o, np.ndarray) else o for o in out]
    return torch.cat([part.flatten() for part in parts])


class _Joined(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return joined(self.model(x))


def _measure(
    case: Case,
    model: nn.Module,
    x: Tensor,
    calls: Mapping[str, Callable[[], object]],
    settings: Settings,
) -> Measured:
    """As `measure`, of several outputs: parity of eager and ours, then of the rest, then all in turn."""
    measured = Measured(case)
    truth = compare.truth(case, _Joined(model), x)
    ours = [name for name in calls if name.startswith(("eager", "fused"))]
    for name in [*ours, *(name for name in calls if name not in ours)]:
        if name not in ours and measured.refused is None:
            measured.refused = compare.refusal(case, measured, "eager", truth)
        if measured.refused is not None:
            return measured
        try:
            with torch.inference_mode():
                measured.errors[name], _ = compare.errors(case, joined(calls[name]()), truth)
        except Unavailable as error:
            measured.absent[name] = str(error).splitlines()[0]
    measured.refused = compare.refusal(case, measured, "eager", truth)
    if measured.refused is None:
        present = {name: call for name, call in calls.items() if name not in measured.absent}
        measured.timings = in_turn(case, present, settings)
    return measured


def _weigh(case: Case, settings: Settings, measured: Measured) -> None:
    arguments = {"model": case.model, "shape": list(case.shape), "backend": settings.backend}
    for name in STEPS:
        try:
            peak = of_process(f"{__name__}:step_calls", name=name, **arguments)
        except Unavailable as error:
            measured.row_facts.setdefault(name, {})["no_memory"] = str(error)
        else:
            measured.row_facts.setdefault(name, {})["step_peak_bytes"] = peak


def step_calls(name: str, model: str, shape: list[int], backend: str) -> Calls:
    """For `process_memory`: a training step of a backbone, after one of a small image.

    Forward, the mean square of every map as a loss, backward; gradients stay, no optimizer.
    """
    torch.manual_seed(0)
    trained = backbone(model)
    if name == "fused":
        fuse(trained, backend=backend)
    trained.train()
    trained.freeze_norms()  # type: ignore[operator]

    def step(*wanted: int) -> Callable[[], object]:
        x = torch.randn(wanted)
        return lambda: sum(out.square().mean() for out in trained(x)).backward()

    return step(shape[0], shape[1], SMALL, SMALL), step(*shape)


@replayed
def test_dense(show: Callable[[], None]) -> None:
    show()
