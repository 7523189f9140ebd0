"""Whole networks on the CPU in one call, beside what else serves them, each in a process of its own.

Inputs are photographs, at which BatchNorm statistics were taken: top classes are compared, too.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.harness.case import Case, Choice, Settings
from bench.harness.replay import replayed
from bench.harness.results import Measured
from bench.harness.stepwise import Watcher
from casvit_kernels.benchmark import NETWORK_NAMES, precisions
from casvit_kernels.demo import whole

NAMES = NETWORK_NAMES
GPU_NAMES = ()
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def cases(choice: Choice) -> list[Case]:
    """bf16 where this CPU has it: elsewhere there is nothing to compare."""
    if choice.gpu:
        return []
    there = {"fp32", *precisions()}
    return [
        Case("network", model, None, 3, 64 if choice.quick else pixels, batch, dtype)
        for pixels in choice.inputs
        for model in choice.networks
        for batch in choice.batches
        for dtype, precision in PRECISIONS.items()
        if precision in there
    ]


def run(
    case: Case, names: list[str], settings: Settings, watcher: Watcher | None = None
) -> Measured:
    model, x = whole.problem(f"rcvit_{case.model}", case.batch, size=case.size)
    found = whole.measure(
        model,
        x,
        batch=case.batch,
        precision=PRECISIONS[case.dtype],
        names=names,
        backend=settings.backend,
        rounds=settings.rounds,
        starts=settings.starts,
        min_round_seconds=settings.min_round_seconds,
        pause_seconds=settings.pause_seconds,
    )
    race = found.race
    return Measured(
        case,
        timings=race.timings,
        errors={name: e.max_error for name, e in found.exactness.items()},
        absent=race.timings.absent,
        failed=race.failed,
        facts={
            "macs": found.macs,  # of an image
            "images": found.images,  # that errors and top classes are of
            **({} if found.peak is None else {"peak_macs_per_s": float(f"{found.peak:.4g}")}),
        },
        row_facts={
            name: {"same_top1": found.exactness[name].same_top1, **race.facts[name]}
            for name in race.timings
        },
        refused=race.refused,
    )


@replayed
def test_network(show: Callable[[], None]) -> None:
    show()
