"""Autograd of the mixer's operators, and the implementations of `mix_training` and `mix_backward`.

Source: arXiv 2408.03703, section 3.2. Second derivatives differentiate the reference formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tracing import is_opaque
from . import kernels, reference, schema, training
from .kernels import WholeStep
from .packed import watch_capture
from .reference import formula_norm
from .schema import Saved, Settings, output_memory_format
from .weights import COUNT, MixerWeights, flatten, unflatten


def mix_training(x: Tensor, w: MixerWeights, settings: Settings) -> tuple[Tensor, Saved]:
    """The whole mixer with batch statistics where the settings say so; out is differentiable.

    Running statistics of such a gate are neither read nor written: `Saved` has what updates them.
    """
    apply = torch.ops.casvit_kernels.mix_training if is_opaque() else _Mix.apply
    out, *saved = apply(x, *flatten(w), *settings)
    return out, Saved(*saved)


# The implementations, for tensors of any device. A compiler sees opaque operators.


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    watch_capture(x)  # here: of a compiled step nothing else in Python runs in a capture
    w, s = unflatten(rest[:COUNT]), Settings(*rest[COUNT:])
    phases = kernels.phases(s.backend)
    if x.shape[0] and not s.group and isinstance(phases, WholeStep):
        eps, batch, dtype = (s.eps_q, s.eps_k), (s.batch_q, s.batch_k), s.dtype or x.dtype
        out, statistics, *small = phases.forward(x, w, eps, batch, dtype)
        number = torch.full((), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        return (out, statistics, number, *small)
    out, saved = training.forward(phases, x, w, s)
    return (out, *saved)


def _backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    """The gradients of x and of each weight that are needed, those alone; see `schema`."""
    *rest, needed = rest  # type: ignore[assignment]
    m = COUNT + len(Settings._fields)
    flat, s, saved = rest[:COUNT], Settings(*rest[COUNT:m]), Saved(*rest[m:])
    w, phases = unflatten(flat), kernels.phases(s.backend)
    if x.shape[0] and not s.group and isinstance(phases, WholeStep):
        eps, batch, small = (s.eps_q, s.eps_k), (s.batch_q, s.batch_k), (saved[0], *saved[2:])
        found = phases.backward(grad, x, w, eps, batch, s.dtype or x.dtype, small, needed)
    else:
        grad = grad.contiguous(memory_format=output_memory_format(x))
        found = training.backward(phases, grad, x, w, s, saved, needed)
    of_x = [found[0].to(x.dtype)] if needed[0] else []
    weights = [t for t, n in zip(flat, needed[1:], strict=True) if n]
    return of_x + [_like(g, t) for g, t in zip(found[len(of_x) :], weights, strict=True)]


def _like(grad: Tensor, weight: Any) -> Tensor:
    """The gradient in the shape, dtype and strides of the weight; see `schema.empty_gradients`."""
    alike = grad.dtype is weight.dtype and grad.shape == weight.shape
    if alike and grad.stride() == weight.stride():
        return grad
    grad = grad.to(weight.dtype)
    if weight.is_contiguous():
        return grad.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight).copy_(grad.reshape(weight.shape))


schema.library.impl("mix_training", _forward, "CompositeExplicitAutograd")
schema.library.impl("mix_backward", _backward, "CompositeExplicitAutograd")


def _direct(kernel: Callable[..., Any], device: str, *inputs: Any) -> Any:
    """The kernel of an operator without the dispatcher."""
    if torch.is_autocast_enabled(device):  # of what the kernel itself calls
        with torch.autocast(device, enabled=False):
            return kernel(*inputs)
    return kernel(*inputs)


# Autograd. Saved are x, the weights (without running statistics) and `Saved`: everything as large as
# x is computed again in the backward.


def _without_running(w: MixerWeights) -> MixerWeights:
    q, k = (g._replace(norm_mean=None, norm_var=None) for g in (w.q, w.k))
    return w._replace(q=q, k=k)


def _setup_mix(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights = inputs[0], inputs[1 : 1 + COUNT]
    # The running statistics are about to be updated; those that were used are in `statistics`.
    weights = flatten(_without_running(unflatten(weights)))
    ctx.save_for_backward(x, *weights, *output[1:])
    ctx.settings = Settings(*inputs[1 + COUNT :])._replace(dtype=output[0].dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _mix_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    x, weights, rest = saved[0], saved[1 : 1 + COUNT], saved[1 + COUNT :]
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
        needed = ctx.needs_input_grad[: 1 + COUNT]
        # With gradients enabled it is differentiated in turn.
        direct = not (torch.is_grad_enabled() or is_opaque())
        inputs = (grad, x, *weights, *settings, *saved, needed)
        gradients = iter(
            _direct(_backward, x.device.type, *inputs)
            if direct
            else torch.ops.casvit_kernels.mix_backward(*inputs)
        )
        result[: 1 + COUNT] = [next(gradients) if n else None for n in needed]
    return tuple(result)


def _batched(t: Tensor) -> bool:
    functorch: Any = torch._C._functorch
    return bool(functorch.is_legacy_batchedtensor(t) or functorch.is_batchedtensor(t))


torch.library.register_autograd(
    "casvit_kernels::mix_training", _mix_backward, setup_context=_setup_mix, lib=schema.library
)


class _Mix(torch.autograd.Function):
    """The operator `mix_training` without the dispatcher."""

    # Without a setup_context of its own: with one, each call inspects the signature of forward.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _direct(_forward, inputs[0].device.type, *inputs)
        _setup_mix(ctx, inputs, output)
        return output

    backward = staticmethod(_mix_backward)


def _setup_project_and_mix(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: 1 + COUNT])
    # The CPU's is the only backend behind this operator.
    eps_q, eps_k = inputs[1 + COUNT : 3 + COUNT]
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
    lib=schema.library,
)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[: 2 + COUNT], inputs[-6])
    ctx.settings = Settings(*inputs[2 + COUNT : -6])
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
    differentiable = ctx.needs_input_grad[: 2 + COUNT]
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
    "casvit_kernels::mix_backward",
    _second_backward,
    setup_context=_setup_second,
    lib=schema.library,
)
