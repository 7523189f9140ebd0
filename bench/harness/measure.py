"""One case: parity first, then every candidate timed in turn, in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from bench.harness import compare, memory
from bench.harness.case import Case, Settings
from bench.harness.results import Measured
from bench.harness.stepwise import Watcher, in_turn, step_by_step
from casvit_kernels import benchmark


def measure(
    case: Case,
    module: nn.Module,
    x: Tensor,
    candidates: Mapping[str, Callable[[], object]],
    settings: Settings,
    trial: tuple[Tensor, Mapping[str, Callable[[], object]]] | None = None,
    watcher: Watcher | None = None,
) -> Measured:
    """Compare with float64, then time. Where a fused candidate fails parity nothing is timed.

    With a watcher one candidate after the other, see `stepwise.py`.

    Args:
        module: the plain module that the candidates compute.
        x: its input, float32.
        candidates: as `casvit_kernels.benchmark` makes them; ``eager`` is among them.
        trial: a smaller input and its candidates, eager and fused: these are compared instead.
        watcher: told of each candidate before and after it.
    """
    if watcher is not None:
        return step_by_step(case, module, x, candidates, settings, trial, watcher)
    measured = Measured(case)
    eager = "eager bf16" if case.dtype == "bfloat16" else "eager"
    compared, among = trial or (x, candidates)
    truth = compare.truth(case, module, compared)
    with torch.inference_mode():

        def call(name: str, among: Mapping[str, Callable[[], object]]) -> object:
            try:
                return among[name]()
            except (benchmark.Unavailable, torch.OutOfMemoryError) as error:
                measured.absent[name] = str(error).splitlines()[0]
                return None

        def judge(names: Iterable[str], among: Mapping[str, Callable[[], object]]) -> None:
            for name in names:
                out = call(name, among)
                if out is not None:
                    error, of_gradients = compare.errors(case, out, truth)
                    measured.errors[name] = error
                    if of_gradients is not None:
                        measured.gradient_errors[name] = of_gradients

        judged = [eager, *(name for name in among if name.startswith("fused"))]
        judge(judged, among)
        measured.refused = compare.refusal(case, measured, eager, truth)
        if measured.refused is not None:
            return measured  # before the baselines are compiled and exported
        if trial is None:
            judge((name for name in candidates if name not in judged), candidates)
        else:
            for name in candidates:
                call(name, candidates)
        truth = ()  # gigabytes
        present = {name: c for name, c in candidates.items() if name not in measured.absent}
        measured.memory = {name: memory.of_call(case, name, c) for name, c in present.items()}
    measured.timings = in_turn(case, present, settings)
    return measured
