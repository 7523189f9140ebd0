"""Which norms in a gate the kernels compute: BatchNorms, frozen ones, and the Identity of a folded one.

May import: torch, weights.py.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .weights import BUFFERS

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
EPS_OF_IDENTITY = 1e-30  # lost when it is added to the variance 1; torch 2.11 refuses 0
_FROZEN_BUFFERS = ("weight", "bias", *BUFFERS)
_KNOWN_ATTRIBUTES = {*vars(nn.Module()), "eps", "num_features"}

_frozen_classes: dict[type[nn.Module], bool] = {}


def is_frozen(norm: Any) -> bool:
    """Whether this is a BatchNorm whose weights and statistics are buffers, as torchvision's and timm's.

    A class is known by its buffers and, once, by what it computes, with one `eps` and with another; an
    instance may have no other attributes. Where a compiler asks about a class that is not known yet the
    answer is no.
    """
    if norm._parameters or norm._modules:
        return False
    for name in _FROZEN_BUFFERS:
        if norm._buffers.get(name) is None:
            return False
    for name in norm.__dict__:
        if name not in _KNOWN_ATTRIBUTES:
            return False
    kind = type(norm)
    if kind not in _frozen_classes:
        if torch.compiler.is_compiling():
            return False
        _frozen_classes[kind] = _computes_batch_norm(norm)
    return _frozen_classes[kind]


def _computes_batch_norm(norm: nn.Module) -> bool:
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        probe = copy.copy(norm)
        generator = torch.Generator(device="cpu").manual_seed(0)
        mean, bias, var, weight = torch.rand(4, 3, dtype=torch.float64, generator=generator)
        probe._buffers = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
        try:
            for mode in (True, False):
                if "eps" in vars(probe):
                    vars(probe)["eps"] = 0.25 + mode
                eps = eps_of(probe)
                expected = nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
                found = probe.train(mode).forward(x)
                if not torch.allclose(found, expected, rtol=0, atol=1e-9):
                    return False
        except Exception:  # whatever somebody's forward raises
            return False
    return True


def eps_of(norm: Any) -> float:
    """The epsilon of a norm; DETR's frozen one has it in its forward alone."""
    if type(norm) is nn.Identity:
        return EPS_OF_IDENTITY
    eps: float = getattr(norm, "eps", 1e-5)
    return eps
