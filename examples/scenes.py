"""Scenes of handwritten digits with a label for every pixel: real strokes, for dense examples.

python examples/scenes.py DIR --count 12

scikit-learn's digits (8x8 pixels) at random scales and places, bright on a textured background. Label 0
is background, 1 to 10 are the digits 0 to 9. A scene is made from (seed, part, index) alone: the same on
every machine, in any order. Test scenes show digits that no training scene shows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from casvit_kernels._optional import need

CLASSES = 11
INK = 0.35  # a pixel belongs to a digit where the digit covers at least so much of it
PARTS = ("train", "test")
HIDDEN = 0.3  # of a digit's ink may lie under those drawn after it


@dataclass(frozen=True)
class Scenes:
    """A map from index to scene.

    Attributes:
        part: ``"train"`` or ``"test"``: three quarters of the digits, or the other quarter.
        size: ``(H, W)`` in pixels.
        seed: scenes of other seeds are others, of the same digits.
        digits: at least and at most so many in a scene; fewer where there is no room.
        scale: the least and the largest side of a digit, in pixels.
        hidden: of a digit's ink at most this part may lie over that of others.
    """

    part: str
    size: tuple[int, int] = (112, 112)
    seed: int = 0
    digits: tuple[int, int] = (2, 5)
    scale: tuple[int, int] = (28, 64)
    hidden: float = HIDDEN

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part: expected 'train' or 'test', got {self.part!r}")
        if not 8 <= self.scale[0] <= self.scale[1] <= min(self.size):
            raise ValueError(
                f"scale: expected 8 <= least <= largest <= {min(self.size)}, got {self.scale}"
            )
        if not 0 <= self.digits[0] <= self.digits[1]:
            raise ValueError(f"digits: expected 0 <= least <= most, got {self.digits}")

    def scene(self, index: int) -> tuple[Tensor, Tensor]:
        """Pixels ``(1, H, W)``, float32 in [0, 1], and labels ``(H, W)``, int64."""
        pixels, labels, _, _ = self.objects(index)
        return pixels, labels

    def objects(self, index: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """As `scene`, and which digit each pixel belongs to.

        Returns:
            Pixels and labels; ``(H, W)`` int64 with 0 for background and n for the n-th digit drawn;
            the labels of the digits. Of a digit under others some or all pixels are missing.
        """
        random = numpy.random.default_rng((self.seed, PARTS.index(self.part), index))
        images, names = handwritten(self.part)
        pixels = _texture(self.size, random)
        numbers = torch.zeros(self.size, dtype=torch.int64)
        drawn = [0]
        for _ in range(random.integers(self.digits[0], self.digits[1] + 1)):
            number = int(random.integers(len(images)))
            side = int(random.integers(self.scale[0], self.scale[1] + 1))
            top, left = (int(random.integers(n - side + 1)) for n in self.size)
            cover = _scaled(images[number][None, None], (side, side))[0, 0].clamp(0, 1)
            place = slice(top, top + side), slice(left, left + side)
            inked = cover >= INK
            if (numbers[place][inked] > 0).float().mean() > self.hidden:
                continue
            brightness = 0.7 + 0.3 * float(random.random())
            pixels[place] = pixels[place] * (1 - cover) + brightness * cover
            numbers[place] = torch.where(inked, len(drawn), numbers[place])
            drawn.append(int(names[number]) + 1)
        noise = torch.from_numpy(random.standard_normal(self.size, dtype=numpy.float32))
        pixels = (pixels + 0.04 * noise).clamp(0, 1)[None]
        return pixels, torch.tensor(drawn)[numbers], numbers, drawn[1:]

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Scenes ``first`` to ``first + count - 1``: ``(count, 1, H, W)`` and ``(count, H, W)``."""
        found = [self.scene(index) for index in range(first, first + count)]
        return torch.stack([x for x, _ in found]), torch.stack([y for _, y in found])


@lru_cache(maxsize=2)
def handwritten(part: str) -> tuple[Tensor, Tensor]:
    """A part's digits: ``(count, 10, 10)`` in [0, 1], with a border, and ``(count,)`` from 0 to 9."""
    digits = need("sklearn.datasets").load_digits()
    split: Any = need("sklearn.model_selection").train_test_split
    chosen = split(
        numpy.arange(len(digits.images)), test_size=0.25, random_state=0, stratify=digits.target
    )[PARTS.index(part)]
    return (
        F.pad(torch.from_numpy(digits.images[chosen] / 16).float(), (1, 1, 1, 1)),
        torch.from_numpy(digits.target[chosen]),
    )


def _texture(size: tuple[int, int], random: numpy.random.Generator) -> Tensor:
    """Noise of four scales, darker than any digit."""
    out = torch.zeros(size)
    for cells in (3, 6, 14, 28):
        coarse = torch.from_numpy(random.random((1, 1, cells, cells), dtype=numpy.float32))
        out += float(random.random()) * _scaled(coarse, size)[0, 0]
    return 0.5 * (out - out.min()) / (out.max() - out.min()).clamp(min=1e-6)


def _scaled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bicubic", align_corners=False)


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--count", type=int, default=12, help="scenes (12)")
    parser.add_argument("--part", choices=PARTS, default="train")
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    scenes = Scenes(options.part)
    for index in range(options.count):
        pixels, labels = scenes.scene(index)
        for name, picture in (("scene", pixels[0] * 255), ("labels", labels * 24)):
            image = Image.fromarray(picture.numpy().astype("uint8"))
            image.save(options.root / f"{index:04}-{name}.png")


if __name__ == "__main__":
    main()
