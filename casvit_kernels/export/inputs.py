"""Inputs of an exported model: normalisation, random input, photographs at its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..photographs import MEAN, STD


@dataclass(frozen=True)
class Normalization:
    """``(pixel / top - mean) / std`` by channel, done inside the file; its input is 0 to ``top``.

    Args:
        mean: of each channel, in [0, 1]; ImageNet's.
        std: as many, above 0.
        top: the value of a white pixel: 1, or 255.

    Raises:
        ValueError: numbers of means and deviations differ, or a deviation or ``top`` is not above 0.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    top: float = 1.0

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(*self.std, self.top) <= 0:
            raise ValueError(
                "normalize: expected as many means as standard deviations, these and top above 0, "
                f"got {self.mean}, {self.std} and {self.top}"
            )


def resized(
    pixels: Tensor, size: tuple[int, ...] | torch.Size, normalize: Normalization | None
) -> Tensor:
    """uint8 ``(N, h, w, 3)`` to the model's input ``(N, 3, H, W)``, float32.

    Normalised as in the published training, or 0 to ``normalize.top`` where the file does that.
    """
    x = pixels.permute(0, 3, 1, 2).float() / 255
    if tuple(x.shape[2:]) != tuple(size):
        x = F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True)
    if normalize is not None:
        return (x * normalize.top).contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((x - mean) / std).contiguous()


def noise(shape: tuple[int, ...], normalize: Normalization | None) -> Tensor:
    """Random float32 input, the same in every call; within the range of pixels if normalised inside."""
    generator = torch.Generator().manual_seed(0)
    if normalize is None:
        return torch.randn(shape, generator=generator)
    return torch.rand(shape, generator=generator) * normalize.top
