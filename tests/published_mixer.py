"""Two stand-ins for somebody's copy of the published mixer, written apart from the package.

Same children, keys and arithmetic as `casvit_kernels.AdditiveTokenMixer`; other class names and
another way of writing the forward. `fuse` must recognise both.
"""

import torch
from torch import nn


class PixelGate(nn.Module):
    def __init__(self, width):
        super().__init__()
        spread = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        squeeze = nn.Conv2d(width, 1, kernel_size=1, bias=False)
        layers = [spread, nn.BatchNorm2d(width), nn.ReLU(True), squeeze, nn.Sigmoid()]
        self.block = nn.Sequential(*layers)

    def forward(self, maps):
        return self.block(maps) * maps


class FeatureGate(nn.Module):
    def __init__(self, width):
        super().__init__()
        mix = nn.Conv2d(width, width, kernel_size=1, bias=False)
        self.block = nn.Sequential(nn.AdaptiveAvgPool2d(1), mix, nn.Sigmoid())

    def forward(self, maps):
        return self.block(maps) * maps


class CopiedMixer(nn.Module):
    def __init__(self, dim=512, attn_bias=False, proj_drop=0.0):
        super().__init__()
        self.qkv = nn.Conv2d(dim, dim * 3, kernel_size=1, bias=attn_bias)
        for letter in "qk":
            setattr(self, f"oper_{letter}", nn.Sequential(PixelGate(dim), FeatureGate(dim)))
        for name in ("dwc", "proj"):
            setattr(self, name, nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim))
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, maps):
        query, key, value = torch.chunk(self.qkv(maps), 3, 1)
        context = self.dwc(self.oper_q(query) + self.oper_k(key))
        return self.proj_drop(self.proj(context * value))


class _Gate(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, t):
        factor = t
        for layer in self.block:
            factor = layer(factor)
        return torch.mul(t, factor)


class RewrittenMixer(nn.Module):
    """The same numbers by another route: split, explicit loops, sums in another order."""

    def __init__(self, channels, qkv_bias=False, drop=0.0):
        super().__init__()
        self.channels = channels

        def depthwise():
            return nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)

        def gates():
            return nn.Sequential(
                _Gate(
                    depthwise(),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.Conv2d(channels, 1, 1, bias=False),
                    nn.Sigmoid(),
                ),
                _Gate(
                    nn.AdaptiveAvgPool2d((1, 1)),
                    nn.Conv2d(channels, channels, 1, bias=False),
                    nn.Sigmoid(),
                ),
            )

        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=qkv_bias)
        self.oper_q = gates()
        self.oper_k = gates()
        self.dwc = depthwise()
        self.proj = depthwise()
        self.proj_drop = nn.Dropout(drop)

    def forward(self, t):
        q, k, v = self.qkv(t).split(self.channels, dim=1)
        for operation in self.oper_k:
            k = operation(k)
        for operation in self.oper_q:
            q = operation(q)
        return self.proj_drop(self.proj(v * self.dwc(k + q)))


class Net(nn.Module):
    """A small network with two mixers in it, for training and state-dict tests."""

    def __init__(self, mixer=CopiedMixer, dim=4, depth=2, classes=3, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 3, 2, 1)
        self.blocks = nn.Sequential(*(Block(mixer(dim, **options), dim) for _ in range(depth)))
        self.head = nn.Linear(dim, classes)

    def forward(self, images):
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, attn, dim):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.attn = attn

    def forward(self, t):
        return t + self.attn(self.norm(t))
