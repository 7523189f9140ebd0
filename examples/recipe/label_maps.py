"""Images with label maps in the folder layouts of ADE20K and PASCAL VOC, and their augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from casvit_kernels._optional import need

from .data import Unreadable
from .problem import Problem
from .stream import read_image

IGNORED = 255
IMAGES = (".jpg", ".jpeg", ".png")
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


class LabelMaps:
    """Pairs of an image and a label map, nothing opened yet.

    Args:
        root: in messages.
        pairs: their paths.
        classes: names.
        from_one: labels in the files begin with 1, and 0 is ignored.
    """

    def __init__(
        self, root: Path, pairs: list[tuple[Path, Path]], classes: Sequence[str], from_one: bool
    ) -> None:
        if not pairs:
            raise Problem(f"{root}: expected images with label maps, got none")
        self.root, self._pairs = root, pairs
        self.classes = tuple(classes)
        self._from_one = from_one

    def __len__(self) -> int:
        return len(self._pairs)

    def load(self, index: int) -> tuple[Tensor, Tensor] | Unreadable:
        """Image ``(3, H, W)`` uint8 and labels ``(H, W)`` int64, `IGNORED` where there is none."""
        from PIL import Image

        path, label_path = self._pairs[index]
        image = read_image(path)
        if isinstance(image, Unreadable):
            return image
        try:
            with Image.open(label_path) as file:
                if file.mode not in ("L", "P", "I", "I;16", "1"):
                    return Unreadable(
                        f"{label_path}: expected a label map (one number a pixel), got {file.mode}"
                    )
                labels = torch.from_numpy(np.array(file).astype(np.int64))
        except Exception as error:  # what a damaged file makes the decoder raise can be anything
            return Unreadable(f"{label_path}: expected a label map, got: {error}")
        if labels.shape != image.shape[1:]:
            return Unreadable(
                f"{label_path}: expected the size of its image, {image.shape[2]}x{image.shape[1]}, "
                f"got {labels.shape[1]}x{labels.shape[0]}"
            )
        if self._from_one:
            labels = torch.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
        known = (labels < len(self.classes)) | (labels == IGNORED)
        if not known.all():
            shift = int(self._from_one)
            found = ", ".join(map(str, (labels[~known].unique()[:5] + shift).tolist()))
            return Unreadable(
                f"{label_path}: expected label ids of the {len(self.classes)} classes "
                f"({shift} to {len(self.classes) - 1 + shift}) or {IGNORED}, got {found}"
            )
        return image, labels


def folder(root: Path, part: str, layout: str, classes: Path | int | None) -> LabelMaps:
    """The images of a part, "train" or "val".

    Args:
        layout: "ade20k" (``images/training``, ``annotations/training``, ``.../validation``), "voc"
            (``JPEGImages``, ``SegmentationClass``, ``ImageSets/Segmentation/<part>.txt``) or "auto".
        classes: a file with a name in each line, or how many; None for the layout's own.

    Raises:
        Problem: it is no such folder, or an image lacks its label map.
    """
    if not root.is_dir():
        raise Problem(f"--data: expected a folder or digits, got {root}, which is no directory")
    if layout == "auto":
        layouts = {"ade20k": "annotations", "voc": "SegmentationClass"}
        found = [name for name, child in layouts.items() if (root / child).is_dir()]
        if len(found) != 1:
            raise Problem(
                f"--data: {root}: expected the layout of ADE20K (images/, annotations/) or VOC "
                f"(JPEGImages/, SegmentationClass/, ImageSets/), got {_entries(root)}"
            )
        layout = found[0]
    if layout == "voc":
        listing = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        try:
            names = listing.read_text().split()
        except OSError as error:
            raise Problem(f"{listing}: expected a list of images, got: {error.strerror}") from error
        pairs = [
            (root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png")
            for name in names
        ]
    else:
        folder_name = {"train": "training", "val": "validation"}[part]
        images = root / "images" / folder_name
        if not images.is_dir():
            raise Problem(f"{images}: expected a folder of images, got no such directory")
        paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGES)
        annotations = root / "annotations" / folder_name
        pairs = [(p, annotations / p.relative_to(images).with_suffix(".png")) for p in paths]
        if not pairs:
            raise Problem(f"{images}: expected images ({', '.join(IMAGES)}), got none")
    for pair in pairs:
        for path in pair:
            if not path.is_file():
                raise Problem(f"{path}: expected the file of {pair[0].stem}, got no such file")
    return LabelMaps(root, pairs, _classes(classes, layout), layout == "ade20k")


def _classes(given: Path | int | None, layout: str) -> Sequence[str]:
    if given is None:
        return VOC if layout == "voc" else [f"class {n}" for n in range(1, 151)]
    if isinstance(given, int):
        return [f"class {n}" for n in range(given)]
    try:
        names = [line.strip() for line in given.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise Problem(
            f"--classes: expected a number or a file of names, got {given}: {error}"
        ) from error
    return [name for name in names if name]


def _entries(root: Path) -> str:
    names = sorted(entry.name for entry in root.iterdir())
    return ", ".join(names[:4]) + (" and others" if len(names) > 4 else "") or "an empty folder"


class Augment:
    """Scaling, a crop, mirroring and colours; the published ones by default.

    Args:
        crop: side of the square that is returned.
        base: the sides that an image is scaled into, long and short, before ``ratio``; None to take the
            image as it is.
        ratio: least and largest factor of the scale.
        most: of the crop's pixels at most this part may be of one class (ten tries).
        flip: probability of mirroring.
        colours: change brightness, contrast, saturation and hue.
    """

    def __init__(
        self,
        crop: int,
        base: tuple[int, int] | None,
        ratio: tuple[float, float],
        most: float,
        flip: float,
        colours: bool,
    ) -> None:
        self._crop, self._base, self._ratio, self._most = crop, base, ratio, most
        self._flip = flip
        self._colours = (
            need("torchvision.transforms.v2", "dense").RandomPhotometricDistort()
            if colours
            else None
        )

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Image ``(3, crop, crop)``, float in [0, 1], and labels ``(crop, crop)``."""
        factor = float(torch.empty(()).uniform_(*self._ratio)) * fitting(image, self._base)
        image, labels = scaled(image, factor), scaled_labels(labels, factor)
        image, labels = self._cropped(image, labels)
        if torch.rand(()) < self._flip:
            image, labels = image.flip(2), labels.flip(1)
        if self._colours is not None:
            image = self._colours(image)
        down, right = (max(0, self._crop - n) for n in labels.shape)
        return (
            F.pad(image.float() / 255, (0, right, 0, down)),
            F.pad(labels, (0, right, 0, down), value=IGNORED),
        )

    def _cropped(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = labels.shape
        for _ in range(10 if self._most < 1 else 1):
            top = int(torch.randint(max(0, height - self._crop) + 1, ()))
            left = int(torch.randint(max(0, width - self._crop) + 1, ()))
            place = slice(top, top + self._crop), slice(left, left + self._crop)
            counts = labels[place][labels[place] != IGNORED].bincount()
            if (counts > 0).sum() > 1 and counts.max() < self._most * counts.sum():
                break
        return image[:, place[0], place[1]], labels[place]


def fitting(image: Tensor, base: tuple[int, int] | None) -> float:
    """The factor by which an image fits into ``base``, its long and short side."""
    if base is None:
        return 1.0
    height, width = image.shape[-2:]
    return min(max(base) / max(height, width), min(base) / min(height, width))


def scaled(image: Tensor, factor: float) -> Tensor:
    """An image ``(C, H, W)`` uint8, bilinear."""
    if factor == 1.0:
        return image
    size = [max(1, int(n * factor + 0.5)) for n in image.shape[1:]]
    out = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)
    return out[0].round().clamp(0, 255).byte()


def scaled_labels(labels: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return labels
    size = [max(1, int(n * factor + 0.5)) for n in labels.shape]
    return F.interpolate(labels[None, None].float(), size, mode="nearest")[0, 0].long()


def normalised(images: Tensor) -> Tensor:
    """Images in [0, 1] by ImageNet's mean and deviation, ``(..., 3, H, W)``."""
    mean: Any = images.new_tensor([0.485, 0.456, 0.406])[:, None, None]
    std: Any = images.new_tensor([0.229, 0.224, 0.225])[:, None, None]
    return (images - mean) / std
