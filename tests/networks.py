"""Small CAS-ViT networks as after training, one as somebody else writes it, and what float64 says."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from published_mixer import CopiedMixer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casvit_kernels.models import Config, RCViT
from casvit_kernels.testing.numerics import errors_of, judge

TINY = Config((1, 1, 2, 1), (8, 12, 16, 20))


def tiny(config: Config = TINY, **options: Any) -> RCViT:
    """A network in eval mode; every weight and statistic is drawn, none is 0 or 1."""
    return trained(RCViT(config, **{"num_classes": 5, **options}))


def trained(model: Any, seed: int = 0) -> Any:
    """Statistics, norms and biases as after training, so that folding them is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, _BatchNorm):
                if m.running_mean is not None:
                    m.running_mean.normal_(0, 0.3, generator=generator)
                    m.running_var.uniform_(0.5, 2, generator=generator)
                if m.affine:
                    m.weight.uniform_(0.5, 1.5, generator=generator)
                    m.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(m, nn.Linear):
                m.weight.normal_(0, 0.3, generator=generator)
                m.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


def flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def assert_right(net: nn.Module, model: nn.Module, x: Tensor, wide: Tensor | None = None) -> Any:
    """As near to float64 as the parity suite asks; returns the outputs.

    wide: what the model takes in float64, where that is not x itself.
    """
    truth = copy.deepcopy(model).double()
    with torch.no_grad():
        wide = x.double() if wide is None else wide
        plain = wide.float()
        expected, got = flat(truth(wide)), net(x)
        # Of few outputs one draw of PyTorch's error is luck: three, of other orders of sums.
        draws = [plain, plain.contiguous(memory_format=torch.channels_last)]
        owns = [flat(model(each)) for each in draws]
        owns.append(
            list(map(torch.cat, zip(*(flat(model(each)) for each in plain.split(1)), strict=True)))
        )
        assert type(got) is type(model(plain))
    assert len(flat(got)) == len(expected)
    for g, t, *own in zip(flat(got), expected, *owns, strict=True):
        assert g.shape == t.shape
        assert g.dtype == torch.float32
        errors = [errors_of(o, t) for o in own]
        judged = judge("output", g, t, errors, torch.float32, t.shape[1])
        assert not judged.failures, judged.failures
    return got


class Hall(nn.Module):
    """A block with residuals in place, and everything named otherwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        around = nn.Conv2d(width, width, 3, padding="same", groups=width)
        self.near = nn.ModuleList(
            [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), around, nn.GELU()]
        )
        self.last = nn.Conv2d(width, width, 1)
        self.a, self.b = nn.BatchNorm2d(width, eps=1e-3), nn.BatchNorm2d(width)
        self.mix = CopiedMixer(width, True, 0.1)
        self.up, self.down = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(3 * width, width, 1)
        self.lost = nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.near:
            y = layer(y)
        x = torch.add(x, self.last(y))
        x += self.lost(self.mix(self.a(x)))
        return self.down(nn.functional.gelu(self.up(self.b(x)))).add_(x)


class Elsewhere(nn.Module):
    """Three stages as somebody else might write them, and the mean of three heads."""

    def __init__(self, channels: int = 4, widths: tuple[int, ...] = (8, 10, 12)) -> None:
        super().__init__()
        half = widths[0] // 2
        self.c1, self.n1 = nn.Conv2d(channels, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half)
        self.c2, self.n2 = (
            nn.Conv2d(half, widths[0], 3, 2, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
        )
        self.halls = nn.ModuleList([Hall(width) for width in widths])
        self.doors = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.SyncBatchNorm(b))
                for a, b in itertools.pairwise(widths)
            ]
        )
        self.judges = nn.ModuleList([nn.Linear(widths[-1], 6) for _ in range(2)])
        self.third = nn.Conv2d(widths[-1], 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n1(self.c1(x)))
        x = nn.functional.relu(self.n2(self.c2(x)), inplace=True)
        for index, hall in enumerate(self.halls):
            x = hall(x)
            if index < len(self.doors):
                x = self.doors[index](x)
        pooled = x.flatten(2).mean(-1)
        third = self.third(nn.functional.adaptive_avg_pool2d(x, 1)).flatten(1)
        return (self.judges[0](pooled) * 0.5 + self.judges[1](pooled) + third) / 3
