"""Trains a Semantic FPN on an RCViT by the published recipe (CAS-ViT, arXiv 2408.03703).

python examples/train_segmentation.py --data DIR --backbone rcvit_xs.pth --output RUN
torchrun --standalone --nproc-per-node 8 examples/train_segmentation.py --data DIR ... --output RUN
python examples/train_segmentation.py --data digits --output RUN

DIR has the layout of ADE20K (images/, annotations/) or VOC (JPEGImages/, SegmentationClass/,
ImageSets/). "digits" are scenes of handwritten digits and need no files; a few minutes on a CPU.
docs/dense_prediction.md tells the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from recipe import label_maps, pictures, training
from recipe.arguments import integer, number
from recipe.digit_scenes import SIDE, LabelledScenes
from recipe.processes import Processes
from torch import Tensor, nn

from casvit_kernels._optional import need
from casvit_kernels.models.heads import semantic_fpn

# What digits want in place of the published recipe, which starts from a trained backbone.
DIGITS: dict[str, Any] = {
    "layers": (1, 1, 2, 1),
    "dims": (24, 32, 48, 64),
    "channels": 48,
    "pyramid_channels": 48,
    "norms": "trained",
    "crop": SIDE,
    "scale": None,
    "ratio": (1.0, 1.0),
    "flip": 0.0,
    "colours": False,
    "steps": 800,
    "batch_size": 16,
    "lr": 8e-3,
    "clip_grad": 1.0,
    "warmup_steps": 50,
    "eval_every": 400,
}


class Segmentation(training.Task):
    script = "train_segmentation"
    metrics = ("miou", "accuracy")

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        if str(options.data) == "digits":
            self.train: Any = LabelledScenes("train", options.scenes, options.seed)
            self.val: Any = LabelledScenes("test", options.val_scenes, 0)
        else:
            args = (options.layout, options.classes)
            self.train = None
            if not options.eval_only:
                self.train = label_maps.folder(options.data, "train", *args)
            self.val = label_maps.folder(options.data, "val", *args)
        self._classes = len(self.val.classes)
        self._augment = label_maps.Augment(
            options.crop,
            options.scale,
            options.ratio,
            0.75,
            options.flip,
            options.colours,
        )

    def build(self) -> nn.Module:
        options = self._options
        return semantic_fpn(
            training.size_of(options),
            self._classes,
            channels=options.channels,
            pyramid_channels=options.pyramid_channels,
            dropout=options.dropout,
            drop_path_rate=options.drop_path,
            freeze_norms=options.norms == "frozen",
            fused=options.mixer == "fused",
        )

    def augment(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self._augment(image, target)

    def loss(self, model: nn.Module, batch: list[Any], here: Processes) -> dict[str, Tensor]:
        images = torch.stack([image for image, _ in batch]).to(here.device, non_blocking=True)
        labels = torch.stack([labels for _, labels in batch]).to(here.device, non_blocking=True)
        scores = model(label_maps.normalised(images))
        losses = F.cross_entropy(
            scores.float(), labels, ignore_index=label_maps.IGNORED, reduction="sum"
        )
        return {"loss": losses / labels.numel()}  # a crop without labels costs nothing

    def rate(self, step: int) -> float:
        options = self._options
        warm = min(1.0, (step + 1) / options.warmup_steps) if options.warmup_steps else 1.0
        return warm * max(0.0, 1 - step / options.steps) ** 0.9

    def predict(self, model: nn.Module, image: Tensor) -> Tensor:
        size = image.shape[1:]
        factor = label_maps.fitting(image, self._options.scale)
        resized = label_maps.scaled(image, factor).float() / 255
        scores = model(label_maps.normalised(resized)[None])
        if scores.shape[2:] != size:
            scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
        labels: Tensor = scores[0].argmax(0)
        return labels

    def judge(self, here: Processes) -> training.Judge:
        return IoU(self._classes, here)

    def picture(self, image: Tensor, found: Tensor) -> Tensor:
        return pictures.label_map(image, found, self.val.classes)


class IoU(training.Judge):
    """torchmetrics' mean intersection over union, and pixel accuracy; over all processes."""

    def __init__(self, classes: int, here: Processes) -> None:
        metrics = need("torchmetrics.classification", "dense")
        settings = {"num_classes": classes, "ignore_index": label_maps.IGNORED}
        self._metrics = {
            "miou": metrics.MulticlassJaccardIndex(average="macro", **settings).to(here.device),
            "accuracy": metrics.MulticlassAccuracy(average="micro", **settings).to(here.device),
        }

    def add(self, index: int, found: Tensor, truth: Tensor, size: tuple[int, int]) -> None:
        for metric in self._metrics.values():
            metric.update(found[None], truth[None].to(found.device))

    def result(self) -> dict[str, float]:
        return {name: 100 * float(metric.compute()) for name, metric in self._metrics.items()}


def classes(text: str) -> Path | int:
    return integer(1)(text) if text.isdigit() else Path(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(script="train_segmentation", warmup_steps=0, eval_every=4000)
    training.add_arguments(parser)
    positive = integer(1)
    add = parser.add_argument_group("segmentation").add_argument
    add("--layout", choices=("auto", "ade20k", "voc"), default="auto", help="of --data")
    add("--classes", type=classes, metavar="N|FILE", help="how many, or a name in each line")
    add("--steps", type=positive, default=40000)
    add("--warmup-steps", type=integer(0), help="with a rising learning rate; by default none")
    add("--channels", type=positive, default=128, help="of the head")
    add("--pyramid-channels", type=positive, default=256)
    add("--dropout", type=number(0, 0.99), default=0.1, help="of channels, before the classes")
    add("--crop", type=positive, default=512, metavar="PIXELS", help="side that is trained on")
    add(
        "--scale",
        type=positive,
        nargs=2,
        default=(2048, 512),
        metavar="PIXELS",
        help="long and short side that images are fitted into",
    )
    add("--ratio", type=number(0.01), nargs=2, default=(0.5, 2.0), help="of scales in training")
    add("--flip", type=number(0, 1), default=0.5, help="probability of mirroring")
    add("--no-colours", dest="colours", action="store_false", help="leave colours as they are")
    add("--scenes", type=positive, default=4000, help="of digits, to train on")
    add("--val-scenes", type=positive, default=200, help="of digits, to evaluate on")
    return training.parsed(parser, argv, DIGITS)


def main(argv: Sequence[str] | None = None) -> int:
    return training.main(parse(argv), Segmentation)


if __name__ == "__main__":
    sys.exit(main())
