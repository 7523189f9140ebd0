"""Scenes of handwritten digits as data for dense tasks: a small real data set that needs no download."""

from __future__ import annotations

from typing import Any

import torch
from scenes import Scenes
from torch import Tensor

SIDE = 96  # pixels
LEAST = 16  # pixels that show of a digit for it to count
NAMES = [str(digit) for digit in range(10)]


class DigitScenes:
    """``count`` scenes; of a part other than "train" digits that no training scene shows."""

    def __init__(self, part: str, count: int, seed: int) -> None:
        self.root = f"digits ({part})"
        self._scenes = Scenes(part, (SIDE, SIDE), seed, (2, 6), (28, 40), 0.02)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Image ``(3, H, W)`` uint8, labels and numbers ``(H, W)``, labels of the digits from 1."""
        pixels, labels, numbers, drawn = self._scenes.objects(index)
        return (pixels * 255).round().byte().expand(3, -1, -1), labels, numbers, drawn


class LabelledScenes(DigitScenes):
    """For segmentation: class 0 is background, class n the digit n - 1."""

    classes = ("background", *NAMES)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels, _, _ = self.image(index)
        return image, labels


class DetectedScenes(DigitScenes):
    """For detection: label n is the digit n - 1."""

    classes = tuple(NAMES)

    def load(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image, _, numbers, drawn = self.image(index)
        masks = [numbers == number for number in range(1, len(drawn) + 1)]
        shown = [n for n, mask in enumerate(masks) if int(mask.sum()) >= LEAST]
        boxes = torch.zeros(len(shown), 4)
        for row, n in enumerate(shown):
            ys, xs = torch.where(masks[n])
            boxes[row] = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        kept = [masks[n] for n in shown]
        target = {
            "boxes": boxes,
            "labels": torch.tensor([drawn[n] for n in shown], dtype=torch.int64),
            "masks": torch.stack(kept).byte() if kept else torch.zeros(0, SIDE, SIDE).byte(),
            "crowd": torch.zeros(len(shown), dtype=torch.bool),
        }
        return image, target
