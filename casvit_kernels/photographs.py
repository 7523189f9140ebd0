"""Photographs: those that ship with scikit-learn and scikit-image, or one's own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._optional import need

SIZE = 224  # pixels, the published input size
MOST = 32  # photographs used of a directory; more would only take longer
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of the published training
STD = (0.229, 0.224, 0.225)

# Photographs inside the wheels; the datasets these packages download on request are left alone.
_SHIPPED = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
)


class Photographs(NamedTuple):
    names: tuple[str, ...]
    pixels: Tensor  # (N, S, S, 3), uint8
    found: int  # how many there were; more than N when a directory holds more than `MOST`

    def batch(
        self,
        size: int | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> Tensor:
        """``(size, 3, S, S)`` float32, normalised; photographs repeat where there are fewer."""
        chosen = torch.arange(len(self.names) if size is None else size) % len(self.names)
        x = self.pixels[chosen].permute(0, 3, 1, 2).float() / 255
        shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
        return ((x - shift) / scale).contiguous()


def load(folder: Path | None, argument: str = "--images", side: int = SIZE) -> Photographs:
    """All images of `folder` (sorted by name, the first `MOST`), or those that ship with packages.

    Each is scaled to `side` pixels on its short side, and the middle cut out.

    Raises:
        ValueError: `folder` is no directory, holds no image, or an image cannot be read; the message
            begins with `argument`, the name under which the caller was given the folder.
        MissingExtra: a package is missing.
    """
    paths = _shipped(argument) if folder is None else _images_of(folder, argument)
    chosen = paths[:MOST]
    pixels = torch.stack([_read(path, argument, side) for path in chosen])
    return Photographs(tuple(path.stem for path in chosen), pixels, len(paths))


def _shipped(argument: str) -> list[Path]:
    for package in ("sklearn", "skimage"):
        need(package)
    paths = [Path(str(resources.files(package) / name)) for package, name in _SHIPPED]
    present = [path for path in paths if path.is_file()]
    if not present:
        raise ValueError(
            f"{argument}: scikit-learn and scikit-image carry no photographs here; give a directory"
        )
    return present


def _images_of(folder: Path, argument: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{argument}: expected a directory with images, got {folder}")
    known = need("PIL.Image").registered_extensions()
    paths = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in known)
    if not paths:
        raise ValueError(
            f"{argument}: expected at least one image (jpg, png, ...) in {folder}, got none"
        )
    return paths


def _read(path: Path, argument: str, side: int) -> Tensor:
    """``(side, side, 3)`` uint8: the short side scaled to the size, the middle cut out."""
    image, ops = need("PIL.Image"), need("PIL.ImageOps")
    try:
        with image.open(path) as opened:
            upright: Any = ops.exif_transpose(opened).convert("RGB")
    # Pillow's decoders raise far more than OSError on a damaged file.
    except Exception as error:
        raise ValueError(f"{argument}: expected a readable image, got {path} ({error})") from None
    fitted = ops.fit(upright, (side, side), image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(side, side, 3)
