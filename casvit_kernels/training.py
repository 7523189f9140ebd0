"""The mixer's training step: `mix_training` and `mix_backward`, once for all backends.

A backend supplies the phases (`backends.base.Phases`); here they are joined by algebra on vectors, and
here BatchNorm's sums are reduced over processes. Source: arXiv 2408.03703, section 3.2, and the
gradients of its formulas; the symbols are those of `Phases`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import get
from .backends.base import Phases, WholeStep
from .ops import Saved, Settings
from .reference import GateWeights, MixerWeights


def forward(x: Tensor, w: MixerWeights, s: Settings) -> tuple[Tensor, Saved]:
    """The whole mixer; see `ops.mix_training`.

    Raises:
        RuntimeError: the backend has no phases of training.
    """
    phases, gates, batch = _phases(s.backend), (w.q, w.k), (s.batch_q, s.batch_k)
    dtype, eps = s.dtype or x.dtype, (s.eps_q, s.eps_k)
    images, channels, height, width = x.shape
    number = torch.full((), images * height * width, dtype=torch.float64, device=x.device)
    if images and not s.group and isinstance(phases, WholeStep):
        out, statistics, *saved = phases.forward(x, w, eps, batch, dtype)
        return out, Saved(statistics, number, *saved)
    statistics = torch.zeros((2, 2, channels), dtype=torch.float32, device=x.device)
    if images:
        qkv = phases.project(x, w, dtype)
        if True in batch:
            statistics = phases.statistics(x, qkv, w)
    if True in batch and s.group:
        own = images * height * width
        statistics, number = _merge(statistics, number, s.group, one=own <= 1)
    for used, gate, own in zip(statistics, gates, batch, strict=True):
        if not own:
            torch.stack([gate.norm_mean, gate.norm_var], out=used)  # type: ignore[list-item]
    if images:
        out, *saved = phases.mix(x, qkv, w, statistics, eps, dtype)
    else:
        out = ops.empty_output(x, dtype)
        saved = [statistics.new_empty(n) for n in ((0, 2, height, width), *[(2, 0, channels)] * 2)]
    return out, Saved(statistics, number, *saved)


def backward(
    grad: Tensor, x: Tensor, w: MixerWeights, s: Settings, saved: Saved, needed: list[bool]
) -> list[Tensor]:
    """The gradients of x and of each weight that are needed, those alone; see `ops.mix_backward`."""
    phases = _phases(s.backend)
    if x.shape[0] and not s.group and isinstance(phases, WholeStep):
        eps, batch, small = (s.eps_q, s.eps_k), (s.batch_q, s.batch_k), (saved[0], *saved[2:])
        found = phases.backward(grad, x, w, eps, batch, s.dtype or x.dtype, small, needed)
    else:
        grad = grad.contiguous(memory_format=ops.output_memory_format(x))
        found = _backward_by_phases(phases, grad, x, w, s, saved, needed)
    of_x = [found[0].to(x.dtype)] if needed[0] else []
    weights = [t for t, n in zip(ops.flatten(w), needed[1:], strict=True) if n]
    return of_x + [_like(g, t) for g, t in zip(found[len(of_x) :], weights, strict=True)]


def _backward_by_phases(
    phases: Phases,
    grad: Tensor,
    x: Tensor,
    w: MixerWeights,
    s: Settings,
    saved: Saved,
    needed: list[bool],
) -> list[Tensor]:
    need: MixerWeights = ops.unflatten(needed[1:])
    gates = (need.q, need.k)
    project = (needed[0], bool(need.qkv_weight), bool(need.qkv_bias))
    depthwise = any(project) or any(g.depthwise_weight or g.depthwise_bias for g in gates)
    gate = depthwise or any(g.spatial_weight or g.norm_weight or g.norm_bias for g in gates)
    reduced = depthwise and s.group != "" and (s.batch_q or s.batch_k)
    if x.shape[0] == 0:
        if reduced:  # the other processes wait for it
            _all_reduce(torch.zeros((2, 2, x.shape[1]), device=x.device), s.group)
        return [g.zero_() for g in ops.empty_gradients(x, ops.flatten(w), needed)]

    eps = (s.eps_q, s.eps_k)
    statistics, number, spatial, pooled, channel = saved
    qkv = phases.project(x, w, s.dtype or x.dtype)
    combined = phases.backward_combine(grad, x, qkv, w, spatial, channel)
    by_logit = combined.channel * channel * (1 - channel)
    pairs: dict[str, Sequence[Tensor] | Tensor] = {}
    if need.q.channel_weight or need.k.channel_weight:
        pairs["channel_weight"] = [b.t() @ p for b, p in zip(by_logit, pooled, strict=True)]
    if gate:
        weights = (g.channel_weight.flatten(1).float() for g in (w.q, w.k))
        shift = torch.stack([b @ c for b, c in zip(by_logit, weights, strict=True)])
        shift /= x.shape[2] * x.shape[3]
        gated = phases.backward_gate(x, qkv, w, statistics, eps, spatial, combined.pixel, shift)
        sums = gated.sums
        pairs["spatial_weight"] = gated.spatial_weight
        pairs["norm_bias"], pairs["norm_weight"] = sums.unbind(1)
    if depthwise:
        if reduced:
            sums = sums.clone()  # the norms' own gradients stay those of this process
            _all_reduce(sums, s.group)
        pairs["depthwise_weight"], pairs["depthwise_bias"] = phases.backward_depthwise(
            x,
            qkv,
            w,
            statistics,
            eps,
            spatial,
            channel,
            shift,
            gated.logit,
            _coefficients(w, statistics, s, sums, number),
            combined.grad_sum,
            combined.grad_qkv,
        )
    grad_x, *of_qkv = (
        phases.project_backward(combined.grad_qkv, x, w, project) if any(project) else (None,) * 3
    )
    q, k = ([pairs[f][i] if f in pairs else None for f in GateWeights._fields] for i in range(2))
    found: tuple[Any, ...] = (*of_qkv, *q, *k, *combined[4:])
    return [_alone(g) for g, n in zip((grad_x, *found), needed, strict=True) if n]


def update_running(
    running: tuple[Tensor, Tensor], batch: Tensor, number: Tensor | int, momentum: float | Tensor
) -> None:
    """Move the running mean and variance towards those of a batch, in place, as nn.BatchNorm does.

    Args:
        running: mean and variance, ``(C,)``.
        batch: mean and biased variance, ``(2, C)``; the variance is made unbiased here.
        number: how many values of each channel they are taken over, ``()`` if a tensor.
        momentum: weight of the batch; 1 / n for an average over n batches.
    """
    mean, var = batch
    for old, new in zip(running, (mean, var * (number / (number - 1))), strict=True):
        if old.dtype is torch.float32:
            old.lerp_(new, momentum)
        else:
            old.copy_(old.float().lerp(new, momentum))


def _phases(backend: str) -> Phases:
    phases = get(backend).phases
    if phases is None:
        raise RuntimeError(f"backend={backend!r} has no training kernels")
    return phases


# A gradient may be a part of a tensor that another one shares; an operator's outputs may not.
def _alone(t: Tensor) -> Tensor:
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def _like(grad: Tensor, weight: Any) -> Tensor:
    """The gradient in the shape, dtype and strides of the weight; see `ops.empty_gradients`."""
    alike = grad.dtype is weight.dtype and grad.shape == weight.shape
    if alike and grad.stride() == weight.stride():
        return grad
    grad = grad.to(weight.dtype)
    if weight.is_contiguous():
        return grad.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight).copy_(grad.reshape(weight.shape))


def _coefficients(
    w: MixerWeights, statistics: Tensor, s: Settings, sums: Tensor, number: Tensor
) -> Tensor:
    """(2, 3, C): the gradient at d is c0 gn + c1 + c2 n^."""
    rows = []
    for i, (gate, eps, batch) in enumerate(((w.q, s.eps_q, s.batch_q), (w.k, s.eps_k, s.batch_k))):
        scale = (statistics[i, 1] + eps).rsqrt()
        if gate.norm_weight is not None:
            scale = scale * gate.norm_weight
        rest = sums[i] * (-scale / number) if batch else torch.zeros_like(sums[i])
        rows.append(torch.cat([scale[None], rest]))
    return torch.stack(rows)


# Between processes, as torch.nn.SyncBatchNorm.


def _merge(statistics: Tensor, number: Tensor, group: str, one: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all processes, each with a number of its own, and their number.

    one: whether the processes may have one value together; to look waits for the device.
    """
    mean, var = statistics.double().unbind(1)
    own = torch.stack([number.expand_as(mean), mean, var])
    every = [torch.empty_like(own) for _ in range(_distributed().get_world_size(_group(group)))]
    _distributed().all_gather(every, own, _group(group))
    counts, means, variances = torch.stack(every, 1)  # each (processes, 2, C)
    total = counts.sum(0)[0, 0]
    if one and total == 1:  # on every process alike
        raise ValueError(
            "x: expected more than 1 value per channel over all processes when training, got 1"
        )
    parts = counts / total.clamp(min=1)  # all may be empty
    mean = (parts * means).sum(0)
    var = (parts * (variances + (means - mean).square())).sum(0)
    return torch.stack([mean, var], 1).float(), total


def _all_reduce(sums: Tensor, group: str) -> None:
    _distributed().all_reduce(sums, group=_group(group))


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed


def _group(name: str) -> Any:
    return _distributed().distributed_c10d._resolve_process_group(name)


# The two operators, for tensors of any device: to a compiler they are opaque.


def _mix_training(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    n = len(rest) - len(Settings._fields)
    out, saved = forward(x, ops.unflatten(rest[:n]), Settings(*rest[n:]))
    return (out, *saved)


def _mix_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    *rest, needed = rest  # type: ignore[assignment]
    m = len(rest) - len(Saved._fields)
    n = m - len(Settings._fields)
    weights, settings, saved = ops.unflatten(rest[:n]), Settings(*rest[n:m]), Saved(*rest[m:])
    return backward(grad, x, weights, settings, saved, needed)


ops.implement("mix_training", _mix_training)
ops.implement("mix_backward", _mix_backward)
