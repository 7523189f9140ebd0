"""Whether a backend computes what plain PyTorch computes: the checks behind tests and `parity`.

Ground truth is `AdditiveTokenMixer` in float64, with weights and input rounded to the dtype under test;
`numerics.py` judges.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends import BackendUnavailable, Problem, get
from ..module import FusedCATM
from ..ops.mixer.reference import AdditiveTokenMixer
from .cases import FORMATS, MODES, Case, Shape, cases, dtype_name, lay_out, set_mode
from .numerics import NOTHING, Errors, Judged, bits, errors_of, judge, poisoned, without_tf32

Results = dict[str, Tensor]
_LARGE = 100_000  # elements of x; from here the truth is computed on the device under test


class Row(NamedTuple):
    """The verdict on one case; the figures are those of `tensor`, the worst one."""

    backend: str
    dtype: str  #: e.g. "float32"
    layout: str
    mode: str
    shape: Shape
    tensor: str  #: "out", "grad x", "grad qkv.weight", "oper_q.0.block.1.running_mean", ...
    max_error: float  #: largest absolute error against float64
    reference_error: float  #: that of plain PyTorch in the same dtype (see `judge`)
    ratio: float  #: of the two; at most 2 passes, 4 for a gradient
    cosine: float  #: between result and truth, 1 is right
    relative_norm: float  #: of result to truth, 1 is right
    bias: float  #: mean error over root mean square of the truth, signed, 0 is right
    failures: tuple[str, ...]  #: what is wrong, in words

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures


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

    Returns:
        The verdict. What the mixer raises goes through; of `verdict` that is a row, too.
    """
    device = case.device
    truth_device = device if math.prod(case.shape) >= _LARGE else "cpu"
    with without_tf32(truth_device):
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
    before = {name: bits(t).clone() for name, t in watched.items()}

    with poisoned(), without_tf32(device):
        _spoil_scratch(mixer, x, case.mode)
        results = _compute(mixer, x, grad_out, case.mode)
        changed = [name for name, t in watched.items() if not torch.equal(bits(t), before[name])]
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
    expected = FORMATS["channels_last" in case.layout]
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
            judged.append(judge(name, results[name], truth, own, case.dtype, case.shape[1]))
            if not torch.equal(bits(results[name]), bits(again[name])):
                failures.append(f"{name}: two equal calls differ")
    return _row(case, judged, tuple(failures))


class _Sample(NamedTuple):
    """One draw of weights and input, float64 rounded to the dtype, and what becomes of it."""

    state: dict[str, Tensor]
    x: Tensor
    grad_out: Tensor
    results: Results
    plain: dict[str, Errors]  # plain PyTorch in the dtype


def _fused(case: Case) -> nn.Module:
    return FusedCATM(case.shape[1], case.attn_bias, backend=case.backend)


def _repeats(case: Case) -> bool:
    return case.layout == "expanded"


@functools.lru_cache(maxsize=1)  # the layouts of a shape share their truth; it may be gigabytes
def _samples(
    dtype: torch.dtype,
    mode: str,
    shape: Shape,
    attn_bias: bool,
    seed: int,
    repeated: bool,
    device: str,
) -> tuple[_Sample, list[dict[str, Errors]]]:
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
        errors = {name: errors_of(t, results[name]).times(scale) for name, t in got.items()}
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


def _row(case: Case, judged: Iterable[Judged], failures: tuple[str, ...]) -> Row:
    every = list(judged)
    failures += tuple(text for j in every for text in j.failures)
    worst = max(
        every,
        key=lambda j: (bool(j.failures), math.inf if math.isnan(j.ratio) else j.of_limit),
        default=NOTHING,
    )
    figures = worst[:-2]
    return Row(
        case.backend, dtype_name(case.dtype), case.layout, case.mode, case.shape, *figures, failures
    )
