"""Whether a backend computes what plain PyTorch computes: the checks behind tests and `parity`.

Ground truth is `reference.AdditiveTokenMixer` in float64, with weights and input rounded to the
dtype under test. A backend passes where its error is at most twice the error that the same plain
PyTorch code makes in that dtype. May touch: torch, `reference`, `backends`, `module`.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.utils.deterministic
from torch import Tensor, nn

from .backends import BackendUnavailable, check_name, get
from .backends.base import Problem
from .models.rcvit import CONFIGS
from .module import FusedCATM
from .reference import AdditiveTokenMixer

Shape = tuple[int, int, int, int]
Results = dict[str, Tensor]

# How many times PyTorch's own error the error may be. A gradient is a long sum with cancellation
# whose order is free: correct implementations differ by more there. Where PyTorch itself has no
# digit right (a gradient that vanishes identically, as of a bias before batch statistics) only
# its size counts.
FACTOR, GRADIENT_FACTOR, VANISHING_FACTOR = 2.0, 4.0, 16.0


class Target(NamedTuple):
    """Where a backend is checked, and in which dtypes."""

    device: str
    dtypes: tuple[torch.dtype, ...]


def _triton_device() -> str:
    """Where there is no GPU, Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# A new backend joins by one line.
BACKENDS: dict[str, Target] = {
    "reference": Target("cpu", (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    "cpu": Target("cpu", (torch.float32, torch.bfloat16, torch.float16)),
    "triton": Target(_triton_device(), (torch.float32, torch.bfloat16, torch.float16)),
}

# eval: no gradients. frozen: training, BatchNorm in eval. train: batch statistics.
MODES = ("eval", "frozen", "train")

LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",  # out of a larger buffer, NaN around
    "sliced channels_last",
    "strided",  # every second row and column of a larger buffer, NaN between
    "transposed",  # height innermost
    "permuted",  # batch innermost
    "expanded",  # batch stride 0
)

_BOTH = ("contiguous", "channels_last")
# (B, C, H, W), layouts, modes, dtypes (None: all of the backend).
_PLAN: tuple[
    tuple[Shape, tuple[str, ...], tuple[str, ...], tuple[torch.dtype, ...] | None], ...
] = (
    ((3, 3, 13, 9), LAYOUTS, MODES, None),
    ((2, 33, 7, 7), LAYOUTS, MODES, None),
    ((0, 3, 7, 7), _BOTH, MODES, None),
    ((1, 1, 1, 1), _BOTH, MODES, None),
    ((5, 1, 1, 1), _BOTH, MODES, None),
    ((5, 33, 1, 1), _BOTH, MODES, None),
    ((3, 3, 1, 7), _BOTH, MODES, None),
    ((5, 3, 7, 1), _BOTH, MODES, None),
    ((5, 3, 7, 7), _BOTH, MODES, None),
    ((2, 48, 13, 9), _BOTH, MODES, None),
    ((1, 33, 33, 47), _BOTH, ("eval", "frozen"), (torch.float32, torch.bfloat16)),
    ((1, 48, 56, 56), LAYOUTS, ("eval",), (torch.float32, torch.bfloat16)),
    ((5, 220, 7, 7), _BOTH, ("eval", "train"), (torch.float32, torch.bfloat16)),
    ((2, 512, 7, 7), _BOTH, ("eval",), None),
    ((1, 512, 33, 47), _BOTH, ("eval",), (torch.float32,)),
)
_SWEEP, _LONG_SWEEP = 12, 400
# Triton's interpreter takes seconds for each of these: several images in a tile, several tiles and
# bands of an image, one and many blocks of channels, of images for the channel gates, odd sizes.
_F32, _F16 = (torch.float32,), (torch.float16,)
_INTERPRETED_PLAN = (
    ((3, 3, 7, 9), LAYOUTS, ("eval",), _F32),
    ((3, 3, 7, 9), _BOTH, ("frozen", "train"), (torch.float32, torch.float16, torch.bfloat16)),
    ((1, 2, 9, 33), _BOTH, ("train",), (torch.float32, torch.float16)),
    ((1, 33, 3, 47), _BOTH, ("eval", "train"), _F32),
    ((2, 130, 3, 7), _BOTH, ("train",), _F16),
    ((1, 260, 2, 9), _BOTH, ("train",), _F32),
    ((17, 17, 1, 3), _BOTH, ("train",), _F32),
    ((0, 3, 7, 7), _BOTH, MODES, _F32),
    ((1, 1, 1, 1), _BOTH, MODES, _F32),
    ((5, 3, 1, 1), _BOTH, ("train",), _F32),
    ((3, 3, 5, 1), _BOTH, ("train",), _F32),
)
_LARGE = 100_000  # elements of x; from here the truth is computed on the device under test
INPUTS = (224, 384)  # heights and widths of images in `real_cases`


class Case(NamedTuple):
    """One check: what is run, and the seed of its weights and input."""

    backend: str
    dtype: torch.dtype
    layout: str
    mode: str
    shape: Shape
    attn_bias: bool = False
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.backend}-{_name(self.dtype)}-{self.layout}-{self.mode}-{shape}"


class Row(NamedTuple):
    """The verdict on one case; the figures are those of `tensor`, the worst one."""

    backend: str
    dtype: str  # e.g. "float32"
    layout: str
    mode: str
    shape: Shape
    tensor: str  # "out", "grad x", "grad qkv.weight", "oper_q.0.block.1.running_mean", ...
    max_error: float  # largest absolute error against float64
    reference_error: float  # that of plain PyTorch in the same dtype (see `_judge`)
    ratio: float  # of the two; at most 2 passes, 4 for a gradient
    cosine: float  # between result and truth, 1 is right
    relative_norm: float  # of result to truth, 1 is right
    bias: float  # mean error over root mean square of the truth, signed, 0 is right
    failures: tuple[str, ...]  # what is wrong, in words

    @property
    def passed(self) -> bool:
        return not self.failures


def cases(
    backend: str,
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    modes: Iterable[str] = MODES,
    long: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> list[Case]:
    """The cases that `run` checks: a fixed list, then a seeded random sweep.

    Args:
        backend: a key of `BACKENDS`.
        dtypes: leave out all others; None for all that the backend computes.
        modes: of `MODES`, leave out all others.
        long: 400 random cases instead of 12.
        seed: of the sweep, and of all weights and inputs.
        device: where the backend computes, as in `torch.device`; None: where `BACKENDS` says.

    Raises:
        ValueError: unknown backend, or a dtype or mode that is not checked.
    """
    check_name(backend, "backend")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    own_device, known = BACKENDS[backend]
    device = device or own_device
    wanted = known if dtypes is None else tuple(dtypes)
    wanted_modes = tuple(modes)
    for dtype in wanted:
        if dtype not in known:
            names = ", ".join(map(_name, known))
            raise ValueError(f"dtypes: {backend!r} computes {names}, got {dtype!r}")
    for mode in wanted_modes:
        if mode not in MODES:
            raise ValueError(f"modes: expected some of {', '.join(MODES)}, got {mode!r}")
    interpreted = backend == "triton" and torch.device(device).type == "cpu"
    plan, sweep = (_INTERPRETED_PLAN, 0) if interpreted else (_PLAN, _SWEEP)
    found = [
        Case(backend, dtype, layout, mode, shape, i % 2 == 1, seed, device)
        for i, (shape, layouts, plan_modes, plan_dtypes) in enumerate(plan)
        for dtype in known
        if plan_dtypes is None or dtype in plan_dtypes
        for mode in plan_modes
        for layout in layouts
    ]
    rng = random.Random(seed)
    for i in range(_LONG_SWEEP if long else sweep):
        size = 64 if long else 24
        shape = (rng.randint(1, 9), rng.randint(1, 130), rng.randint(1, size), rng.randint(1, size))
        layout, mode, dtype = rng.choice(LAYOUTS), rng.choice(MODES), rng.choice(known)
        bias = rng.random() < 0.5
        found.append(Case(backend, dtype, layout, mode, shape, bias, seed * 1000 + i + 1, device))
    return [
        case
        for case in found
        if case.dtype in wanted and case.mode in wanted_modes and not _undefined(case)
    ]


def real_cases(
    backend: str, batch: int, *, inputs: Iterable[int] = INPUTS, device: str | None = None
) -> list[Case]:
    """Every mixer of xs, s, m and t in every dtype of the backend, both layouts and every mode.

    Args:
        backend, device: as `cases` takes them.
        batch: images.
        inputs: heights and widths of the images, multiples of 32.
    """
    target = BACKENDS[backend]
    shapes = {  # no set: its order would change from run to run
        (batch, config.dims[stage], size // (4 << stage), size // (4 << stage)): None
        for size in inputs
        for stage in range(4)
        for config in CONFIGS.values()
    }
    return [
        Case(backend, dtype, layout, mode, shape, False, 0, device or target.device)
        for shape in shapes
        for dtype in target.dtypes
        for mode in MODES
        for layout in _BOTH
    ]


def run(
    backend: str,
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    modes: Iterable[str] = MODES,
    long: bool = False,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[Row]:
    """Check a backend on this machine; one row for each case, whether it passed or not.

    Args:
        backend, dtypes, modes, long, seed, device: as `cases` takes them.
        progress: called as ``progress(done, total)`` after each case.

    Raises:
        ValueError: as `cases` does.
        BackendUnavailable: the backend cannot run here, with its reason.
    """
    todo = cases(backend, dtypes=dtypes, modes=modes, long=long, seed=seed, device=device)
    reason = get(backend).why_not()
    if reason is None and device is not None and todo:
        reason = get(backend).why_not(Problem(torch.device(device).type, todo[0].dtype))
    if reason is not None:
        raise BackendUnavailable(f"backend={backend!r} cannot run here: {reason}")
    rows = []
    for case in todo:
        rows.append(verdict(case))
        if progress is not None:
            progress(len(rows), len(todo))
    return rows


def verdict(case: Case) -> Row:
    """As `check`, but a crash is a verdict too."""
    try:
        return check(case)
    except Exception as error:
        return _row(case, (), (f"{type(error).__name__}: {error}",))


def check(case: Case, build: Callable[[Case], nn.Module] | None = None) -> Row:
    """Run one case and judge it.

    Args:
        case: what to run.
        build: makes the mixer under test (default: a FusedCATM on the case's backend); its weights
            are then loaded from the case. Tests pass wrong mixers, to see them fail.

    Raises:
        Whatever the mixer raises.
    """
    device = case.device
    truth_device = device if math.prod(case.shape) >= _LARGE else "cpu"
    with _without_tf32(truth_device):
        main, plain = _samples(
            case.dtype,
            case.mode,
            case.shape,
            case.attn_bias,
            case.seed,
            _repeats(case),
            truth_device,
        )
    mixer = (build or _fused)(case).to(device, case.dtype)
    mixer.load_state_dict(main.state)
    set_mode(mixer, case.mode)
    x, x_buffer = lay_out(main.x.to(device, case.dtype), case.layout)
    grad_out, grad_buffer = lay_out(main.grad_out.to(device, case.dtype), case.layout)
    watched = {"x": x_buffer, "grad_out": grad_buffer, **mixer.state_dict()}
    before = {name: _bits(t).clone() for name, t in watched.items()}

    with poisoned(), _without_tf32(device):
        _spoil_scratch(mixer, x, case.mode)
        results = _compute(mixer, x, grad_out, case.mode)
        changed = [name for name, t in watched.items() if not torch.equal(_bits(t), before[name])]
        if case.mode == "train":
            mixer.load_state_dict(main.state)  # the running statistics went on
        again = _compute(mixer, x, grad_out, case.mode)

    failures = []
    out = results["out"]
    if out.dtype != case.dtype or out.shape != torch.Size(case.shape):
        failures.append(
            f"out: expected {case.shape} {case.dtype}, got {tuple(out.shape)} {out.dtype}"
        )
        return _row(case, (), tuple(failures))
    expected = _FORMATS["channels_last" in case.layout]
    if out.numel() and not out.is_contiguous(memory_format=expected):
        failures.append(f"out: expected {expected}, got strides {out.stride()}")
    written = {k for k, _ in mixer.named_buffers()} if case.mode == "train" else set()
    failures += [f"{name}: changed by the call" for name in changed if name not in written]
    judged = []
    for name, truth in main.results.items():
        if name not in results:
            failures.append(f"{name}: is missing")
        elif name.endswith("num_batches_tracked"):
            if results[name].item() != truth.item():
                failures.append(f"{name}: expected {truth.item()}, got {results[name].item()}")
        else:
            own = [errors[name] for errors in plain]
            if name in ("out", "grad x"):
                own = [e.on_scale_of(truth) for e in own]
            judged.append(_judge(name, results[name], truth, own, case))
            if not torch.equal(_bits(results[name]), _bits(again[name])):
                failures.append(f"{name}: two equal calls differ")
    return _row(case, judged, tuple(failures))


def set_mode(mixer: nn.Module, mode: str) -> None:
    """Put a mixer into one of `MODES`."""
    mixer.train(mode != "eval")
    if mode == "frozen":
        for module in mixer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def lay_out(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A tensor of these values in one of `LAYOUTS`, and the buffer that it views.

    For ``"expanded"`` all images must be equal.
    """
    b, c, h, w = values.shape

    def empty(*shape: int) -> Tensor:
        last = _FORMATS["channels_last" in layout]
        buffer = torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=last)
        return buffer.fill_(math.nan)

    if layout in _BOTH:
        buffer = view = empty(b, c, h, w)
    elif layout.startswith("sliced"):
        buffer = empty(b + 2, c + 2, h + 2, w + 3)
        view = buffer[1 : b + 1, 1 : c + 1, 1 : h + 1, 1 : w + 1]
    elif layout == "strided":
        buffer = empty(b, c, 2 * h, 2 * w)
        view = buffer[:, :, ::2, ::2]
    elif layout == "transposed":
        buffer = empty(b, c, w, h)
        view = buffer.transpose(2, 3)
    elif layout == "permuted":
        buffer = empty(c, h, w, b)
        view = buffer.permute(3, 0, 1, 2)
    elif layout == "expanded":
        buffer = values[:1].clone(memory_format=torch.contiguous_format)
        return buffer.expand(b, -1, -1, -1), buffer
    else:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    view.copy_(values)
    return view, buffer


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the context, memory that torch allocates and nobody wrote reads NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def _without_tf32(device: str) -> Iterator[None]:
    """Within the context, float32 convolutions and products on a GPU keep all their digits."""
    if torch.device(device).type == "cpu":
        yield
        return
    convolution, product = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolution
        torch.backends.cuda.matmul.allow_tf32 = product


_FORMATS = {False: torch.contiguous_format, True: torch.channels_last}


class _Errors(NamedTuple):
    """Absolute errors of one tensor against the truth, all in units of its values."""

    largest: float
    rms: float
    norm: float  # root mean square of the result less that of the truth
    mean: float
    truth: float  # root mean square of the truth

    def times(self, scale: float) -> _Errors:
        largest, rms, norm, mean = (scale * e for e in self[:4])
        return _Errors(largest, rms, norm, mean, self.truth)

    def on_scale_of(self, truth: Tensor) -> _Errors:
        """What these errors of another draw would be in a draw whose truth is smaller."""
        return self.times(min(1.0, _divide(_rms(truth), self.truth, 1.0)))


class _Sample(NamedTuple):
    """One draw of weights and input, float64 rounded to the dtype, and what becomes of it."""

    state: dict[str, Tensor]
    x: Tensor
    grad_out: Tensor
    results: Results
    plain: dict[str, _Errors]  # plain PyTorch in the dtype


class _Judged(NamedTuple):
    tensor: str
    max_error: float
    reference_error: float
    ratio: float
    cosine: float
    relative_norm: float
    bias: float
    failures: tuple[str, ...]
    of_limit: float  # ratio over the largest that passes


_NAN = math.nan
_NOTHING = _Judged("-", _NAN, _NAN, _NAN, _NAN, _NAN, _NAN, (), _NAN)


def _fused(case: Case) -> nn.Module:
    return FusedCATM(case.shape[1], case.attn_bias, backend=case.backend)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _repeats(case: Case) -> bool:
    return case.layout == "expanded"


def _undefined(case: Case) -> bool:
    # The variance of one value: nn.BatchNorm2d refuses it.
    b, _, h, w = case.shape
    return case.mode == "train" and b * h * w == 1


@functools.lru_cache(maxsize=1)  # the layouts of a shape share their truth; it may be gigabytes
def _samples(
    dtype: torch.dtype,
    mode: str,
    shape: Shape,
    attn_bias: bool,
    seed: int,
    repeated: bool,
    device: str,
) -> tuple[_Sample, list[dict[str, _Errors]]]:
    """The draw to check with, and plain PyTorch's own errors over several draws."""
    # The largest of a few errors is a lottery, and the errors of one channel, or of one pixel, go
    # together. So plain PyTorch's own error is taken over more draws where the tensors are small.
    b, c, h, w = shape
    draws = min(max(math.ceil(64 / max(1, min(c, b * h * w))), 4), 16)

    def sample(i: int) -> _Sample:
        return _sample(dtype, mode, shape, attn_bias, seed * 100 + i, repeated, device)

    first = sample(0)
    return first, [first.plain, *(sample(i).plain for i in range(1, draws))]


def _sample(
    dtype: torch.dtype,
    mode: str,
    shape: Shape,
    attn_bias: bool,
    seed: int,
    repeated: bool,
    device: str,
) -> _Sample:
    # A ReLU input within rounding of 0 may fall on either side, and the gradient with it. So none
    # shall be that near in float32; in a large tensor only channels of one sign can see to that.
    exact = mode != "eval" and dtype.itemsize >= 4
    large = math.prod(shape) >= _LARGE
    near = 32 * torch.finfo(dtype).eps
    # As a mean over pixels would scale it: the sums over all of them stay within float16.
    scale_grad = min(1.0, 2**10 / max(1, shape[0] * shape[2] * shape[3]))
    devices = [] if device == "cpu" else [device]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        truth = AdditiveTokenMixer(shape[1], attn_bias).double()
        for _ in range(20):
            state = {k: _values(k, v).to(dtype).double() for k, v in truth.state_dict().items()}
            if exact and large:
                _one_sided(state)
            # An offset for each image and channel, so that the pooled means are not all near 0.
            x = torch.randn(shape, device=device)
            x += torch.randn(*shape[:2], 1, 1, device=device) + 0.3
            grad_out = (torch.randn(shape, device=device) + 0.3) * scale_grad
            if repeated:
                x, grad_out = (t[:1].expand(shape) for t in (x, grad_out))
            x, grad_out = x.to(dtype).double(), grad_out.to(dtype).double()
            truth.load_state_dict(state)
            truth.to(device)
            set_mode(truth, mode)
            if not exact or _distance_to_kink(truth, x) > near:
                break
        # In float64 the plain code is the truth itself: its error is that in float32, scaled, and
        # doubled because the truth is then off by as much.
        plain_dtype, scale = dtype, 1.0
        if dtype is torch.float64:
            plain_dtype = torch.float32
            scale = 2 * torch.finfo(dtype).eps / torch.finfo(plain_dtype).eps
        plain = AdditiveTokenMixer(shape[1], attn_bias).to(device, plain_dtype)
        for mixer in (truth, plain):
            mixer.load_state_dict(state)
            set_mode(mixer, mode)
        results = _compute(truth, x, grad_out, mode)
        got = _compute(plain, x.to(plain_dtype), grad_out.to(plain_dtype), mode)
        errors = {name: _errors(t, results[name]).times(scale) for name, t in got.items()}
    return _Sample(state, x, grad_out, results, errors)


def _one_sided(state: dict[str, Tensor]) -> None:
    """BatchNorm weights that are small beside biases: each channel's ReLU is open or shut."""
    for name, t in state.items():
        if name.endswith("0.block.1.weight"):
            t /= 32
        elif name.endswith("0.block.1.bias"):
            t.copy_(torch.where(t < 0, t - 1, t + 1))


def _values(name: str, like: Tensor) -> Tensor:
    """Random weights that hide nothing: no symmetric border, no constant or saturated gate."""
    shape = like.shape
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if name.endswith("running_var"):
        return 0.5 + 1.5 * torch.rand(shape)
    if name.endswith("0.block.1.weight"):  # BatchNorm's, of both signs
        return (0.5 + torch.rand(shape)) * torch.where(torch.rand(shape) < 0.4, -1.0, 1.0)
    if like.dim() == 1:
        return 0.4 * torch.randn(shape)
    gain = 2.0 if ".block.3." in name or ".1.block.1." in name else 1.2
    return gain * torch.randn(shape) / math.sqrt(shape[1] * shape[2] * shape[3])


def _distance_to_kink(mixer: AdditiveTokenMixer, x: Tensor) -> float:
    """How near to 0 an input of a ReLU comes; writes running statistics in training."""
    nearest: list[float] = [math.inf]

    def hook(module: nn.Module, args: object, out: Tensor) -> None:
        if out.numel():
            nearest.append(out.abs().min().item())

    handles = [
        m.register_forward_hook(hook) for m in mixer.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        mixer(x)
    for handle in handles:
        handle.remove()
    return min(nearest)


def _compute(mixer: nn.Module, x: Tensor, grad_out: Tensor, mode: str) -> Results:
    """What one call gives: the output, and by mode the gradients and the running statistics."""
    if mode == "eval":
        with torch.no_grad():
            return {"out": mixer(x)}
    x = x.detach().requires_grad_()
    out = mixer(x)
    named = {"x": x, **dict(mixer.named_parameters())}
    grads = torch.autograd.grad(out, list(named.values()), grad_out, allow_unused=True)
    results: Results = {"out": out.detach()}
    results |= {f"grad {k}": g for k, g in zip(named, grads, strict=True) if g is not None}
    if mode == "train":
        results |= {k: v.clone() for k, v in mixer.named_buffers()}
    return results


def _spoil_scratch(mixer: nn.Module, x: Tensor, mode: str) -> None:
    """Leave NaN in whatever memory the backend keeps between calls."""
    state = {name: t.clone() for name, t in mixer.state_dict().items()}
    nan = torch.full_like(x, math.nan)
    _compute(mixer, nan, nan, mode)
    mixer.load_state_dict(state)


def _bits(t: Tensor) -> Tensor:
    """The bits of a tensor, so that NaN equals NaN and -0 is not 0."""
    return t.detach().view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize]
    )


def _errors(got: Tensor, truth: Tensor) -> _Errors:
    if truth.numel() == 0:
        return _Errors(0.0, 0.0, 0.0, 0.0, 0.0)
    got, truth = got.detach().to(truth.device, torch.float64), truth.double()
    error = got - truth
    size = _rms(truth)
    return _Errors(
        error.abs().max().item(), _rms(error), _rms(got) - size, error.mean().item(), size
    )


def _rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def _judge(name: str, got: Tensor, truth: Tensor, own: list[_Errors], case: Case) -> _Judged:
    """Compare one tensor with the truth, as far as plain PyTorch's `own` errors allow.

    Every bound is a factor times plain PyTorch's own figure, the largest of its draws. No figure is
    taken as less than one ulp of the values it belongs to, where plain PyTorch was lucky or exact:
    storing the result costs half of that alone. (From float32 up, where a result is off by more
    roundings than its last, an element may always be off by `factor` squared ulps of the largest.)
    """
    if got.shape != truth.shape:
        text = f"{name}: expected shape {tuple(truth.shape)}, got {tuple(got.shape)}"
        return _Judged(name, math.inf, 0.0, math.inf, 0.0, 0.0, math.inf, (text,), math.inf)
    if truth.numel() == 0:
        return _Judged(name, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, (), 0.0)
    ulp = torch.finfo(case.dtype).eps
    error = _errors(got, truth)
    size, largest = error.truth, truth.abs().max().item()
    rms = max(*(e.rms for e in own), ulp * size)
    vanishes = rms > 0.3 * size  # no digit right
    factor = GRADIENT_FACTOR if name.startswith("grad ") else FACTOR
    if vanishes:
        factor = VANISHING_FACTOR
    if case.dtype is torch.float64:
        factor *= 2  # the truth is no more exact than the result: both err
    reference_error = max(e.largest for e in own)
    least = ulp * largest * (factor if case.dtype.itemsize >= 4 else 1)
    ratio = _divide(error.largest, max(reference_error, least))
    # A systematic error does not average out over the channels as rounding does: allow two standard
    # errors of what the bound on the rms error allows.
    drift = 2 * factor * rms / math.sqrt(case.shape[1])
    norm = factor * max(abs(e.norm) for e in own) + drift
    mean = factor * max(abs(e.mean) for e in own) + drift

    flat, flat_truth = got.detach().to(truth.device, torch.float64).flatten(), truth.flatten()
    cosine = _divide((flat @ flat_truth).item(), (flat.norm() * flat_truth.norm()).item(), 1.0)
    relative_norm = _divide(flat.norm().item(), flat_truth.norm().item(), 1.0)
    bias = _divide(error.mean, size)

    failures = []
    if not ratio <= factor:  # written so that NaN fails
        failures.append(f"{name}: max error {error.largest:.3g} is {ratio:.3g}x PyTorch's own")
    if not error.rms <= factor * rms:
        failures.append(f"{name}: rms error {error.rms:.3g}, PyTorch's own {rms:.3g}")
    if not vanishes:
        # An error vector of relative length r turns the result by an angle of at most asin(r).
        turn = min(1.0, factor * _divide(rms, size))
        if not cosine >= math.sqrt(1 - turn * turn) - 1e-12:
            failures.append(f"{name}: cosine {cosine:.9f} to the truth")
        if not abs(error.norm) <= norm:
            failures.append(f"{name}: norm {relative_norm:.9f} of the truth's")
        if not abs(error.mean) <= mean:
            failures.append(f"{name}: bias {bias:.3g}")
    figures = (error.largest, reference_error, ratio, cosine, relative_norm, bias)
    return _Judged(name, *figures, tuple(failures), ratio / factor)


def _divide(a: float, b: float, nothing: float = 0.0) -> float:
    """a / b; 0 / 0 is `nothing`, anything else over 0 infinite."""
    if b == 0:
        return nothing if a == 0 else math.inf
    return a / b


def _row(case: Case, judged: Iterable[_Judged], failures: tuple[str, ...]) -> Row:
    every = list(judged)
    failures += tuple(text for j in every for text in j.failures)
    worst = max(
        every,
        key=lambda j: (bool(j.failures), math.inf if math.isnan(j.ratio) else j.of_limit),
        default=_NOTHING,
    )
    figures = worst[:-2]
    return Row(
        case.backend, _name(case.dtype), case.layout, case.mode, case.shape, *figures, failures
    )
