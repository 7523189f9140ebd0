"""One benchmark case: parity first, then every candidate timed in the same run, then its rows."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casvit_kernels import timing
from casvit_kernels.parity import FACTOR, GRADIENT_FACTOR
from casvit_kernels.timing import Timing

VANISHING = 1e-9


@dataclass(frozen=True)
class Case:
    """What is computed; its fields are the description in the JSON."""

    level: str  # "mixer", "model", "training" (forward and backward) or "training-forward"
    model: str  # "xs", "s", "m", "t"
    stage: int | None  # 1 to 4, None for a whole model
    channels: int  # of x
    size: int  # height and width of x
    batch: int
    dtype: str  # "float32", or "bfloat16" for autocast

    @property
    def id(self) -> str:
        stage = "" if self.stage is None else f"-stage{self.stage}"
        name = f"{self.model}{stage}-{self.size}px-b{self.batch}-{self.dtype}"
        return name + "-forward" if self.level == "training-forward" else name


@dataclass(frozen=True)
class Settings:
    rounds: int = 15
    min_round_seconds: float = 0.05
    backend: str = "cpu"
    quick: bool = False  # a trial of the machinery: its numbers are not for reporting


@dataclass
class Measured:
    """Timings of one case, or the reason why it is refused."""

    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # see _largest_error; against float64
    absent: dict[str, str] = field(default_factory=dict)
    refused: str | None = None

    def as_json(self) -> dict[str, Any]:
        described: dict[str, Any] = {**vars(self.case)}
        if self.refused is not None:
            return {**described, "refused": self.refused}
        rows: list[dict[str, Any]] = [
            {
                "candidate": name,
                "median_s": _short(t.median),
                "p25_s": _short(t.p25),
                "p75_s": _short(t.p75),
                "rounds": t.rounds,
                "calls_per_round": t.calls,
                "max_error": _short(self.errors[name]),
            }
            for name, t in self.timings.items()
        ]
        rows += [{"candidate": n, "absent": reason} for n, reason in self.absent.items()]
        return {**described, "rows": rows}


def measure(
    case: Case,
    module: nn.Module,
    x: Tensor,
    candidates: Mapping[str, Callable[[], object]],
    settings: Settings,
) -> Measured:
    """Compare with float64, then time. Where a fused candidate fails parity nothing is timed.

    Args:
        module: the plain module that the candidates compute.
        x: its input, float32.
        candidates: as `casvit_kernels.timing` makes them; ``eager`` is among them.
    """
    measured = Measured(case)
    if case.dtype == "bfloat16" and case.level != "model":
        x = x.to(torch.bfloat16)  # what the candidates get
    eager = "eager bf16" if case.dtype == "bfloat16" else "eager"
    truth = _truth(case, module, x)
    with torch.inference_mode():

        def compare(name: str) -> None:
            try:
                out = candidates[name]()
            except timing.Unavailable as error:
                measured.absent[name] = str(error)
                return
            measured.errors[name] = _largest_error(out, truth)

        judged = [eager, *(name for name in candidates if name.startswith("fused"))]
        for name in judged:
            compare(name)
        measured.refused = _refusal(case, measured.errors, eager, truth)
        if measured.refused is not None:
            return measured  # before the baselines are compiled and exported
        for name in candidates:
            if name not in judged:
                compare(name)
    present = {name: call for name, call in candidates.items() if name in measured.errors}
    measured.timings = timing.interleave(
        present, rounds=settings.rounds, min_round_seconds=settings.min_round_seconds
    )
    return measured


def _truth(case: Case, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The output in float64; for a training step the gradients too."""
    module, x = copy.deepcopy(module).double(), x.double()
    if not case.level.startswith("training"):
        with torch.no_grad():
            return (module.eval()(x),)
    x.requires_grad_()
    out = module.train()(x)
    if case.level == "training-forward":
        return (out.detach(),)
    grad = timing.output_gradient(x.to(getattr(torch, case.dtype)).detach()).double()
    out, *grads = timing.training_step(module, x, out, grad)
    return (out.detach(), *grads)


def _refusal(
    case: Case, errors: dict[str, float], eager: str, truth: tuple[Tensor, ...]
) -> str | None:
    """Where a fused candidate is further from `truth` than `FACTOR` times eager is.

    For gradients it is `GRADIENT_FACTOR` times, as in the parity suite.
    """
    factor = FACTOR if len(truth) == 1 else GRADIENT_FACTOR
    # Not less than one ulp: PyTorch may have been exact by luck.
    scale = truth[0].abs().max().item() if len(truth) == 1 else 1.0
    ulp = torch.finfo(getattr(torch, case.dtype)).eps * scale
    own = max(errors[eager], ulp)
    failed = [
        f"{name}: max error {error:.3g}, PyTorch's own {own:.3g}"
        for name, error in errors.items()
        if name.startswith("fused") and not error <= factor * own  # NaN fails
    ]
    return f"parity failed, nothing was timed: {'; '.join(failed)}" if failed else None


class Replay:
    """A timer for pytest-benchmark that runs through times already measured.

    The tool times one callable after the other; ours are timed in turn. So each test replays its
    candidate's rounds, and the tool lists and saves them.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: Iterator[float] = iter(())

    def load(self, samples: tuple[float, ...]) -> None:
        self._samples = iter(samples)

    def step(self) -> None:
        self._now += next(self._samples, 0.0)

    def __call__(self) -> float:
        return self._now


REPLAY = Replay()


def randomise_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm statistics as after training, so that folding them is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(0.0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


def write(folder: Path, measured: list[Measured], settings: Settings) -> list[Path]:
    """One file for each level and model, `mixer-xs-cpu.json`; each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = timing.environment()
    files: dict[str, list[Measured]] = {}
    for m in measured:
        name = f"{m.case.level}-{m.case.model}-{environment['device']}.json"
        files.setdefault(name, []).append(m)
    for name, cases in files.items():
        document = {
            "environment": environment,
            "settings": vars(settings),
            "cases": [m.as_json() for m in cases],
        }
        part = folder / f".{name}.part"
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(part, folder / name)
    return [folder / name for name in files]


def _largest_error(got: Any, truth: tuple[Tensor, ...]) -> float:
    """The largest error of one output; of several, each as a part of its tensor's largest value."""
    if not isinstance(got, tuple):
        got = (got if isinstance(got, Tensor) else torch.from_numpy(got),)
    errors = []
    for g, t in zip(got, truth, strict=True):
        if g.shape != t.shape:
            return math.inf
        error, size = (g.double() - t).abs().max().item(), t.abs().max().item()
        if len(truth) == 1:
            return error
        # A gradient that vanishes identically (of a bias before batch statistics) has no digits.
        if size > VANISHING * truth[0].abs().max().item() or math.isnan(error):
            errors.append(error / size)
    return max(errors)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
