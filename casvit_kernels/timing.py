"""Times several ways to compute one thing, in turn, so that all of them meet the same conditions.

May touch: torch, the package below `swap`; onnxruntime where it is installed. On the CPU a wall clock
measures, on a GPU its own events (`CudaStopwatch`).
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import _native
from ._version import __version__
from .backends import select
from .backends.base import Problem
from .module import FusedCATM, mixer_weights
from .swap import fuse

Call = Callable[[], object]
Forward = Callable[[Tensor], Any]
Context = Callable[[], AbstractContextManager[object]]

BF16 = " bf16"  # suffix of the names of what runs under bfloat16 autocast
BASELINES = ("eager", "eager channels_last", "compile", "compile channels_last", "onnxruntime")
MIXER_NAMES = (*BASELINES, "fused", "fused channels_last")
MODEL_NAMES = (*MIXER_NAMES, "fused compile", "fused compile channels_last")
TRAINING_NAMES = tuple(name for name in MIXER_NAMES if name != "onnxruntime")

# On a GPU, all under autocast (append `BF16`). Compiled ones take minutes there, so in one layout only,
# the one that favours them; "max-autotune" is torch.compile in that mode, CUDA graphs included; "fused
# mix" is the mixer after its qkv product, which a library computes for every candidate.
GPU_BASELINES = (
    "eager",
    "eager channels_last",
    "compile channels_last",
    "max-autotune channels_last",
)
GPU_MIXER_NAMES = (
    *GPU_BASELINES,
    "fused",
    "fused channels_last",
    "fused mix",
    "fused mix channels_last",
)
GPU_TRAINING_NAMES = (*GPU_BASELINES, "fused", "fused channels_last")
GPU_MODEL_NAMES = (*GPU_BASELINES, "fused channels_last", "fused max-autotune channels_last")
GPU_MODEL_TRAINING_NAMES = (*GPU_BASELINES, "fused channels_last", "fused compile channels_last")
_COMPILED = {"compile": "default", "max-autotune": "max-autotune"}  # a name's word and its mode


class Unavailable(RuntimeError):
    """A candidate cannot be built on this machine; the message says why."""


class Timing(NamedTuple):
    """Seconds per call over the rounds: the median and the quartiles."""

    median: float
    p25: float
    p75: float
    rounds: int
    calls: int  # per round
    samples: tuple[float, ...]  # seconds per call of each round, in the order measured


class Timings(dict[str, Timing]):
    """By candidate; `absent` has the reason for each candidate that could not be built."""

    def __init__(self) -> None:
        super().__init__()
        self.absent: dict[str, str] = {}


class Stopwatch(Protocol):
    def __call__(self, call: Call, count: int) -> float:
        """Seconds that `count` calls take together."""
        ...


class WallStopwatch:
    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def __call__(self, call: Call, count: int) -> float:
        start = self._clock()
        for _ in itertools.repeat(None, count):
            call()
        return self._clock() - start


class CudaStopwatch:
    """Seconds between events on the current stream, before and after each call.

    With `cold`, twice the GPU's L2 cache is overwritten before each call, outside the events. The
    launches of a call are then queued while that runs: up to that long they are not in the time.
    Without, the GPU waits for each launch, and for as long as that takes, it is in the time.
    """

    def __init__(self, device: torch.device, cold: bool) -> None:
        self._flush = None
        if cold:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def __call__(self, call: Call, count: int) -> float:
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        torch.cuda.synchronize()
        for start, end in events:
            if self._flush is not None:
                self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in events) / 1e3


def interleave(
    candidates: Mapping[str, Call],
    *,
    rounds: int = 15,
    min_round_seconds: float = 0.05,
    pause_seconds: float = 0.05,
    progress: Callable[[int, int], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    stopwatch: Stopwatch | None = None,
) -> Timings:
    """Time each candidate `rounds` times, all of them in every round, in rotated order.

    A first call that is not timed builds and warms up each candidate. Everything runs under
    `torch.inference_mode`, with Python's garbage collection off.

    Args:
        candidates: name and what to call. One whose first call raises `Unavailable` is left out and
            its reason kept; any other exception is raised.
        rounds: at least 1.
        min_round_seconds: calls are repeated within a round until they last that long.
        pause_seconds: before each turn. The thread pools of PyTorch and ONNX Runtime spin for a
            while after a call (measured: up to 35 ms), on the cores that the next candidate needs.
        progress: called as ``progress(done, total)``, in turns.
        clock: seconds, monotonic.
        stopwatch: what measures instead of `clock`.

    Raises:
        ValueError: `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    measure = stopwatch or WallStopwatch(clock)
    done, total = 0, len(candidates) * (rounds + 1)
    found = Timings()
    calls: dict[str, int] = {}
    samples: dict[str, list[float]] = {}

    def turn(name: str, count: int) -> float:
        call = candidates[name]
        time.sleep(pause_seconds)
        if count > 1:
            call()  # wakes the candidate's own threads
        return measure(call, count)

    def report(turns: int) -> None:
        nonlocal done
        done += turns
        if progress is not None:
            progress(done, total)

    collecting = gc.isenabled()
    with torch.inference_mode():
        try:
            for name, call in candidates.items():
                try:
                    call()
                except Unavailable as error:
                    found.absent[name] = str(error)
                    report(rounds + 1)
                    continue
                calls[name] = _enough_calls(partial(turn, name), min_round_seconds)
                samples[name] = []
                report(1)
            gc.collect()
            gc.disable()
            names = list(samples)
            for r in range(rounds):
                first = r % max(len(names), 1)
                for name in names[first:] + names[:first]:
                    samples[name].append(turn(name, calls[name]) / calls[name])
                    report(1)
        finally:
            if collecting:
                gc.enable()
    for name in names:
        found[name] = summary(samples[name], calls[name])
    return found


def summary(samples: list[float], calls: int) -> Timing:
    """Median and quartiles (linear between neighbours) of at least one sample."""
    if len(samples) == 1:
        p25 = median = p75 = samples[0]
    else:
        p25, median, p75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, p25, p75, len(samples), calls, tuple(samples))


def ratio_to_best(timings: Mapping[str, Timing], of: str = "fused") -> tuple[float, str]:
    """How many times faster `of` is than the fastest baseline of its dtype, and that one's name.

    Raises:
        ValueError: `of` or every baseline is missing from `timings`.
    """
    rivals = [n for n in timings if not n.startswith("fused") and is_bf16(n) == is_bf16(of)]
    if of not in timings or not rivals:
        raise ValueError(f"timings: expected {of!r} and a baseline, got {', '.join(timings)}")
    best = min(rivals, key=lambda n: timings[n].median)
    return timings[best].median / timings[of].median, best


def is_bf16(name: str) -> bool:
    return name.endswith(BF16)


def mixer_candidates(
    mixer: nn.Module,
    x: Tensor,
    *,
    include: Iterable[str] = MIXER_NAMES,
    backend: str | None = None,
) -> dict[str, Call]:
    """Ways to compute one mixer, for `interleave`; each call returns the output.

    Args:
        mixer: a plain mixer, float32; it is copied, and the copy put in eval mode.
        x: ``(B, C, H, W)``, float32, on the device of `mixer`; each candidate gets it in its own
            layout. Those under autocast get it in bfloat16, as they do inside a model.
        include: names out of `MIXER_NAMES` or `GPU_MIXER_NAMES`; with the suffix `BF16` under
            bfloat16 autocast (all but ``"onnxruntime"``). Each is built by its first call.
        backend: of the fused ones, None for the automatic choice.

    Raises:
        ValueError: a name is not known, `mixer` is fused, or `x` is not float32.
    """

    def fused(plain: nn.Module) -> nn.Module:
        return FusedCATM.from_mixer(plain, backend=backend)

    known = (*MIXER_NAMES, *GPU_MIXER_NAMES)
    return _candidates("mixer", mixer, fused, x, x.to(torch.bfloat16), include, known)


def model_candidates(
    model: nn.Module,
    x: Tensor,
    *,
    include: Iterable[str] = MODEL_NAMES,
    backend: str | None = None,
) -> dict[str, Call]:
    """Ways to compute one model, for `interleave`; as `mixer_candidates`, but for:

    Args:
        model: with at least one plain mixer that `casvit_kernels.fuse` can swap.
        x: the model's input, float32; those under autocast get it in float32 too.
        include: names out of `MODEL_NAMES` or `GPU_MODEL_NAMES`; ``fused compile`` and
            ``fused compile channels_last`` are compiled with the fused mixers in place.
    """
    known = (*MODEL_NAMES, *GPU_MODEL_NAMES)
    return _candidates("model", model, partial(_fused_model, backend), x, x, include, known)


def model_training_candidates(
    model: nn.Module,
    x: Tensor,
    *,
    include: Iterable[str] = GPU_MODEL_TRAINING_NAMES,
    backend: str | None = None,
) -> dict[str, Call]:
    """Forward and backward of one model in training mode, for `interleave`.

    As `model_candidates`, but names are out of `GPU_MODEL_TRAINING_NAMES`, `model` returns one tensor,
    and each call returns what `training_step` does, without a gradient of the images.
    """
    return _candidates(
        "model",
        model,
        partial(_fused_model, backend),
        x,
        x,
        include,
        GPU_MODEL_TRAINING_NAMES,
        partial(_training_call, True),
    )


def _fused_model(backend: str | None, plain: nn.Module) -> nn.Module:
    report = fuse(plain, backend=backend)
    if not report.swapped or report.refused:
        raise ValueError(f"model: expected mixers that can all be fused; {report}")
    return plain


def training_candidates(
    mixer: nn.Module,
    x: Tensor,
    *,
    backward: bool = True,
    include: Iterable[str] = TRAINING_NAMES,
    backend: str | None = None,
) -> dict[str, Call]:
    """Ways to train one mixer, for `interleave`; as `mixer_candidates`, but for:

    Args:
        mixer: its copies are put in training mode: every call uses and updates batch statistics.
        backward: whether a call computes all gradients too. It then returns what `training_step`
            does, else the output alone.
        include: names out of `TRAINING_NAMES` or `GPU_TRAINING_NAMES`.
    """

    def fused(plain: nn.Module) -> nn.Module:
        return FusedCATM.from_mixer(plain, backend=backend)

    def call(own: nn.Module, run: Forward, own_x: Tensor, autocast: Context) -> Call:
        return _training_call(backward, own, run, own_x.detach().requires_grad_(), autocast)

    known = (*TRAINING_NAMES, *GPU_TRAINING_NAMES)
    return _candidates("mixer", mixer, fused, x, x.to(torch.bfloat16), include, known, call)


def _training_call(
    backward: bool, own: nn.Module, run: Forward, x: Tensor, autocast: Context
) -> Call:
    own.train()
    grads: list[Tensor] = []  # of the output, whose shape the first call tells

    def step() -> object:
        with torch.inference_mode(False), torch.enable_grad():
            with autocast():
                out = run(x)
            if not backward:
                return out
            if not grads:
                grads.append(output_gradient(out))
            return training_step(own, x, out, grads[0])

    with torch._dynamo.config.patch(recompile_limit=256):  # see _compiled
        step()
    return step


def output_gradient(x: Tensor) -> Tensor:
    """The gradient that every training candidate gets for an output like `x`."""
    generator = torch.Generator(x.device).manual_seed(1)
    values = torch.randn(x.shape, generator=generator, device=x.device)
    return torch.empty_like(x, requires_grad=False).copy_(values)


def training_step(module: nn.Module, x: Tensor, out: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The output, then the gradients of `x`, if it wants one, and of the parameters, in order."""
    wanted = [*([x] if x.requires_grad else []), *module.parameters()]
    return (out, *torch.autograd.grad(out, wanted, grad))


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a measurement depends on, with the date; nothing that identifies the machine's owner."""
    kind = torch.device(device).type
    gpu: dict[str, Any] = {}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda or torch.version.hip,
            "triton": _installed("triton"),
        }
    library, _ = _native.load()
    isa = None if library is None else library.casvit_cpu_isa_active().decode()
    return {
        "casvit_kernels": __version__,
        "torch": torch.__version__,
        "onnxruntime": _installed("onnxruntime"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": kind,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa,  # of this library's kernels; None: not built
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **gpu,
    }


class _Lazy:
    """Built by its first call."""

    def __init__(self, build: Callable[[], Call]) -> None:
        self._build = build
        self._call: Call | None = None

    def __call__(self) -> object:
        if self._call is None:
            self._call = self._build()
        return self._call()


def _candidates(
    argument: str,
    module: nn.Module,
    fused: Callable[[nn.Module], nn.Module],
    x: Tensor,
    x_bf16: Tensor,
    include: Iterable[str],
    known: tuple[str, ...],
    training: Callable[[nn.Module, Forward, Tensor, Context], Call] | None = None,
) -> dict[str, Call]:
    known = tuple(dict.fromkeys(known))
    known += tuple(name + BF16 for name in known if name != "onnxruntime")
    names = list(include)
    for name in names:
        if name not in known:
            raise ValueError(f"include: expected names out of {', '.join(known)}, got {name!r}")
    if x.dtype is not torch.float32:
        raise ValueError(f"x: expected a float32 tensor, got {x.dtype}")
    if any(p.device != x.device for p in module.parameters()):
        raise ValueError(f"x: expected the device of the {argument}, got {x.device}")
    if any(isinstance(m, FusedCATM) for m in module.modules()):
        raise ValueError(f"{argument}: expected a plain one (see unfuse), got one that is fused")

    def build(name: str) -> Call:
        words = name.split()
        layout = torch.channels_last if "channels_last" in words else torch.contiguous_format
        own = copy.deepcopy(module).train(training is not None)
        if words[0] == "fused":
            own = fused(own)
        own = own.to(memory_format=layout)
        own_x = (x_bf16 if is_bf16(name) else x).to(memory_format=layout)
        if words[0] == "onnxruntime":
            return _onnxruntime(own, own_x)

        def autocast() -> AbstractContextManager[object]:
            device = x.device.type
            return torch.autocast(device, torch.bfloat16) if is_bf16(name) else nullcontext()

        if "mix" in words:
            return _after_product(own, own_x)
        mode = next((mode for word, mode in _COMPILED.items() if word in words), None)
        with autocast():
            run = _compiled(own, own_x, mode) if mode else own
        if training is not None:
            return training(own, run, own_x, autocast)
        if not is_bf16(name):
            return lambda: run(own_x)

        def call() -> object:
            with autocast():
                return run(own_x)

        return call

    def build_outside(name: str) -> Call:
        with torch.inference_mode(False), torch.enable_grad():  # inference tensors cannot train
            return build(name)

    chosen = build if training is None else build_outside
    return {name: _Lazy(partial(chosen, name)) for name in names}


def _after_product(mixer: nn.Module, x: Tensor) -> Call:
    """The backend's gates and combination, on a qkv that is there already."""
    assert isinstance(mixer, FusedCATM)
    backend = select(mixer.backend, Problem(x.device.type, x.dtype))
    if backend.phases is None:
        raise Unavailable(f"the backend {backend.name!r} has no mixing apart from the product")
    w = mixer_weights(mixer)
    running = [torch.stack([g.norm_mean, g.norm_var]) for g in (w.q, w.k)]  # type: ignore[list-item]
    statistics = torch.stack(running).float()
    eps_q, eps_k = (m.eps for m in mixer.modules() if isinstance(m, nn.BatchNorm2d))
    mix = backend.phases.mix
    qkv = backend.phases.project(x, w, x.dtype)
    return lambda: mix(x, qkv, w, statistics, (eps_q, eps_k), x.dtype).out


def _compiled(module: nn.Module, x: Tensor, mode: str) -> Callable[[Tensor], object]:
    module(x)  # what fails without a compiler is no matter of the compiler
    compiled: Callable[[Tensor], object] = torch.compile(
        module, fullgraph=True, dynamic=False, mode=mode
    )
    try:
        # The limit counts what other candidates compiled of the same forward; past it lies eager.
        with torch._dynamo.config.patch(recompile_limit=256):
            compiled(x)
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        raise Unavailable(f"torch.compile failed: {type(error).__name__}: {text[0]}") from error
    if mode != "max-autotune":
        return compiled

    def call(x: Tensor) -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    return call


def _onnxruntime(module: nn.Module, x: Tensor) -> Call:
    """A session of as many threads as PyTorch has; exported from the plain module."""
    missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(p)]
    if missing:
        raise Unavailable(
            f"not installed: {', '.join(missing)} (pip install casvit-kernels[export])"
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads keep spinning between calls, as by default: measured 1.2 to 1.6 times faster at
    # batch 1 than without. The pause of `interleave` keeps that from the other candidates.
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.no_grad():
        path = Path(folder, "plain.onnx")
        torch.onnx.export(
            module, (x,), path, dynamo=True, opset_version=18, external_data=False, verbose=False
        )
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


def _enough_calls(seconds_of: Callable[[int], float], least: float) -> int:
    """How many calls last `least` seconds."""
    calls = 1
    while (seconds := seconds_of(calls)) < least:
        guess = math.ceil(1.1 * calls * least / seconds) if seconds > 0 else 10 * calls
        calls = min(max(guess, calls + 1), 10 * calls)
    return calls


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
