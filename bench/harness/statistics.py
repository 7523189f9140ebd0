"""BatchNorm statistics of a network that was never trained."""

from __future__ import annotations

import torch
from torch import nn


def randomise_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm statistics as after training, so that folding them is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(0.0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return module
