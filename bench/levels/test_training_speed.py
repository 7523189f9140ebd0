"""The mixer in training mode: forward with backward, and on the CPU forward alone."""

from __future__ import annotations

from collections.abc import Callable

from bench.harness.case import Case, Choice, Settings
from bench.harness.measure import measure
from bench.harness.replay import replayed
from bench.harness.results import Measured
from bench.harness.stepwise import Watcher
from bench.levels.test_mixer import mixers, problem
from casvit_kernels.benchmark import GPU_TRAINING_NAMES, TRAINING_NAMES, training_candidates

NAMES, GPU_NAMES = TRAINING_NAMES, GPU_TRAINING_NAMES


def cases(choice: Choice) -> list[Case]:
    if choice.gpu:
        return [
            Case("training", *mixer, batch, "bfloat16")
            for mixer in mixers(choice)
            for batch in choice.batches
        ]
    batch = max(choice.batches)  # nobody trains on one image
    kinds = (("training", "float32"), ("training", "bfloat16"), ("training-forward", "float32"))
    return [Case(level, *mixer, batch, dtype) for level, dtype in kinds for mixer in mixers(choice)]


def run(
    case: Case, names: list[str], settings: Settings, watcher: Watcher | None = None
) -> Measured:
    mixer, x = problem(case, settings)
    candidates = training_candidates(
        mixer, x, backward=case.level == "training", include=names, backend=settings.backend
    )
    return measure(case, mixer, x, candidates, settings, watcher=watcher)


@replayed
def test_training(show: Callable[[], None]) -> None:
    show()
