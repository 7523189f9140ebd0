"""Writes scikit-learn's handwritten digits as image folders, to try the training script on.

python examples/digits_as_images.py DIR
python examples/train_classification.py DIR --output RUN --input-size 32 ...

1797 digits of 8x8 pixels, upscaled; three quarters under train/, one quarter under val/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from casvit_kernels._optional import need

# What the recipe must leave out: digits must not be mirrored, or cut to a twelfth of their area.
OPTIONS = [
    *("--input-size", 32, "--crop-pct", 1, "--crop-scale", 0.7, 1, "--hflip", 0),
    *("--auto-augment", "none", "--no-tensorboard", "--device", "cpu"),
]


def write(root: Path, side: int = 32, limit: int | None = None) -> None:
    """``root/{train,val}/<digit>/<number>.png``, grey, ``side`` pixels; the first ``limit`` only."""
    from PIL import Image

    digits = need("sklearn.datasets").load_digits()
    numbers = range(len(digits.images[:limit]))
    train, val = need("sklearn.model_selection").train_test_split(
        numbers, test_size=0.25, random_state=0, stratify=digits.target[:limit]
    )
    for part, chosen in ("train", train), ("val", val):
        for number in chosen:
            folder = root / part / str(digits.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((digits.images[number] * (255 / 16)).astype("uint8"))
            image.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:04}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--side", type=int, default=32, help="pixels (32)")
    options = parser.parse_args()
    write(options.root, options.side)
