"""Whether a call of the mixer comes to the CPU's operator and packed weights that are there already.

`FusedCATM.forward` finds that out step by step, for every kind of call, in 20 to 60 us; here the same
questions are asked at once, of what is there now, in C where possible. Nothing is remembered beside the
packed weights, and nothing is refused: whatever is not plainly so goes the long way.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .backends import first_choice
from .functional import exporting, transformed
from .packing import PackedWeights

_Modules = tuple[Any, ...]

# Where the weights of `reference.MixerWeights`, flat, lie in the modules that own them.
_PAIR = ("weight", "bias")
_GATE = (*_PAIR, *_PAIR, "running_mean", "running_var", "weight", "weight")
_NAMES = (*_PAIR, *_GATE, *_GATE, *_PAIR, *_PAIR)
_STORES = tuple("_buffers" if "running" in name else "_parameters" for name in _NAMES)

_pre_hooks = operator.attrgetter("_forward_pre_hooks")
_hooks = operator.attrgetter("_forward_hooks")


def find(
    x: Any,
    backend: str | None,
    ends: _Modules,
    q: _Modules,
    k: _Modules,
    dropout: Any,
    weights: PackedWeights,
) -> Tensor | None:
    """The packed weights with which the operator ``cpu_infer`` is all of this call, or None.

    Args:
        x, backend: as for `casvit_kernels.catm`; x unchecked.
        ends: qkv, dwc, proj.
        q, k: of each gate depthwise convolution, norm, spatial and channel convolution.
        weights: what the mixer has packed.
    """
    if not (type(x) is Tensor and x.is_cpu and _unobserved() and first_choice(backend) == "cpu"):
        return None
    shape = x.shape
    if len(shape) != 4 or 0 in shape:
        return None
    qkv, dwc, proj = ends
    depthwise_q, norm_q, *products_q = q
    depthwise_k, norm_k, *products_k = k
    if norm_q.training or norm_k.training or dropout.training:
        return None
    modules = (*ends, *q, *k)
    if any(map(_hooks, modules)) or any(map(_pre_hooks, modules)):
        return None
    owners = (
        *(qkv, qkv),
        *(depthwise_q, depthwise_q, norm_q, norm_q, norm_q, norm_q, *products_q),
        *(depthwise_k, depthwise_k, norm_k, norm_k, norm_k, norm_k, *products_k),
        *(dwc, dwc, proj, proj),
    )
    sources = map(operator.getitem, map(getattr, owners, _STORES), _NAMES)
    try:
        packed = weights.at_hand("cpu", sources, (norm_q.eps, norm_k.eps), x.dtype)
    except KeyError:  # a weight that is computed from others
        return None
    if packed is None:
        return None
    weight = qkv._parameters["weight"]
    fits = weight.dtype is x.dtype and weight.shape == (3 * shape[1], shape[1], 1, 1)
    return packed if fits else None


def _unobserved() -> bool:
    """Whether nobody but the caller sees what is done: no gradients, tracer, mode or transform."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or transformed()
        or exporting()
    )
