"""One benchmark case: parity first, then every candidate timed in the same run, then its rows."""

from __future__ import annotations

import copy
import gc
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from saved_bytes import kept_by
from torch import Tensor, nn

from casvit_kernels import _files, benchmark
from casvit_kernels.benchmark import Timing
from casvit_kernels.testing import FACTOR, GRADIENT_FACTOR

# A ReLU input within rounding of 0 may fall on either side of it, in PyTorch's arithmetic or in ours:
# among millions some do. One changes the gradients of its channel, by up to 1e-3 of a norm in a test.
KINKS = 1e-2
VANISHING = 1e-9
CHUNK = 32  # images of float64 at a time


@dataclass(frozen=True)
class Case:
    """What is computed; its fields are the description in the JSON."""

    level: str  # "mixer", "model"; forward and backward: "training" (mixer), "model-training"; or
    # "training-forward"
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


class Choice(NamedTuple):
    """Which cases to measure."""

    models: tuple[str, ...] = ("xs", "t")
    batches: tuple[int, ...] = (1, 8)
    inputs: tuple[int, ...] = (224,)  # heights and widths of images
    gpu: bool = False  # what is worth measuring there: bfloat16, and steps of whole models
    quick: bool = False


GPU_CHOICE = Choice(("xs", "s", "m", "t"), (1, 64, 256), (224, 384), True)


@dataclass(frozen=True)
class Settings:
    rounds: int = 15
    min_round_seconds: float = 0.05
    backend: str = "cpu"
    quick: bool = False  # a trial of the machinery: its numbers are not for reporting
    device: str = "cpu"
    pause_seconds: float = 0.05
    cold: bool = True  # on a GPU: mixers are timed with an L2 cache that holds other data


def settings_for(device: str, backend: str, quick: bool = False) -> Settings:
    rounds, seconds = (3, 0.005) if quick else (15, 0.05)
    if device == "cpu":
        return Settings(rounds, seconds, backend, quick)
    return Settings(rounds, seconds / 2, backend, quick, device, pause_seconds=0.0)


def names(level: Any, case: Case, gpu: bool) -> list[str]:
    """The candidates of one case, out of the lists of a test file."""
    if gpu and case.level == "model-training":
        known = level.TRAINING_GPU_NAMES
    else:
        known = level.GPU_NAMES if gpu else level.NAMES
    if case.dtype == "bfloat16":
        return [name + benchmark.BF16 for name in known if name != "onnxruntime"]
    return list(known)


class GradientError(NamedTuple):
    """Of several gradients the largest of each."""

    typical: float  # nine elements in ten err by less, as a part of the gradient's largest value
    norm: float  # of the error as a vector, as a part of the gradient's


@dataclass
class Measured:
    """Timings of one case, or the reason why it is refused."""

    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # against float64: see _errors
    gradient_errors: dict[str, GradientError] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)  # see _memory
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
                "max_error": self._max_error(name),
                **self.memory.get(name, {}),
            }
            for name, t in self.timings.items()
        ]
        rows += [{"candidate": n, "absent": reason} for n, reason in self.absent.items()]
        return {**described, "rows": rows}

    def _max_error(self, name: str) -> float | None:
        if name not in self.errors:
            return None
        return _short(max([self.errors[name], *self.gradient_errors.get(name, ())]))


def measure(
    case: Case,
    module: nn.Module,
    x: Tensor,
    candidates: Mapping[str, Callable[[], object]],
    settings: Settings,
    trial: tuple[Tensor, Mapping[str, Callable[[], object]]] | None = None,
) -> Measured:
    """Compare with float64, then time. Where a fused candidate fails parity nothing is timed.

    Args:
        module: the plain module that the candidates compute.
        x: its input, float32.
        candidates: as `casvit_kernels.benchmark` makes them; ``eager`` is among them.
        trial: a smaller input and its candidates, eager and fused: these are compared instead.
    """
    measured = Measured(case)
    eager = "eager bf16" if case.dtype == "bfloat16" else "eager"
    compared, among = trial or (x, candidates)
    truth = _truth(case, module, compared)
    with torch.inference_mode():

        def call(name: str, among: Mapping[str, Callable[[], object]]) -> object:
            try:
                return among[name]()
            except (benchmark.Unavailable, torch.OutOfMemoryError) as error:
                measured.absent[name] = str(error).splitlines()[0]
                return None

        def compare(names: Iterable[str], among: Mapping[str, Callable[[], object]]) -> None:
            for name in names:
                out = call(name, among)
                if out is not None:
                    error, of_gradients = _errors(case, out, truth)
                    measured.errors[name] = error
                    if of_gradients is not None:
                        measured.gradient_errors[name] = of_gradients

        judged = [eager, *(name for name in among if name.startswith("fused"))]
        compare(judged, among)
        measured.refused = _refusal(case, measured, eager, truth)
        if measured.refused is not None:
            return measured  # before the baselines are compiled and exported
        if trial is None:
            compare((name for name in candidates if name not in judged), candidates)
        else:
            for name in candidates:
                call(name, candidates)
        truth = ()  # gigabytes
        present = {name: c for name, c in candidates.items() if name not in measured.absent}
        measured.memory = {name: _memory(case, name, c) for name, c in present.items()}
    measured.timings = benchmark.interleave(
        present,
        rounds=settings.rounds,
        min_round_seconds=settings.min_round_seconds,
        pause_seconds=settings.pause_seconds,
        stopwatch=_stopwatch(case, settings),
    )
    return measured


def _stopwatch(case: Case, settings: Settings) -> benchmark.Stopwatch | None:
    if settings.device == "cpu":
        return None
    # Whole models and backwards write far more than the cache holds between one use and the next.
    cold = settings.cold and case.level == "mixer"
    return benchmark.CudaStopwatch(torch.device(settings.device), cold)


def _memory(case: Case, name: str, call: Callable[[], object]) -> dict[str, int]:
    """The most that a call allocates on the GPU, and what a mixer keeps for its backward.

    In bytes, beyond what stays between calls. A CUDA graph never gives its memory back: no figure.
    """
    found = {}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for _ in range(3):  # graphs are recorded
            call()
        if "max-autotune" not in name:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    if case.level == "training" and name.startswith(("eager", "fused")):
        own = {t.untyped_storage().data_ptr() for t in gc.get_objects() if type(t) is nn.Parameter}
        found["kept_bytes"] = sum(kept_by(call, own).values())
    return found


def _truth(case: Case, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The output in float64; for a training step the gradients too."""
    if case.dtype == "bfloat16" and "model" not in case.level:
        x = x.to(torch.bfloat16)  # what the candidates get
    module, x = copy.deepcopy(module).double(), x.double()
    if "training" not in case.level:
        with torch.no_grad():
            return (torch.cat([module.eval()(images) for images in x.split(CHUNK)]),)
    x.requires_grad_(case.level == "training")
    out = module.train()(x)
    if case.level == "training-forward":
        return (out.detach(),)
    grad = benchmark.output_gradient(out.detach().to(getattr(torch, case.dtype))).double()
    out, *grads = benchmark.training_step(module, x, out, grad)
    return (out.detach(), *grads)


def _refusal(case: Case, measured: Measured, eager: str, truth: tuple[Tensor, ...]) -> str | None:
    """Where a fused candidate is further from `truth` than `FACTOR` times eager is.

    In a training step it is `GRADIENT_FACTOR` times, as in the parity suite, and a mixer's gradients may
    be off by `KINKS`.
    """
    errors = measured.errors
    if eager not in errors:
        return f"nothing to compare with, {eager}: {measured.absent[eager]}"
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
    if eager in measured.gradient_errors:
        eps = torch.finfo(getattr(torch, case.dtype)).eps
        own_gradients = GradientError(*(max(e, eps) for e in measured.gradient_errors[eager]))
        allowed = [GRADIENT_FACTOR * e for e in own_gradients]
        if case.level == "training":
            allowed[1] = max(allowed[1], KINKS)
        failed += [
            f"{name}: error of gradients {found}, PyTorch's own {own_gradients}"
            for name, found in measured.gradient_errors.items()
            if name.startswith("fused") and not all(map(operator.le, found, allowed))
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


def replayed(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test for that timer, where pytest is; gpu.py uses these files without it."""
    try:
        import pytest
    except ImportError:
        return test
    marked: Callable[..., None] = pytest.mark.benchmark(timer=REPLAY)(test)
    return marked


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


def copy_bandwidth(device: str, quick: bool = False) -> float:
    """Bytes per second of a copy within the device's memory, read and written ones; the median."""
    size = 1 << (24 if quick or device == "cpu" else 30)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    watch: benchmark.Stopwatch = benchmark.WallStopwatch()
    if device != "cpu":
        watch = benchmark.CudaStopwatch(torch.device(device), cold=False)
    found = benchmark.interleave(
        {"copy": lambda: target.copy_(source)},
        rounds=9,
        min_round_seconds=0.0,
        pause_seconds=0.0,
        stopwatch=watch,
    )
    return 2 * size / found["copy"].median


def write(folder: Path, measured: list[Measured], settings: Settings) -> list[Path]:
    """One file for each level, model and device, `mixer-xs-cpu-amx.json`; each whole or not at all.

    A CPU is named by the instruction set of the kernels, so that results of several lie side by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = benchmark.environment(settings.device)
    device, isa = environment["device"], environment["isa"]
    if device == "cpu" and isa is not None:
        device = f"cpu-{isa}"
    files: dict[str, list[Measured]] = {}
    for m in measured:
        name = f"{m.case.level}-{m.case.model}-{device}.json"
        files.setdefault(name, []).append(m)
    for name, cases in files.items():
        document = {
            "environment": environment,
            "settings": vars(settings),
            "cases": [m.as_json() for m in cases],
        }
        _files.write_text(folder / name, json.dumps(document, indent=1) + "\n")
    return [folder / name for name in files]


def _errors(case: Case, got: Any, truth: tuple[Tensor, ...]) -> tuple[float, GradientError | None]:
    """The largest error of the output, in a training step over its largest value; and of gradients.

    Any one element of a gradient is a lottery here (see `KINKS`), and the parity suite has looked at
    all of them. Of a whole model, so is any gradient after so many layers: they are taken together.
    """
    if not isinstance(got, tuple):
        got = (got if isinstance(got, Tensor) else torch.from_numpy(got),)
    if any(g.shape != t.shape for g, t in zip(got, truth, strict=True)):
        return math.inf, None if len(truth) == 1 else GradientError(math.inf, math.inf)
    largest = truth[0].abs().max().item()
    error = (got[0].double() - truth[0]).abs().max().item()
    if len(truth) == 1:
        return error, None
    typical, norms = [0.0], [(0.0, 1.0)]
    for g, t in zip(got[1:], truth[1:], strict=True):
        wrong, size = g.double() - t, t.abs().max().item()
        # A gradient that vanishes identically (of a bias before batch statistics) has no digits.
        if size > VANISHING * largest or wrong.isnan().any():
            rank = math.ceil(0.9 * wrong.numel())
            typical.append(wrong.abs().flatten().kthvalue(rank).values.item() / size)
            norms.append((wrong.norm().item(), t.norm().item()))
    errors = [wrong / size for wrong, size in norms]
    if case.level == "model-training":
        typical = [0.0]
        errors = [math.hypot(*(w for w, _ in norms[1:])) / math.hypot(*(s for _, s in norms[1:]))]
    if any(map(math.isnan, errors)):
        return error / largest, GradientError(math.nan, math.nan)
    return error / largest, GradientError(max(typical), max(errors))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
