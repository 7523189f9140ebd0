"""Trains a RetinaNet or Mask R-CNN on an RCViT by the published recipe (CAS-ViT, arXiv 2408.03703).

python examples/train_detection.py --data DIR --backbone rcvit_xs.pth --output RUN
torchrun --standalone --nproc-per-node 8 examples/train_detection.py --data DIR ... --output RUN
python examples/train_detection.py --data digits --output RUN

DIR has the layout of COCO (annotations/, train2017/, val2017/) or VOC (JPEGImages/, Annotations/,
ImageSets/). "digits" are scenes of handwritten digits and need no files; a few minutes on a CPU.
docs/dense_prediction.md tells the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from recipe import objects, pictures, training
from recipe.arguments import integer, number
from recipe.digit_scenes import SIDE, DetectedScenes
from recipe.machine import say
from recipe.processes import Processes
from torch import Tensor, nn

from casvit_kernels.models.heads import mask_rcnn, retinanet

# What digits want in place of the published recipe, which starts from a trained backbone.
DIGITS: dict[str, Any] = {
    "layers": (1, 1, 2, 1),
    "dims": (24, 32, 48, 64),
    "channels": 64,
    "fc_channels": 128,
    "norms": "trained",
    "short_side": SIDE,
    "long_side": SIDE,
    "flip": 0.0,
    "epochs": 9,
    "decay_epochs": (7, 8.4),
    "batch_size": 16,
    "lr": 4e-3,
    "warmup_steps": 50,
    "clip_grad": 5.0,
}


class Detection(training.Task):
    script = "train_detection"

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._masks = options.head == "mask_rcnn"
        self.metrics = ("ap", "ap50", "ap75")
        if self._masks:
            self.metrics += ("mask_ap", "mask_ap50", "mask_ap75")
        if str(options.data) == "digits":
            self.train: Any = DetectedScenes("train", options.scenes, options.seed)
            self.val: Any = DetectedScenes("test", options.val_scenes, 0)
        else:
            args = (options.layout, self._masks)
            self.train = None
            if not options.eval_only:
                self.train = objects.folder(options.data, "train", *args)
            self.val = objects.folder(options.data, "val", *args)

    def settle(self, here: Processes) -> None:
        """Turn epochs into steps, and say what was left out."""
        options = self._options
        if self.train is None:
            return
        options.epoch_steps = max(1, len(self.train) // (options.batch_size * here.world))
        options.steps = options.epochs * options.epoch_steps
        options.eval_every = options.eval_every or options.epoch_steps
        for name in ("empty", "flat") if here.first else ():
            if count := getattr(self.train, name, 0):
                what = "images without objects" if name == "empty" else "boxes without area"
                say(f"{self.train.root}: {count} {what} are left out")

    def build(self) -> nn.Module:
        options = self._options
        build: Any = mask_rcnn if self._masks else retinanet
        more = {"fc_channels": options.fc_channels} if self._masks else {}
        model: nn.Module = build(
            training.size_of(options),
            len(self.val.classes),
            channels=options.channels,
            drop_path_rate=options.drop_path,
            freeze_norms=options.norms == "frozen",
            fused=options.mixer == "fused",
            min_size=options.short_side,
            max_size=options.long_side,
            **more,
        )
        return model

    def augment(self, image: Tensor, target: dict[str, Tensor]) -> Any:
        kept = ~target["crowd"]
        target = {name: value[kept] for name, value in target.items() if name != "crowd"}
        if not self._masks:
            target.pop("masks", None)
        if torch.rand(()) < self._options.flip:
            image = image.flip(2)
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            width = image.shape[2]
            target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], 1)
            if "masks" in target:
                target["masks"] = target["masks"].flip(2)
        return image, target

    def loss(self, model: nn.Module, batch: list[Any], here: Processes) -> dict[str, Tensor]:
        images = [image.to(here.device, non_blocking=True).float() / 255 for image, _ in batch]
        targets = [
            {name: value.to(here.device, non_blocking=True) for name, value in target.items()}
            for _, target in batch
        ]
        losses: dict[str, Tensor] = model(images, targets)
        return losses

    def rate(self, step: int) -> float:
        options = self._options
        warm = 1.0
        if step < options.warmup_steps:
            warm = 0.001 + 0.999 * step / options.warmup_steps
        passed = sum(step >= round(e * options.epoch_steps) for e in options.decay_epochs)
        return float(warm * 0.1**passed)

    def predict(self, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = model([image.float() / 255])[0]
        return found

    def judge(self, here: Processes) -> training.Judge:
        return Precision(len(self.val.classes), self._masks, here)

    def picture(self, image: Tensor, found: dict[str, Tensor]) -> Tensor:
        if not self._masks:
            found = {name: value for name, value in found.items() if name != "masks"}
        least = self._options.visualize_from
        return pictures.boxes(image, found, self.val.classes, least, side=320)


class Precision(training.Judge):
    """pycocotools' average precision, of boxes and masks, over the images of all processes."""

    def __init__(self, classes: int, masks: bool, here: Processes) -> None:
        self._classes, self._masks, self._here = classes, masks, here
        self._rows: list[Any] = []

    def add(self, index: int, found: Any, truth: Any, size: tuple[int, int]) -> None:
        if not self._masks:
            truth = {name: value for name, value in truth.items() if name != "masks"}
        self._rows.append(objects.packed(index, found, truth, size))

    def result(self) -> dict[str, float]:
        parts = self._here.gather(self._rows)
        rows = sorted((row for part in parts for row in part), key=lambda row: row["image"])
        return objects.average_precision(rows, self._classes, self._masks)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(script="train_detection")
    training.add_arguments(parser)
    positive = integer(1)
    add = parser.add_argument_group("detection").add_argument
    add("--head", choices=("retinanet", "mask_rcnn"), default="retinanet")
    add("--layout", choices=("auto", "coco", "voc"), default="auto", help="of --data")
    add("--epochs", type=positive, default=12)
    add("--decay-epochs", type=number(0), nargs="*", default=(8, 11), help="rate falls to a tenth")
    add("--warmup-steps", type=integer(0), default=500, help="with a rising learning rate")
    add("--channels", type=positive, default=256, help="of pyramid and head")
    add("--fc-channels", type=positive, default=1024, help="of Mask R-CNN's box head")
    add("--short-side", type=positive, default=800, metavar="PIXELS", help="of scaled images")
    add("--long-side", type=positive, default=1333, metavar="PIXELS", help="of these at most")
    add("--flip", type=number(0, 1), default=0.5, help="probability of mirroring")
    add("--visualize-from", type=number(0, 1), default=0.5, help="least score of drawn boxes")
    add("--scenes", type=positive, default=4000, help="of digits, to train on")
    add("--val-scenes", type=positive, default=200, help="of digits, to evaluate on")
    return training.parsed(parser, argv, DIGITS)


def main(argv: Sequence[str] | None = None) -> int:
    return training.main(parse(argv), Detection)


if __name__ == "__main__":
    sys.exit(main())
