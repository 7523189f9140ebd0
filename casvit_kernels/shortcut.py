"""Recognises the most frequent call: all of it is the CPU's operator, with weights packed earlier.

`FusedCATM.forward` asks the same questions one by one for calls of every kind, which takes as long as
the smallest of these take to compute. Here they are asked at once, in C where possible, each anew in
each call, and nothing is refused: where an answer is not the plain one, the call goes the long way.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .backends import first_choice
from .functional import transformed
from .packing import Entry, PackedWeights

_Modules = tuple[Any, ...]

# The fields of `reference.MixerWeights`, flat: their names in the modules that own them, and where.
_PAIR = ("weight", "bias")
_GATE = (*_PAIR, *_PAIR, "running_mean", "running_var", "weight", "weight")
_NAMES = (*_PAIR, *_GATE, *_GATE, *_PAIR, *_PAIR)
_STORES = tuple("_buffers" if "running" in name else "_parameters" for name in _NAMES)

_hooks = operator.attrgetter("_forward_hooks")
_pre_hooks = operator.attrgetter("_forward_pre_hooks")


def find(
    x: Any,
    backend: str | None,
    ends: _Modules,
    q: _Modules,
    k: _Modules,
    dropout: Any,
    weights: PackedWeights,
) -> Entry | None:
    """The packed weights with which `backends.cpu.infer` is the whole call, else None.

    To be held until it returns: it reads the weights themselves, too, which another thread may replace.

    Args:
        x, backend: as for `casvit_kernels.catm`; not checked yet.
        ends: the modules qkv, dwc, proj.
        q, k: of each gate the depthwise convolution, norm, spatial and channel convolution.
        weights: what the mixer has packed.
    """
    if (
        torch.is_grad_enabled()
        # Whoever else follows what is done, or changes it (first: they shall not see what x is asked)
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or transformed()
        or not (type(x) is Tensor and x.is_cpu and x.dim() == 4 and x.numel())
        or first_choice(backend) != "cpu"
    ):
        return None
    (qkv, dwc, proj), (dq, nq, sq, cq), (dk, nk, sk, ck) = ends, q, k
    modules = (*ends, *q, *k)
    of_gates = (dq, dq, nq, nq, nq, nq, sq, cq, dk, dk, nk, nk, nk, nk, sk, ck)
    owners = (qkv, qkv, *of_gates, dwc, dwc, proj, proj)
    try:
        if (
            nq.training
            or nk.training
            or dropout.training
            or any(map(_hooks, modules))
            or any(map(_pre_hooks, modules))
        ):
            return None
        sources = map(operator.getitem, map(getattr, owners, _STORES), _NAMES)
        entry = weights.at_hand("cpu", sources, (nq.eps, nk.eps), x.dtype)
    except (AttributeError, KeyError):  # a child is missing, a weight computed from others
        return None
    if entry is None:
        return None
    weight, channels = qkv._parameters["weight"], x.shape[1]
    fits = weight.dtype is x.dtype and weight.shape == (3 * channels, channels, 1, 1)
    return entry if fits else None
