"""The parts of the dense training scripts: data, what is wrong with it, evaluation, pictures."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import casvit_kernels

for package in ("torchvision", "pycocotools", "torchmetrics", "sklearn", "PIL"):
    pytest.importorskip(package)

EXAMPLES = Path(casvit_kernels.__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not installed with the package", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import dense_data  # noqa: E402
from recipe import label_maps, objects, pictures, stream  # noqa: E402
from recipe.data import Unreadable  # noqa: E402
from recipe.digit_scenes import DetectedScenes, LabelledScenes  # noqa: E402
from recipe.problem import Problem  # noqa: E402

# Scenes


def test_boxes_and_masks_of_scenes_agree_with_their_label_maps() -> None:
    labelled, detected = LabelledScenes("test", 20, 0), DetectedScenes("test", 20, 0)
    objects_seen = 0
    for index in range(20):
        image, labels = labelled.load(index)
        same, target = detected.load(index)
        assert image.shape == (3, 96, 96)
        assert image.dtype == torch.uint8
        assert torch.equal(image, same)
        assert not (target["masks"].sum(0) > 1).any()  # a pixel shows one digit
        for box, label, mask in zip(
            target["boxes"].int().tolist(), target["labels"], target["masks"], strict=True
        ):
            objects_seen += 1
            assert (labels[mask > 0] == label).all()
            x1, y1, x2, y2 = box
            assert mask.sum() == mask[y1:y2, x1:x2].sum()
            inner = mask[y1:y2, x1:x2]
            assert inner[0].any()
            assert inner[-1].any()
            assert inner[:, 0].any()
            assert inner[:, -1].any()
    assert objects_seen > 25


# Order


def steps(start: int = 0, **options: Any) -> list[list[stream.Draw]]:
    settings = {"images": 7, "batch": 3, "total": 9, "rank": 0, "world": 1, "seed": 5, **options}
    plan = stream.Steps(**settings)
    plan.start = start
    return list(plan)


def test_steps_go_on_where_they_were_and_show_all_images_as_often() -> None:
    whole = steps()
    assert steps(start=4) == whole[4:]
    seen = [draw.image for batch in whole for draw in batch]
    for first in range(0, 21, 7):
        assert sorted(seen[first : first + 7]) == list(range(7))
    assert seen[:7] != seen[7:14]
    assert steps(seed=6) != whole


def test_processes_share_the_steps_of_one() -> None:
    alone = steps(batch=4)
    both = [steps(batch=2, rank=rank, world=2) for rank in (0, 1)]
    for together, *parts in zip(alone, *both, strict=True):
        assert sorted(parts[0] + parts[1], key=lambda d: d.count) == together


# Objects


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return dense_data.coco(tmp_path / "coco")


def test_coco_is_read_as_it_was_written(coco: Path) -> None:
    scenes = DetectedScenes("train", 4, 0)
    found = objects.folder(coco, "train", "auto", masks=True)
    assert (len(found), found.empty, found.flat) == (3, 1, 0)
    assert found.classes == tuple("0123456789")
    assert len(objects.folder(coco, "val", "auto", masks=False)) == 4  # kept to be judged
    for index in range(3):
        (image, target), (pixels, truth) = found.load(index), scenes.load(index)
        assert torch.equal(image, pixels)
        for name in truth:
            assert torch.equal(target[name], truth[name]), name


def test_voc_boxes_are_read_as_they_were_written(tmp_path: Path) -> None:
    scenes = DetectedScenes("train", 3, 0)
    found = objects.folder(dense_data.voc(tmp_path), "train", "auto", masks=False)
    assert len(found.classes) == 20
    for index in range(3):
        _, target = found.load(index)
        assert torch.equal(target["boxes"], scenes.load(index)[1]["boxes"])
        assert set(target["labels"].tolist()) == {15}


def _box(*box: float) -> Any:
    return lambda c: c["annotations"][0].update(bbox=list(box))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            _box(80, 10, 30, 20),
            r"annotation 1: expected a box inside its image of 96x96, got one "
            r"from \(80, 10\) to \(110, 30\)",
        ),
        (_box(-5, 10, 30, 20), r"expected a box inside its image"),
        (lambda c: c["annotations"][1].update(category_id=4), "annotation 2: .*the unknown id 4"),
        (
            lambda c: c["annotations"][0].update(image_id=99),
            "expected an image of the file, got 99",
        ),
        (lambda c: c.update(annotations=[]), "with objects, got 4 images without any"),
        (lambda c: c.update(images=[], annotations=[]), "expected images, got none"),
        (
            lambda c: c["annotations"][0].update(segmentation=None),
            "expected a segmentation for mask",
        ),
        (lambda c: c.pop("categories"), "expected COCO's annotations, got: KeyError"),
    ],
)
def test_wrong_annotations_are_named(coco: Path, edit: Any, message: str) -> None:
    dense_data.change(coco, edit)
    with pytest.raises(Problem, match=message):
        objects.folder(coco, "train", "auto", masks=True)


def test_boxes_a_little_outside_are_cut_and_flat_ones_left_out(coco: Path) -> None:
    dense_data.change(coco, _box(-0.5, 10, 97, 20))
    dense_data.change(coco, lambda c: c["annotations"][1].update(bbox=[3, 3, 0.5, 9]))
    found = objects.folder(coco, "train", "auto", masks=False)
    assert found.flat == 1
    assert found.load(0)[1]["boxes"][0].tolist() == [0, 10, 96, 30]
    # Official figures are of what the annotations say.
    dense_data.change(coco, _box(-0.5, 10, 0.5, 20), "val")
    judged = objects.folder(coco, "val", "auto", masks=False)
    assert judged.flat == 0
    assert judged.load(0)[1]["boxes"][0].tolist() == [-0.5, 10, 0, 30]


def test_folders_of_no_layout_are_named(tmp_path: Path, coco: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "empty", "the layout of COCO .*or VOC .*, got an empty folder"),
        (tmp_path / "none", "expected a folder or digits, got .*no directory"),
    ):
        for folder in (
            lambda p: objects.folder(p, "train", "auto", False),
            lambda p: label_maps.folder(p, "train", "auto", None),
        ):
            with pytest.raises(Problem, match=message.replace("COCO", "(COCO|ADE20K)")):
                folder(path)
    with pytest.raises(Problem, match="--head: expected retinanet with the layout of VOC"):
        objects.folder(dense_data.voc(tmp_path / "voc"), "train", "auto", masks=True)
    (coco / "train2017" / "0000.png").unlink()
    item = objects.folder(coco, "train", "auto", False).load(0)
    assert isinstance(item, Unreadable)
    assert "0000.png: expected an image, got: " in item.message


def test_an_image_of_another_size_than_its_annotations_say(coco: Path) -> None:
    dense_data.save(coco / "train2017" / "0000.png", np.zeros((50, 96, 3), "uint8"))
    item = objects.folder(coco, "train", "auto", False).load(0)
    assert isinstance(item, Unreadable)
    assert "expected 96x96 pixels as its annotations say, got 96x50" in item.message


# Average precision


def prediction(target: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    found = {name: value for name, value in target.items() if name != "crowd"}
    found["scores"] = torch.ones(len(found["labels"]))
    if "masks" in found:
        found["masks"] = found["masks"][:, None].float()
    return {**found, **changes}


def test_average_precision_of_what_is_there_and_of_what_is_not() -> None:
    scenes = DetectedScenes("test", 10, 0)
    targets = [scenes.load(index)[1] for index in range(10)]

    def measured(change: Any) -> dict[str, float]:
        rows = [objects.packed(i, change(t), t, (96, 96)) for i, t in enumerate(targets)]
        return objects.average_precision(rows, 10, masks=True)

    perfect = measured(prediction)
    assert set(perfect) == {"ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75"}
    assert all(value == pytest.approx(100) for value in perfect.values())

    # A fifth of a box aside: an overlap of two thirds counts at 0.5 and not at 0.75.
    def shifted(target: dict[str, Tensor]) -> dict[str, Tensor]:
        boxes = target["boxes"].clone()
        wide = (boxes[:, 2] - boxes[:, 0]) / 5
        boxes[:, 0::2] += wide[:, None]
        return prediction(target, boxes=boxes)

    aside = measured(shifted)
    assert aside["ap50"] == pytest.approx(100)
    assert aside["ap75"] == 0
    assert aside["mask_ap"] == pytest.approx(100)
    wrong = measured(lambda t: prediction(t, labels=t["labels"] % 10 + 1))
    assert wrong["ap50"] < 5
    none = measured(lambda t: {k: v[:0] for k, v in prediction(t).items()})
    assert set(none.values()) == {0.0}


def test_crowds_are_neither_found_nor_missed() -> None:
    target = {
        "boxes": torch.tensor([[0.0, 0, 20, 20], [40, 40, 90, 90]]),
        "labels": torch.tensor([1, 1]),
        "crowd": torch.tensor([False, True]),
    }
    found = prediction({k: v[:1] for k, v in target.items()})
    rows = [objects.packed(0, found, target, (96, 96))]
    assert objects.average_precision(rows, 1, masks=False)["ap"] == pytest.approx(100)


# Label maps


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    return dense_data.ade20k(tmp_path / "ade")


def test_ade20k_is_read_as_it_was_written(ade20k: Path) -> None:
    found = label_maps.folder(ade20k, "val", "auto", 11)
    assert len(found) == 4
    _, truth = LabelledScenes("test", 4, 0).load(1)
    image, labels = found.load(1)
    assert image.shape == (3, 96, 80)
    assert torch.equal(labels, truth[:, :80])
    zero = truth[:, :80].byte() + 1
    zero[:5] = 0  # what has no label
    dense_data.save(ade20k / "annotations" / "validation" / "0001.png", zero)
    assert (found.load(1)[1][:5] == label_maps.IGNORED).all()


def test_voc_label_maps_keep_their_numbers(tmp_path: Path) -> None:
    found = label_maps.folder(dense_data.voc(tmp_path), "train", "auto", None)
    _, labels = found.load(0)
    assert set(labels.unique().tolist()) == {0, 15, 255}
    assert found.classes[15] == "person"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((96, 96), 12, "uint8"), r"of the 11 classes \(1 to 11\) or 255, got 12"),
        (np.zeros((96, 90), "uint8"), "expected the size of its image, 96x96, got 90x96"),
        (np.zeros((96, 96, 3), "uint8"), r"expected a label map \(one number a pixel\), got RGB"),
    ],
)
def test_wrong_label_maps_are_named(ade20k: Path, labels: Any, message: str) -> None:
    path = ade20k / "annotations" / "training" / "0000.png"
    dense_data.save(path, labels)
    item = label_maps.folder(ade20k, "train", "auto", 11).load(0)
    assert isinstance(item, Unreadable)
    assert re.search(message, item.message)
    assert str(path) in item.message


def test_missing_files_of_a_pair_are_named(ade20k: Path) -> None:
    (ade20k / "annotations" / "training" / "0002.png").unlink()
    with pytest.raises(Problem, match=r"0002.png: expected the file of 0002, got no such file"):
        label_maps.folder(ade20k, "train", "auto", 11)
    for path in (ade20k / "images" / "training").iterdir():
        path.unlink()
    with pytest.raises(Problem, match=r"training: expected images \(.jpg, .jpeg, .png\), got none"):
        label_maps.folder(ade20k, "train", "auto", 11)


def test_augmentation_keeps_pixels_and_labels_together() -> None:
    labels = torch.randint(0, 5, (70, 90))
    image = labels.byte().mul(40).expand(3, -1, -1)
    augment = label_maps.Augment(64, None, (1.0, 1.0), 1.0, 0.5, colours=False)
    mirrored = 0
    for _ in range(10):
        pixels, cut = augment(image, labels)
        assert pixels.shape == (3, 64, 64)
        assert torch.equal((pixels[0] * 255 / 40).round().long(), cut)
        mirrored += not any(
            torch.equal(cut, labels[y : y + 64, x : x + 64]) for y in range(7) for x in range(27)
        )
    assert 0 < mirrored < 10
    # Scaled below the crop, the rest is nothing.
    augment = label_maps.Augment(64, (45, 35), (1.0, 1.0), 1.0, 0.0, colours=True)
    pixels, cut = augment(image, labels)
    assert (cut[35:] == label_maps.IGNORED).all()
    assert (pixels[:, 35:] == 0).all()
    assert (cut[:35, :45] != label_maps.IGNORED).all()


def test_crops_of_one_class_are_drawn_again() -> None:
    labels = torch.zeros(64, 640, dtype=torch.int64)
    labels[:, :64] = torch.arange(64) % 2
    image = torch.zeros(3, 64, 640, dtype=torch.uint8)
    labels[:, 64:] = 1
    for most, least in ((0.75, 8), (1.0, 0)):
        augment = label_maps.Augment(32, None, (1.0, 1.0), most, 0.0, colours=False)
        both = sum(len(augment(image, labels)[1].unique()) > 1 for _ in range(20))
        assert both >= least
        if not least:
            assert both < 6


# Pictures


def test_boxes_and_masks_are_drawn_from_a_score_on() -> None:
    image = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    found = {
        "boxes": torch.tensor([[2.0, 2, 20, 20], [25, 25, 38, 38]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.2]),
        "masks": torch.zeros(2, 1, 40, 40),
    }
    found["masks"][0, 0, 10:15, 15:19] = 1
    drawn = pictures.boxes(image, found, ["a", "b"], 0.5)
    assert drawn[:, 2, 20].tolist() == list(pictures.colour(0))
    assert (drawn[:, 12, 17] != 100).any()
    assert (drawn[:, 25:38, 25:38] == 100).all()
    assert torch.equal(pictures.boxes(image, found, ["a", "b"], 0.95), image)
    large = pictures.boxes(image, found, ["a", "b"], 0.5, side=100)
    assert large.shape == (3, 120, 120)
    assert large[:, 6, 60].tolist() == list(pictures.colour(0))
    assert (large[:, 36, 51] != 100).any()
    assert (large[:, 75:, 75:] == 100).all()


def test_label_maps_are_drawn_and_what_has_no_label_is_not() -> None:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    labels = torch.tensor([[1] * 4, [2] * 4, [255] * 4, [0] * 4])
    drawn = pictures.label_map(image, labels, ["x", "y", "z"])
    for row, label in ((0, 1), (1, 2), (3, 0)):
        assert drawn[:, row, 0].tolist() == [int(0.6 * c) for c in pictures.colour(label)]
    assert (drawn[:, 2] == 0).all()
    assert len({pictures.colour(n) for n in range(150)}) == 150
