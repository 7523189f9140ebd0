"""Small folders in the layouts of COCO, VOC and ADE20K, made of scenes of digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coder
from recipe.digit_scenes import NAMES, DetectedScenes, LabelledScenes


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)


def coco(root: Path, count: int = 4) -> Path:
    """Images without and with objects: the last of each part has none."""
    (root / "annotations").mkdir(parents=True)
    for part in "train", "val":
        scenes = DetectedScenes("train" if part == "train" else "test", count, 0)
        images, annotations = [], []
        for index in range(count):
            pixels, target = scenes.load(index)
            name = f"{index:04}.png"
            save(root / f"{part}2017" / name, pixels.permute(1, 2, 0).numpy())
            images.append({"id": index + 7, "file_name": name, "width": 96, "height": 96})
            for row in range(len(target["boxes"]) if index < count - 1 else 0):
                x1, y1, x2, y2 = target["boxes"][row].tolist()
                rle = coder.encode(np.asfortranarray(target["masks"][row].numpy()))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 7,
                        "category_id": 3 * int(target["labels"][row]),  # ids need not be 1, 2, 3
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                        "segmentation": {**rle, "counts": rle["counts"].decode()},
                    }
                )
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 3 * n, "name": name} for n, name in enumerate(NAMES, 1)],
        }
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
    return root


def change(root: Path, edit: Any, part: str = "train") -> None:
    """Edit the annotations of a part."""
    path = root / "annotations" / f"instances_{part}2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def ade20k(root: Path, count: int = 4) -> Path:
    """Eleven classes, 1 to 11 in the files; images of two sizes."""
    for part, of in (("training", "train"), ("validation", "test")):
        scenes = LabelledScenes(of, count, 0)
        for index in range(count):
            pixels, labels = scenes.load(index)
            width = 96 if index % 2 == 0 else 80
            image = pixels[:, :, :width].permute(1, 2, 0).numpy()
            save(root / "images" / part / f"{index:04}.png", image)
            save(root / "annotations" / part / f"{index:04}.png", labels[:, :width].byte() + 1)
    return root


def voc(root: Path, count: int = 3) -> Path:
    """Boxes and label maps of one class."""
    scenes = DetectedScenes("train", count, 0)
    names = [f"2007_{index:06}" for index in range(count)]
    for index, name in enumerate(names):
        pixels, target = scenes.load(index)
        save(root / "JPEGImages" / f"{name}.jpg", pixels.permute(1, 2, 0).numpy())
        labels = target["masks"].amax(0) * 15
        labels[0, 0] = 255
        save(root / "SegmentationClass" / f"{name}.png", labels.numpy())
        things = "".join(
            f"<object><name>person</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for x1, y1, x2, y2 in target["boxes"].int().tolist()
        )
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(
            "<annotation><size><width>96</width><height>96</height><depth>3</depth></size>"
            f"{things}</annotation>"
        )
    for kind in "Main", "Segmentation":
        for part in "train", "val":
            listing = root / "ImageSets" / kind / f"{part}.txt"
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text("\n".join(names))
    return root
