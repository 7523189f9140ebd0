"""What token clustering is compared with, and the example, on models that are hardly trained."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import casvit_kernels

pytest.importorskip("sklearn")
ROOT = Path(casvit_kernels.__file__).parents[1]
if not (ROOT / "examples").is_dir() or not (ROOT / "bench").is_dir():
    pytest.skip("examples and benchmarks are not installed", allow_module_level=True)
sys.path.insert(0, str(ROOT / "examples"))

import segmentation_vit  # noqa: E402
import token_clustering as example  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "token_rivals", ROOT / "bench" / "accuracy" / "token_rivals.py"
)
rivals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rivals)

TINY = segmentation_vit.Recipe(width=32, depth=3, steps=(1,) * 5, batches=(1,) * 5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return segmentation_vit.SegmentationViT(TINY).eval()


def through(model, x, places):
    for block in model.blocks:
        x = block(x, places)
    return x


@torch.inference_mode()
def test_tome_of_nothing_or_of_equal_tokens_is_the_model(model):
    x, places = torch.randn(2, 64, 32), 10 * torch.rand(1, 64, 2)
    assert torch.equal(rivals.tome(model.blocks, x, places, 64), through(model, x, places))
    # Twins merge, and attention counts them by their size.
    x[:, 1::2], places[:, 1::2] = x[:, ::2], places[:, ::2]
    for count in 48, 10:
        merged = rivals.tome(model.blocks, x, places, count)
        assert merged.shape == x.shape
        if count == 48:
            torch.testing.assert_close(merged, through(model, x, places))


def test_merging_keeps_the_weighted_sum_and_says_where_tokens_went():
    torch.manual_seed(1)
    x, key, weight = torch.randn(2, 20, 6), torch.randn(2, 20, 3), 1 + 3 * torch.rand(2, 20, 1)
    found = rivals.merged(x, key, weight, 7)
    assert found.x.shape == (2, 13, 6)
    torch.testing.assert_close((found.x * found.weight).sum(1), (x * weight).sum(1))
    for b in range(2):
        for at in range(13):
            of = found.group[b] == at
            mean = (x[b, of] * weight[b, of]).sum(0) / weight[b, of].sum()
            torch.testing.assert_close(found.x[b, at], mean)


@pytest.mark.parametrize(
    "method", [rivals.pooling("nearest"), rivals.pooling("bilinear"), rivals.striding]
)
def test_baselines_bring_a_constant_map_back_in_place(method):
    x = torch.zeros(1, 6, 10, 2)
    x[:, :3] = 1  # the upper half
    places = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(10.0), indexing="ij"), 2)
    small, where, rebuild = method(x.flatten(1, 2), places.view(1, 60, 2), (6, 10), (2, 5))
    assert small.shape == where.shape == (1, 10, 2)
    assert where[0, :5, 0].max() < 3 <= where[0, 5:, 0].min()
    back = rebuild(small).unflatten(1, (6, 10))
    torch.testing.assert_close(back[:, 0], x[:, 0])
    torch.testing.assert_close(back[:, -1], x[:, -1])


def test_iou_of_known_answers():
    labels = torch.tensor([[[0, 0, 1, 1]]])
    scores = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 1]]]), 11).movedim(3, 1)
    found = segmentation_vit.IoU()
    found.add(scores, labels)
    assert found.mean() == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_a_trained_model_is_kept_and_made_again_alike(tmp_path):
    first = segmentation_vit.trained(TINY, tmp_path)
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    again, anew = segmentation_vit.trained(TINY, tmp_path), segmentation_vit.train(TINY)
    assert kept.stat().st_mtime_ns == stamp
    images = torch.rand(1, 1, 40, 48)
    assert first(images).shape == (1, 11, 40, 48)
    assert torch.equal(first(images), again(images))
    assert torch.equal(first(images), anew(images))


@pytest.mark.parametrize("reconstruction", ["published", "residual"])
@torch.inference_mode()
def test_as_many_clusters_as_tokens_change_nothing(model, reconstruction):
    images = torch.rand(1, 1, 32, 32)
    found = example.clustered(model, images, 2, (8, 8), 1e6, reconstruction)
    torch.testing.assert_close(found, model(images))


def test_the_example_prints_a_figure_for_each_way(tmp_path, capsys):
    arguments = ["--steps", *"11111", "--scenes", "1", "--models", str(tmp_path)]
    assert example.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["full", "published", "residual", "pooled"]
    with pytest.raises(SystemExit):
        example.main([*arguments, "--at", "11"])
    assert "--at: expected 0 to 10, got 11" in capsys.readouterr().err
