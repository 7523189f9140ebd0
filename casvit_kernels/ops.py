"""The operators of `torch.ops.casvit_kernels`: schema, fake kernels, autograd, autocast; one place.

The CPU kernels register themselves from `csrc/` when the native library loads; `mix_training` and
`mix_backward` are implemented in `training.py`, once for all backends. The weights are the fields of
`reference.MixerWeights`, flat, in order, as the operator schema wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, reference
from .reference import GateWeights, MixerWeights

_GATE = (
    "Tensor {z}_depthwise_weight, Tensor {z}_depthwise_bias, "
    "Tensor? {z}_norm_weight, Tensor? {z}_norm_bias, Tensor? {z}_norm_mean, Tensor? {z}_norm_var, "
    "Tensor {z}_spatial_weight, Tensor {z}_channel_weight"
)
# Running statistics may be absent where batch statistics stand for them.
_WEIGHTS = (
    f"Tensor qkv_weight, Tensor? qkv_bias, {_GATE.format(z='q')}, {_GATE.format(z='k')}, "
    "Tensor dwc_weight, Tensor dwc_bias, Tensor proj_weight, Tensor proj_bias, "
    "float eps_q, float eps_k"
)
_N = len(MixerWeights._fields) - 2 + 2 * len(GateWeights._fields)  # tensors of the weights

_library = torch.library.Library("casvit_kernels", "DEF")
# packed: what pack() made of the same weights; None makes it anew in this call.
# dtype: that of the output and of the qkv product's operands, by default x's (autocast sets it).
_library.define(
    f"project_and_mix(Tensor x, {_WEIGHTS}, Tensor? packed=None, ScalarType? dtype=None) -> Tensor"
)
_library.define(f"pack({_WEIGHTS}, ScalarType dtype) -> Tensor")
# batch: whether the gate's BatchNorm uses batch statistics. group: the name of the process group
# that these are reduced over, "" for none. number: of the values behind each of them.
_TRAINING = f"{_WEIGHTS}, bool batch_q, bool batch_k, ScalarType? dtype, str backend, str group"
_library.define(
    f"mix_training(Tensor x, {_TRAINING}) -> (Tensor out, "
    "Tensor statistics, Tensor number, Tensor spatial, Tensor pooled, Tensor channel)"
)
# needed: of x and each weight. Returns the gradients of those alone, in that order.
_library.define(
    f"mix_backward(Tensor grad, Tensor x, {_TRAINING}, Tensor statistics, Tensor number, "
    "Tensor spatial, Tensor pooled, Tensor channel, bool[] needed) -> Tensor[]"
)
# project_and_mix without gradients, of weights that have not moved since cpu_remember noted in `packed`
# where they are (their memory is read again): so many arguments take the dispatcher longer than the rest
# of the call. These and the phases on the CPU are reached by way of backends/cpu.py alone.
_library.define(f"cpu_remember(Tensor(a!) packed, {_WEIGHTS}) -> ()")
_library.define("cpu_infer(Tensor x, Tensor packed) -> Tensor")
# The phases. qkv, grad_sum and grad_qkv are in layouts of their own; shape is (B, C, H, W).
for _phase in (
    "cpu_project(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, ScalarType dtype, Tensor(a!) qkv)"
    " -> ()",
    f"cpu_statistics(Tensor qkv, int[] shape, {_WEIGHTS}) -> Tensor",
    f"cpu_mix(Tensor x, Tensor qkv, {_WEIGHTS}, Tensor statistics, ScalarType dtype)"
    " -> (Tensor out, Tensor spatial, Tensor pooled, Tensor channel)",
    f"cpu_backward_combine(Tensor grad, Tensor qkv, {_WEIGHTS}, Tensor spatial, Tensor channel,"
    " Tensor(a!) grad_qkv, Tensor(b!) grad_sum) -> (Tensor pixel, Tensor channel_sum,"
    " Tensor dwc_weight, Tensor dwc_bias, Tensor proj_weight, Tensor proj_bias)",
    f"cpu_backward_gate(Tensor qkv, int[] shape, {_WEIGHTS}, Tensor statistics, Tensor spatial,"
    " Tensor pixel, Tensor shift) -> (Tensor logit, Tensor spatial_weight, Tensor sums)",
    f"cpu_backward_depthwise(Tensor qkv, int[] shape, {_WEIGHTS}, Tensor statistics,"
    " Tensor spatial, Tensor channel, Tensor shift, Tensor logit, Tensor coefficients,"
    " Tensor grad_sum, Tensor(a!) grad_qkv) -> (Tensor depthwise_weight, Tensor depthwise_bias)",
    # The phases together. needed: bit i stands for x and the weights, in order; the gradients of
    # those are returned.
    f"cpu_forward(Tensor x, {_WEIGHTS}, bool batch_q, bool batch_k, ScalarType dtype,"
    " Tensor(a!) qkv)"
    " -> (Tensor out, Tensor statistics, Tensor spatial, Tensor pooled, Tensor channel)",
    f"cpu_backward(Tensor grad, Tensor x, {_WEIGHTS}, bool batch_q, bool batch_k, ScalarType dtype,"
    " Tensor statistics, Tensor spatial, Tensor pooled, Tensor channel, int needed,"
    " Tensor(a!) qkv, Tensor(b!) grad_qkv, Tensor(c!) grad_sum) -> Tensor[]",
    "cpu_project_backward(Tensor grad_qkv, Tensor x, Tensor qkv_weight, ScalarType dtype,"
    " bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
):
    _library.define(_phase)
_native.load()


class Settings(NamedTuple):
    """What `mix_training` and `mix_backward` take beside tensors."""

    eps_q: float
    eps_k: float
    batch_q: bool  # whether the q gate's BatchNorm uses batch statistics
    batch_k: bool
    dtype: torch.dtype | None  # of out and of the qkv product's operands; None: that of x
    backend: str
    group: str  # name of the process group that reduces the statistics, "" for none


class Saved(NamedTuple):
    """What the backward needs beside x and the weights."""

    statistics: Tensor  # (2, 2, C) float32: of q and k, the mean and biased variance that were used
    number: Tensor  # () float64: how many values of each channel batch statistics are taken over
    spatial: Tensor  # (B, 2, H, W) float32, gates
    pooled: Tensor  # (2, B, C) float32
    channel: Tensor  # (2, B, C) float32, gates


def project_and_mix(
    x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: Tensor | None = None
) -> Tensor:
    """The whole mixer from x to out with running statistics; differentiable."""
    out: Tensor = torch.ops.casvit_kernels.project_and_mix(x, *flatten(w), *eps, packed)
    return out


def pack(w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """The weights, BatchNorm folded, in the layout the CPU kernel reads; opaque bytes."""
    out: Tensor = torch.ops.casvit_kernels.pack(*flatten(w), *eps, dtype)
    return out


def mix_training(x: Tensor, w: MixerWeights, settings: Settings) -> tuple[Tensor, Saved]:
    """The whole mixer with batch statistics where the settings say so; out is differentiable.

    Running statistics of such a gate are neither read nor written: `Saved` has what updates them.
    """
    apply = torch.ops.casvit_kernels.mix_training if is_opaque() else _Mix.apply
    out, *saved = apply(x, *flatten(w), *settings)
    return out, Saved(*saved)


_kernels: dict[str, Callable[..., Any]] = {}


def implement(name: str, kernel: Callable[..., Any]) -> None:
    """Register a kernel in Python for tensors of every device."""
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _kernels[name] = kernel


def _call(name: str, device: str, *inputs: Any) -> Any:
    """The kernel of an operator without the dispatcher."""
    if torch.is_autocast_enabled(device):  # of what the kernel itself calls
        with torch.autocast(device, enabled=False):
            return _kernels[name](*inputs)
    return _kernels[name](*inputs)


def is_opaque() -> bool:
    """Whether somebody looks at operators: a compiler, a mode that records them.

    Elsewhere their kernels are called directly: an operator in Python costs 0.3 ms a step.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def flatten(w: MixerWeights) -> tuple[Tensor | None, ...]:
    return (w[0], w[1], *w.q, *w.k, *w[4:])


def unflatten(flat: Sequence[Any]) -> MixerWeights:
    a: Any = flat
    return MixerWeights(a[0], a[1], GateWeights(*a[2:10]), GateWeights(*a[10:18]), *a[18:22])


def formula_norm(w: GateWeights, eps: float, batch: bool, momentum: float = 0.0) -> reference.Norm:
    """A gate's BatchNorm for the reference formulas; with batch statistics it updates the running."""
    if not batch:
        return reference.running_norm(w, eps)

    def norm(d: Tensor) -> Tensor:
        mean, var = w.norm_mean, w.norm_var
        return F.batch_norm(d, mean, var, w.norm_weight, w.norm_bias, True, momentum, eps)

    return norm


def output_memory_format(x: Tensor) -> torch.memory_format:
    """Channels last when channels are innermost in memory, else contiguous: the input's layout."""
    if not x.is_contiguous() and x.stride(1) == 1:
        return torch.channels_last
    return torch.contiguous_format


def empty_output(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Memory for the mixer's output (or for a gradient at x), in the layout of x."""
    return torch.empty(
        x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=output_memory_format(x)
    )


def empty_gradients(x: Tensor, weights: Sequence[Any], needed: Sequence[bool]) -> list[Tensor]:
    """Memory for what `mix_backward` returns. needed: of x and each of the flat weights.

    A weight's gradient has its strides, of dimensions of size 1 too: DistributedDataParallel compares.
    """
    of_x, *of_weights = needed
    return ([empty_output(x, None)] if of_x else []) + [
        torch.empty_like(t) for t, n in zip(weights, of_weights, strict=True) if n
    ]


# Fake kernels: shapes, dtypes and layouts for torch.compile.


@torch.library.register_fake("casvit_kernels::project_and_mix", lib=_library)
def _project_and_mix_fake(
    x: Tensor, *rest: Any, packed: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    if len(rest) == _N + 4:  # passed by position
        dtype = rest[-1]
    return empty_output(x, dtype)


@torch.library.register_fake("casvit_kernels::pack", lib=_library)
def _pack_fake(qkv_weight: Tensor, *rest: object) -> Tensor:
    # The size depends on the instruction set; nobody computes with it.
    size = torch.library.get_ctx().new_dynamic_size()
    return qkv_weight.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("casvit_kernels::mix_training", lib=_library)
def _mix_training_fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    b, c, h, w = x.shape

    def small(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    return (
        empty_output(x, Settings(*rest[_N:]).dtype),
        small(2, 2, c),
        small(dtype=torch.float64),
        small(b, 2, h, w),
        small(2, b, c),
        small(2, b, c),
    )


@torch.library.register_fake("casvit_kernels::mix_backward", lib=_library)
def _mix_backward_fake(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return empty_gradients(x, rest[:_N], rest[-1])


# Autograd. Saved are x, the weights (without running statistics) and `Saved`: everything as large as
# x is computed again in the backward.


def _without_running(w: MixerWeights) -> MixerWeights:
    q, k = (g._replace(norm_mean=None, norm_var=None) for g in (w.q, w.k))
    return w._replace(q=q, k=k)


def _setup_mix(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights = inputs[0], inputs[1 : 1 + _N]
    # The running statistics are about to be updated; those that were used are in `statistics`.
    weights = flatten(_without_running(unflatten(weights)))
    ctx.save_for_backward(x, *weights, *output[1:])
    ctx.settings = Settings(*inputs[1 + _N :])._replace(dtype=output[0].dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _mix_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    x, weights, rest = saved[0], saved[1 : 1 + _N], saved[1 + _N :]
    return _gradients(ctx, grad, x, weights, ctx.settings, rest)


def _gradients(
    ctx: Any,
    grad: Tensor | None,
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    settings: Settings,
    saved: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad is not None:
        if _batched(grad):
            raise NotImplementedError(
                "the fused mixer has no gradients for a batch of vectors at once "
                "(is_grads_batched=True, or torch.vmap over torch.autograd.grad): call "
                "torch.autograd.grad for each, or use torch.func.vjp or backend='reference'"
            )
        needed = ctx.needs_input_grad[: 1 + _N]
        direct = not (
            torch.is_grad_enabled() or is_opaque()
        )  # enabled: it is differentiated in turn
        inputs = (grad, x, *weights, *settings, *saved, needed)
        gradients = iter(
            _call("mix_backward", x.device.type, *inputs)
            if direct
            else torch.ops.casvit_kernels.mix_backward(*inputs)
        )
        result[: 1 + _N] = [next(gradients) if n else None for n in needed]
    return tuple(result)


def _batched(t: Tensor) -> bool:
    functorch: Any = torch._C._functorch
    return bool(functorch.is_legacy_batchedtensor(t) or functorch.is_batchedtensor(t))


torch.library.register_autograd(
    "casvit_kernels::mix_training", _mix_backward, setup_context=_setup_mix, lib=_library
)


class _Mix(torch.autograd.Function):
    """The operator `mix_training` without the dispatcher."""

    # Without a setup_context of its own: with one, each call inspects the signature of forward.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _call("mix_training", inputs[0].device.type, *inputs)
        _setup_mix(ctx, inputs, output)
        return output

    backward = staticmethod(_mix_backward)


def _setup_project_and_mix(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: 1 + _N])
    # The CPU's is the only backend behind this operator.
    eps_q, eps_k = inputs[1 + _N : 3 + _N]
    ctx.settings = Settings(eps_q, eps_k, False, False, output.dtype, "cpu", "")


def _project_and_mix_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *weights = ctx.saved_tensors
    with torch.no_grad():
        _, *saved = torch.ops.casvit_kernels.mix_training(x, *weights, *ctx.settings)
    weights = flatten(_without_running(unflatten(weights)))
    return _gradients(ctx, grad, x, weights, ctx.settings, saved)


torch.library.register_autograd(
    "casvit_kernels::project_and_mix",
    _project_and_mix_backward,
    setup_context=_setup_project_and_mix,
    lib=_library,
)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[: 2 + _N], inputs[-6])
    ctx.settings = Settings(*inputs[2 + _N : -6])
    ctx.needed = inputs[-1]
    ctx.set_materialize_grads(False)


def _second_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Differentiates the gradient of the reference formulas."""
    settings = ctx.settings
    if settings.group:
        raise NotImplementedError(
            "second derivatives of a mixer whose BatchNorm is synchronised between processes are "
            "not supported: use nn.BatchNorm2d where create_graph=True is needed"
        )
    *inputs, statistics = ctx.saved_tensors  # grad, x and the weights
    again = torch.is_grad_enabled()  # derivatives of this one, too
    differentiable = ctx.needs_input_grad[: 2 + _N]
    first = [False, *ctx.needed]  # what the gradients were taken for
    with torch.enable_grad():
        # Each input is cut off from the others: x may be computed from the weights, say.
        cut: list[Any] = [
            t if t is None else t.view_as(t) if wanted else t.detach().requires_grad_(of_first)
            for t, wanted, of_first in zip(inputs, differentiable, first, strict=True)
        ]
        grad, x = cut[:2]
        # Under autocast x and the weights are wider than what was computed in.
        computed = torch.promote_types(settings.dtype or x.dtype, torch.float32)
        weights = unflatten([t if t is None else t.to(computed) for t in cut[2:]])
        q, k = (
            g._replace(norm_mean=mean.to(computed), norm_var=var.to(computed)) if not batch else g
            for g, (mean, var), batch in zip(
                (weights.q, weights.k), statistics, settings[2:4], strict=True
            )
        )
        norms = map(formula_norm, (q, k), settings[:2], settings[2:4])
        with torch.autocast(x.device.type, enabled=False):
            out = reference.catm(x.to(computed), weights, *norms)
        gradients = torch.autograd.grad(
            out,
            [t for t, f in zip(cut, first, strict=True) if f],
            grad.to(computed),
            create_graph=True,
        )
    given = [(g, gg) for g, gg in zip(gradients, grads, strict=True) if gg is not None]
    second = iter(
        torch.autograd.grad(
            [g for g, _ in given],
            [t for t, wanted in zip(cut, differentiable, strict=True) if wanted],
            [gg for _, gg in given],
            create_graph=again,
            allow_unused=True,
        )
    )
    result = [next(second) if wanted else None for wanted in differentiable]
    return (*result, *[None] * (len(Settings._fields) + len(Saved._fields)), None)


torch.library.register_autograd(
    "casvit_kernels::mix_backward", _second_backward, setup_context=_setup_second, lib=_library
)


# Autocast: x and the weights stay as they are, the kernels read any dtype.


def _autocast(device_type: str, key: str) -> None:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def project_and_mix(x: Tensor, *rest: Any, **named: Any) -> Any:
        if x.dtype is not torch.float64:
            named.setdefault("dtype", torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.casvit_kernels.project_and_mix(x, *rest, **named)

    def mix_training(x: Tensor, *rest: Any) -> Any:
        settings = Settings(*rest[_N:])
        if settings.dtype is None and x.dtype is not torch.float64:
            settings = settings._replace(dtype=torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.casvit_kernels.mix_training(x, *rest[:_N], *settings)

    def mix_backward(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.casvit_kernels.mix_backward(*arguments)

    for kernel in (project_and_mix, mix_training, mix_backward):
        _library.impl(kernel.__name__, kernel, key)


_autocast("cpu", "AutocastCPU")
_autocast("cuda", "AutocastCUDA")
