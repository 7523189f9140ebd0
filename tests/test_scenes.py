"""The scenes of digits: the same for everyone, labels where the ink is, test digits never trained on."""

import sys
from pathlib import Path

import pytest
import torch

import casvit_kernels

pytest.importorskip("sklearn")
EXAMPLES = Path(casvit_kernels.__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not installed with the package", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import scenes  # noqa: E402


def test_a_scene_depends_on_its_seed_part_and_index_alone():
    pixels, labels = scenes.Scenes("train").scene(3)
    assert pixels.shape == (1, 112, 112)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert labels.shape == (112, 112)
    assert labels.dtype == torch.int64
    batch, answers = scenes.Scenes("train").batch(2, 2)
    assert torch.equal(batch[1], pixels)
    assert torch.equal(answers[1], labels)
    for other in scenes.Scenes("test"), scenes.Scenes("train", seed=1):
        assert not torch.equal(other.scene(3)[0], pixels)
    assert not torch.equal(batch[0], pixels)


def test_every_class_occurs_and_labels_lie_on_ink():
    x, labels = scenes.Scenes("test").batch(0, 40)
    assert labels.unique().tolist() == list(range(scenes.CLASSES))
    # Texture ends at 0.5, a stroke's middle begins at 0.7.
    bright = x[:, 0] > 0.65
    assert (labels[bright] > 0).float().mean() > 0.98
    assert bright[labels > 0].float().mean() > 0.4
    assert x[:, 0][labels == 0].mean() < 0.35
    covered = (labels > 0).flatten(1).float().mean(1)
    assert covered.min() > 0.01
    assert covered.max() < 0.6


def test_labels_name_the_digit_that_was_drawn():
    """One digit over a whole scene: scaled down again its pixels are those of a digit so labelled."""
    images, names = scenes.handwritten("test")
    for index in range(10):
        _, labels = scenes.Scenes("test", (80, 80), digits=(1, 1), scale=(80, 80)).scene(index)
        (name,) = labels[labels > 0].unique().tolist()
        inked = torch.nn.functional.avg_pool2d((labels > 0).float()[None], 8)[0]
        nearest = (images - inked).square().sum((1, 2)).argmin()
        assert names[nearest] == name - 1


def test_train_and_test_digits_are_disjoint():
    train, test = (scenes.handwritten(part)[0] for part in ("train", "test"))
    assert (len(train), len(test)) == (1347, 450)
    rows = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in rows for image in test)


def test_objects_are_numbered_and_overlap_as_far_as_asked():
    covered = {}
    for hidden in 0.3, 0.0:
        some = scenes.Scenes("test", (96, 96), 0, (4, 6), (28, 40), hidden)
        digits = 0
        for index in range(20):
            pixels, labels, numbers, drawn = some.objects(index)
            again, same = some.scene(index)
            assert torch.equal(pixels, again)
            assert torch.equal(labels, same)
            assert torch.equal(labels, torch.tensor([0, *drawn])[numbers])
            if hidden == 0:  # nobody lies over another: all are there
                assert set(numbers.unique().tolist()) == set(range(len(drawn) + 1))
            digits += len(drawn)
        covered[hidden] = digits
    assert covered[0.0] < covered[0.3]


def test_other_sizes_and_no_digits():
    pixels, labels = scenes.Scenes("train", (48, 64), digits=(0, 0), scale=(16, 40)).scene(0)
    assert pixels.shape == (1, 48, 64)
    assert not labels.any()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"part": "val"}, "part: expected 'train' or 'test', got 'val'"),
        ({"scale": (28, 200)}, "scale: expected 8 <= least <= largest <= 112"),
        ({"digits": (3, 2)}, "digits: expected 0 <= least <= most"),
    ],
)
def test_wrong_settings(given, said):
    with pytest.raises(ValueError, match=said):
        scenes.Scenes(**{"part": "train", **given})
