"""One candidate after the other, each result handed over as soon as it is there.

For machines that may be taken away at any time: each candidate is built, compared with float64 and timed
alone; once all of them are through, they are timed again in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from bench.harness import compare, memory
from bench.harness.case import Case, Settings
from bench.harness.results import Measured
from casvit_kernels import benchmark

Calls = Mapping[str, Callable[[], object]]
ALONE_ROUNDS = 5
TRUTH, IN_TURN = "float64", "in turn"  # what runs where it is no candidate


class Watcher(Protocol):
    """Who is told of each candidate."""

    def begins(self, what: str) -> None:
        """A candidate, `TRUTH` or `IN_TURN`; may raise to end the case here."""
        ...

    def found(self, measured: Measured) -> None:
        """What is known so far."""
        ...


class ContextLost(RuntimeError):
    """A CUDA error: no kernel runs in this process any more."""


def step_by_step(
    case: Case,
    module: nn.Module,
    x: Tensor,
    candidates: Calls,
    settings: Settings,
    trial: tuple[Tensor, Calls] | None,
    watcher: Watcher,
) -> Measured:
    """As `measure.measure`, but a candidate that fails, in whatever way, costs itself alone.

    Raises:
        ContextLost: the rest must be measured in another process. What was measured is handed over.
    """
    measured = Measured(case)
    eager = "eager bf16" if case.dtype == "bfloat16" else "eager"
    compared, among = trial or (x, candidates)
    watcher.begins(TRUTH)
    truth = compare.truth(case, module, compared)
    for name in sorted(candidates, key=lambda name: name != eager):  # stable: eager, then in order
        watcher.begins(name)
        try:
            # Not of the trial: of a baseline that is no trial's nobody asks how exact it is.
            judged = among if trial is not None else candidates
            if name in judged:
                _judge(case, name, judged[name], eager, truth, measured)
            _time_alone(case, name, candidates[name], settings, measured)
        except (benchmark.Unavailable, torch.OutOfMemoryError) as error:
            measured.absent[name] = str(error).splitlines()[0]
        except Exception as error:
            text = str(error).strip() or "no message"
            kind = "" if isinstance(error, _Wrong) else f"{type(error).__name__}: "
            measured.failed[name] = (kind + text)[:500]
        watcher.found(measured)
        reason = measured.failed.get(name) or measured.absent.get(name) or ""
        if "CUDA error" in reason:
            raise ContextLost(reason)
    truth = ()  # gigabytes
    present = {name: candidates[name] for name in candidates if name in measured.timings}
    if len(present) > 1:
        watcher.begins(IN_TURN)
        measured.timings = in_turn(case, present, settings)
    measured.alone.clear()
    return measured


class _Wrong(ValueError):
    """A fused candidate is further from the truth than PyTorch's own error allows."""


def _judge(
    case: Case,
    name: str,
    call: Callable[[], object],
    eager: str,
    truth: tuple[Tensor, ...],
    measured: Measured,
) -> None:
    with torch.inference_mode():
        error, of_gradients = compare.errors(case, call(), truth)
    measured.errors[name] = error
    if of_gradients is not None:
        measured.gradient_errors[name] = of_gradients
    if not name.startswith("fused"):
        return
    if eager not in measured.errors:
        raise _Wrong(f"parity unknown, not timed: {eager} to compare with is missing")
    # As if there were no other candidate: one that is wrong costs itself alone.
    both = {n: e for n, e in measured.errors.items() if n in (eager, name)}
    gradients = {n: e for n, e in measured.gradient_errors.items() if n in (eager, name)}
    alone = replace(measured, errors=both, gradient_errors=gradients)
    refused = compare.refusal(case, alone, eager, truth)
    if refused is not None:
        raise _Wrong(refused)


def _time_alone(
    case: Case, name: str, call: Callable[[], object], settings: Settings, measured: Measured
) -> None:
    with torch.inference_mode():
        call()
        measured.memory[name] = memory.of_call(case, name, call)
    few = replace(settings, rounds=min(ALONE_ROUNDS, settings.rounds))
    timings = in_turn(case, {name: call}, few)
    measured.call_seconds[name] = benchmark.call_time(call, torch.device(settings.device))
    measured.timings[name] = timings[name]
    measured.alone.add(name)


def in_turn(case: Case, candidates: Calls, settings: Settings) -> benchmark.Timings:
    """Times of all of them, in turn."""
    return benchmark.interleave(
        candidates,
        rounds=settings.rounds,
        min_round_seconds=settings.min_round_seconds,
        pause_seconds=settings.pause_seconds,
        stopwatch=_stopwatch(case, settings),
    )


def _stopwatch(case: Case, settings: Settings) -> benchmark.Stopwatch | None:
    if settings.device == "cpu":
        return None
    # Whole models and backwards write far more than the cache holds between one use and the next.
    cold = settings.cold and case.level == "mixer"
    return benchmark.CudaStopwatch(torch.device(settings.device), cold)
