"""Mixers with weights that hide nothing, and what float64 says they compute."""

import copy

import torch
from torch import nn

from casvit_kernels import AdditiveTokenMixer

CHILDREN = ("qkv", "oper_q", "oper_k", "dwc", "proj", "proj_drop")


def filled(mixer, seed=0):
    """Give a mixer random weights of order 1 and random running statistics; returns it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(t):
        return torch.randn(t.shape, generator=generator)

    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(normal(p) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.5))
        for m in mixer.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                if m.affine:
                    m.weight.add_(1.0)
                if m.track_running_stats:
                    m.running_mean.copy_(0.3 * normal(m.running_mean))
                    m.running_var.copy_(0.5 + normal(m.running_var).square())
    return mixer


def plain_copy(mixer, dtype=torch.float64):
    """The same weights, norms and mode in the plain mixer."""
    plain = AdditiveTokenMixer(mixer.qkv.in_channels)
    for name in CHILDREN:
        setattr(plain, name, copy.deepcopy(getattr(mixer, name)))
    plain.training = mixer.training
    return plain.to(dtype)


def assert_right(mixer, x, tolerance=1e-5):
    """The mixer computes what its weights say, in float32; returns the output."""
    with torch.no_grad():
        expected = plain_copy(mixer)(x.double())
        out = mixer(x)
    error = (out.double() - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), f"error {error:.3g}"
    return out
