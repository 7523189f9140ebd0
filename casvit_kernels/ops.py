"""The operators of `torch.ops.casvit_kernels`: schema, fake kernels, autograd, autocast; one place.

The CPU kernels register themselves from `csrc/register.cpp` when the native library loads. The
arguments are the fields of `reference.MixerWeights`, flat, in order, as the operator schema wants them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native, reference
from .reference import GateWeights, MixerWeights

_GATE = (
    "Tensor {z}_depthwise_weight, Tensor {z}_depthwise_bias, "
    "Tensor? {z}_norm_weight, Tensor? {z}_norm_bias, Tensor {z}_norm_mean, Tensor {z}_norm_var, "
    "Tensor {z}_spatial_weight, Tensor {z}_channel_weight"
)
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
# The phases of training on the CPU, called by backends/cpu.py alone. qkv, grad_sum and grad_qkv are
# in layouts of their own; shape is (B, C, H, W).
for _phase in (
    "cpu_project(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, ScalarType dtype) -> Tensor",
    f"cpu_statistics(Tensor qkv, int[] shape, {_WEIGHTS}) -> Tensor",
    f"cpu_mix(Tensor x, Tensor qkv, {_WEIGHTS}, Tensor statistics, ScalarType dtype)"
    " -> (Tensor out, Tensor spatial, Tensor pooled, Tensor channel)",
    f"cpu_backward_combine(Tensor grad, Tensor qkv, {_WEIGHTS}, Tensor spatial, Tensor channel)"
    " -> (Tensor grad_qkv, Tensor grad_sum, Tensor pixel, Tensor channel_sum, Tensor dwc_weight,"
    " Tensor dwc_bias, Tensor proj_weight, Tensor proj_bias)",
    f"cpu_backward_gate(Tensor qkv, int[] shape, {_WEIGHTS}, Tensor statistics, Tensor spatial,"
    " Tensor pixel, Tensor shift) -> (Tensor logit, Tensor spatial_weight, Tensor sums)",
    f"cpu_backward_depthwise(Tensor qkv, int[] shape, {_WEIGHTS}, Tensor statistics,"
    " Tensor spatial, Tensor channel, Tensor shift, Tensor logit, Tensor coefficients,"
    " Tensor grad_sum, Tensor(a!) grad_qkv) -> (Tensor depthwise_weight, Tensor depthwise_bias)",
):
    _library.define(_phase)
_native.load()


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


def flatten(w: MixerWeights) -> tuple[Tensor | None, ...]:
    return (w[0], w[1], *w.q, *w.k, *w[4:])


def unflatten(flat: tuple[Tensor | None, ...]) -> MixerWeights:
    a: tuple[Any, ...] = flat
    return MixerWeights(a[0], a[1], GateWeights(*a[2:10]), GateWeights(*a[10:18]), *a[18:22])


def output_memory_format(x: Tensor) -> torch.memory_format:
    """Channels last when channels are innermost in memory, else contiguous: the input's layout."""
    if not x.is_contiguous() and x.stride(1) == 1:
        return torch.channels_last
    return torch.contiguous_format


@torch.library.register_fake("casvit_kernels::project_and_mix", lib=_library)
def _project_and_mix_fake(
    x: Tensor, *rest: Any, packed: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    if len(rest) == _N + 4:  # passed by position
        dtype = rest[-1]
    return torch.empty(
        x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=output_memory_format(x)
    )


@torch.library.register_fake("casvit_kernels::pack", lib=_library)
def _pack_fake(qkv_weight: Tensor, *rest: object) -> Tensor:
    # The size depends on the instruction set; nobody computes with it.
    size = torch.library.get_ctx().new_dynamic_size()
    return qkv_weight.new_empty(size, dtype=torch.uint8)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: 1 + _N])
    ctx.eps = inputs[1 + _N : 3 + _N]
    ctx.dtype = output.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Recomputes the reference formulas and differentiates them (saved: the inputs alone)."""
    saved = ctx.saved_tensors
    again = torch.is_grad_enabled()  # create_graph=True: the gradient is differentiated in turn
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[: 1 + _N]) if needed]
    with torch.enable_grad():
        # Each input is cut off from the others: x may be computed from the weights, say.
        inputs: list[Any] = [
            t
            if t is None
            else t.view_as(t)
            if again and i in wanted
            else t.detach().requires_grad_(i in wanted)
            for i, t in enumerate(saved)
        ]
        # Under autocast x and the weights are wider than what was computed in.
        w = unflatten(tuple(t if t is None else t.to(ctx.dtype) for t in inputs[1:]))
        out = reference.catm(
            inputs[0].to(ctx.dtype),
            w,
            reference.running_norm(w.q, ctx.eps[0]),
            reference.running_norm(w.k, ctx.eps[1]),
        )
    grads = torch.autograd.grad(out, [inputs[i] for i in wanted], grad, create_graph=again)
    result: list[Tensor | None] = [None] * (len(ctx.needs_input_grad))
    for i, g in zip(wanted, grads, strict=True):
        result[i] = g
    return tuple(result)


torch.library.register_autograd(
    "casvit_kernels::project_and_mix", _backward, setup_context=_setup_context, lib=_library
)


def _autocast(device_type: str, key: str) -> None:
    """Under autocast x and the weights stay as they are: the kernels read any dtype."""
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        if x.dtype is not torch.float64:
            named.setdefault("dtype", torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            out: Tensor = torch.ops.casvit_kernels.project_and_mix(x, *rest, **named)
        return out

    _library.impl("project_and_mix", kernel, key)


_autocast("cpu", "AutocastCPU")
_autocast("cuda", "AutocastCUDA")
