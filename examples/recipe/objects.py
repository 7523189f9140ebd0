"""Images with boxes and masks in the layouts of COCO and PASCAL VOC; average precision."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from casvit_kernels._optional import need

from .data import Unreadable
from .problem import Problem
from .stream import read_image

OUTSIDE = 1.0  # pixels by which a box may stand out of its image: roundings of those who drew it


class Annotation(NamedTuple):
    """An object: corners, label from 1, polygons or RLE (None in VOC), and whether it is a crowd."""

    box: tuple[float, float, float, float]
    label: int
    shape: Any
    crowd: bool


class Record(NamedTuple):
    """An image and its objects."""

    path: Path
    width: int
    height: int
    objects: list[Annotation]


class Objects:
    """Images with objects.

    Attributes:
        classes: names; label n is ``classes[n - 1]``.
        empty: how many images without objects were left out.
        flat: how many boxes without area were left out.
    """

    def __init__(
        self,
        root: Path,
        records: list[Record],
        classes: Sequence[str],
        masks: bool,
        keep_empty: bool,
        flat: int,
    ) -> None:
        if not records:
            raise Problem(f"{root}: expected images, got none")
        kept = [r for r in records if keep_empty or any(not o.crowd for o in r.objects)]
        if not kept:
            raise Problem(
                f"{root}: expected images with objects, got {len(records)} images without any"
            )
        self.root, self._records, self._masks = root, kept, masks
        self.classes = tuple(classes)
        self.empty, self.flat = len(records) - len(kept), flat

    def __len__(self) -> int:
        return len(self._records)

    def load(self, index: int) -> tuple[Tensor, dict[str, Tensor]] | Unreadable:
        """Image ``(3, H, W)`` uint8, and boxes, labels, crowd flags and, if wanted, masks."""
        record = self._records[index]
        image = read_image(record.path)
        if isinstance(image, Unreadable):
            return image
        size = tuple(image.shape[1:])
        if size != (record.height, record.width):
            return Unreadable(
                f"{record.path}: expected {record.width}x{record.height} pixels as its annotations say, "
                f"got {size[1]}x{size[0]}"
            )
        objects = record.objects
        target = {
            "boxes": torch.tensor([o.box for o in objects], dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([o.label for o in objects], dtype=torch.int64),
            "crowd": torch.tensor([o.crowd for o in objects], dtype=torch.bool),
        }
        if self._masks:
            masks = [_mask(o.shape, *size) for o in objects]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, *size).byte()
        return image, target


def _mask(shape: Any, height: int, width: int) -> Tensor:
    coder = need("pycocotools.mask", "dense")
    if isinstance(shape, list):
        shape = coder.merge(coder.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        shape = coder.frPyObjects(shape, height, width)
    return torch.from_numpy(np.ascontiguousarray(coder.decode(shape)))


def folder(root: Path, part: str, layout: str, masks: bool) -> Objects:
    """The images of a part, "train" or "val".

    Args:
        layout: "coco" (``annotations/instances_<part>2017.json``, ``<part>2017/``), "voc"
            (``JPEGImages``, ``Annotations``, ``ImageSets/Main/<part>.txt``) or "auto".
        masks: they are wanted.

    Raises:
        Problem: it is no such folder, or an annotation cannot be right.
    """
    if not root.is_dir():
        raise Problem(f"--data: expected a folder or digits, got {root}, which is no directory")
    if layout == "auto":
        layouts = {"coco": "annotations", "voc": "Annotations"}
        names = {entry.name for entry in root.iterdir()}
        found = [name for name, child in layouts.items() if child in names]
        if len(found) != 1:
            listed = ", ".join(sorted(names)[:4]) or "an empty folder"
            raise Problem(
                f"--data: {root}: expected the layout of COCO (annotations/, train2017/, val2017/) or "
                f"VOC (JPEGImages/, Annotations/, ImageSets/), got {listed}"
            )
        layout = found[0]
    if layout == "voc":
        if masks:
            raise Problem(
                "--head: expected retinanet with the layout of VOC, which has no masks, "
                "got mask_rcnn"
            )
        return _voc(root, part)
    return _coco(root, part, masks)


def _coco(root: Path, part: str, masks: bool) -> Objects:
    path = root / "annotations" / f"instances_{part}2017.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted(content["categories"], key=lambda c: c["id"])
        images, annotations = content["images"], content["annotations"]
    except OSError as error:
        raise Problem(f"{path}: expected COCO's annotations, got: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path}: expected COCO's annotations, got: {error!r}") from error
    labels = {category["id"]: n for n, category in enumerate(categories, 1)}
    by_image: dict[int, list[Annotation]] = {image["id"]: [] for image in images}
    sizes = {image["id"]: image for image in images}
    flat = 0
    for annotation in annotations:
        what = f"{path}: annotation {annotation.get('id')}"
        if annotation.get("image_id") not in by_image:
            raise Problem(
                f"{what}: expected an image of the file, got {annotation.get('image_id')}"
            )
        if annotation.get("category_id") not in labels:
            raise Problem(
                f"{what}: expected one of the {len(labels)} categories, "
                f"got the unknown id {annotation.get('category_id')}"
            )
        image = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        box = (x, y, x + w, y + h)
        cut = inside(what, box, image["width"], image["height"])
        if part == "train":  # what is judged stays as it is, as in official figures
            if w < 1 or h < 1:  # as published
                flat += 1
                continue
            box = cut
        shape = annotation.get("segmentation")
        if masks and not shape:
            raise Problem(f"{what}: expected a segmentation for mask_rcnn, got none")
        by_image[image["id"]].append(
            Annotation(
                box, labels[annotation["category_id"]], shape, bool(annotation.get("iscrowd"))
            )
        )
    folder_ = root / f"{part}2017"
    records = [
        Record(folder_ / image["file_name"], image["width"], image["height"], by_image[image["id"]])
        for image in images
    ]
    names = [category["name"] for category in categories]
    return Objects(root / f"{part}2017", records, names, masks, part != "train", flat)


def _voc(root: Path, part: str) -> Objects:
    from .label_maps import VOC

    labels = {name: n for n, name in enumerate(VOC[1:], 1)}
    listing = root / "ImageSets" / "Main" / f"{part}.txt"
    try:
        names = listing.read_text().split()
    except OSError as error:
        raise Problem(f"{listing}: expected a list of images, got: {error.strerror}") from error
    records, flat = [], 0
    for name in names:
        path = root / "Annotations" / f"{name}.xml"
        try:
            tree = ElementTree.parse(path).getroot()
            width, height = (int(tree.findtext(f"size/{side}", "")) for side in ("width", "height"))
            objects = []
            for thing in tree.iter("object"):
                label = thing.findtext("name", "")
                if label not in labels:
                    raise Problem(f"{path}: expected a class of VOC, got the unknown {label!r}")
                corners = [
                    float(thing.findtext(f"bndbox/{c}", ""))
                    for c in ("xmin", "ymin", "xmax", "ymax")
                ]
                # Pixels are counted from 1, both ends included.
                box = (corners[0] - 1, corners[1] - 1, corners[2], corners[3])
                if box[2] - box[0] < 1 or box[3] - box[1] < 1:
                    flat += 1
                    continue
                crowd = thing.findtext("difficult", "0") == "1"
                objects.append(
                    Annotation(inside(str(path), box, width, height), labels[label], None, crowd)
                )
        except OSError as error:
            raise Problem(f"{path}: expected annotations, got: {error.strerror}") from error
        except (ElementTree.ParseError, ValueError) as error:
            raise Problem(f"{path}: expected annotations of VOC, got: {error}") from error
        records.append(Record(root / "JPEGImages" / f"{name}.jpg", width, height, objects))
    return Objects(root, records, VOC[1:], False, part != "train", flat)


def inside(
    what: str, box: tuple[float, float, float, float], width: int, height: int
) -> tuple[float, float, float, float]:
    """The box, cut at the image's border.

    Raises:
        Problem: it stands out by more than `OUTSIDE` pixels.
    """
    x1, y1, x2, y2 = box
    if min(x1, y1) < -OUTSIDE or x2 > width + OUTSIDE or y2 > height + OUTSIDE:
        raise Problem(
            f"{what}: expected a box inside its image of {width}x{height}, got one from "
            f"({x1:g}, {y1:g}) to ({x2:g}, {y2:g})"
        )
    return max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)


# Evaluation --------------------------------------------------------------------------------------


def packed(index: int, found: Mapping[str, Tensor], truth: Mapping[str, Tensor], size: Any) -> Any:
    """What is to be compared of one image, in plain data: for `average_precision`."""
    rows: dict[str, Any] = {"image": index, "size": tuple(size), "found": [], "truth": []}
    for name, part in (("found", found), ("truth", truth)):
        masks = _encoded(part["masks"]) if "masks" in part else [None] * len(part["boxes"])
        scores = part["scores"].tolist() if "scores" in part else [None] * len(masks)
        crowd = part["crowd"].tolist() if "crowd" in part else [False] * len(masks)
        boxes = part["boxes"].tolist()
        for box, label, mask, score, flag in zip(
            boxes, part["labels"].tolist(), masks, scores, crowd, strict=True
        ):
            x1, y1, x2, y2 = box
            rows[name].append(
                {
                    "image_id": index,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(flag),
                    "score": score,
                    "segmentation": mask,
                }
            )
    return rows


def _encoded(masks: Tensor) -> list[Any]:
    coder = need("pycocotools.mask", "dense")
    if masks.dim() == 4:  # of a model: probabilities
        masks = masks[:, 0] > 0.5
    columns = np.asfortranarray(masks.byte().cpu().numpy().transpose(1, 2, 0))
    return list(coder.encode(columns)) if len(masks) else []


def average_precision(images: list[Any], classes: int, masks: bool) -> dict[str, float]:
    """``ap``, ``ap50``, ``ap75``, and with ``masks`` ``mask_ap``, ``mask_ap50``, in percent."""
    tools = need("pycocotools.coco", "dense")
    evaluation = need("pycocotools.cocoeval", "dense")
    truth = tools.COCO()
    annotations: list[Any] = []
    for image in images:
        for row in image["truth"]:
            kept = {
                key: value for key, value in row.items() if key != "score" and value is not None
            }
            annotations.append({**kept, "id": len(annotations) + 1})
    truth.dataset = {
        "info": {},
        "images": [
            {"id": i["image"], "height": i["size"][0], "width": i["size"][1]} for i in images
        ],
        "categories": [{"id": label, "name": str(label)} for label in range(1, classes + 1)],
        "annotations": annotations,
    }
    found = [
        {key: value for key, value in row.items() if value is not None}
        for image in images
        for row in image["found"]
    ]
    results = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        for kind, prefix in (("bbox", ""), ("segm", "mask_"))[: 2 if masks else 1]:
            names = [f"{prefix}ap", f"{prefix}ap50", f"{prefix}ap75"]
            if not found:
                results |= dict.fromkeys(names, 0.0)
                continue
            rows = (
                found
                if kind == "bbox"
                else [{k: v for k, v in row.items() if k != "bbox"} for row in found]
            )
            judge = evaluation.COCOeval(truth, truth.loadRes([dict(row) for row in rows]), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            # -1 stands for no object at all.
            results |= {
                n: 100 * max(0.0, float(s)) for n, s in zip(names, judge.stats, strict=False)
            }
    return results
