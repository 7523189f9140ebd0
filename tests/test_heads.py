"""RetinaNet, Mask R-CNN and Semantic FPN: published weights compute the same; frozen norms; training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")

from published_heads import Published, delta2bbox
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms

from casvit_kernels import FusedCATM, fuse, unfuse
from casvit_kernels.models import CheckpointError, Config, load_checkpoint
from casvit_kernels.models.heads import (
    load_dense_checkpoint,
    mask_rcnn,
    retinanet,
    semantic_fpn,
)

# The last width is the pyramid's: there torchvision's own extra levels stand on another map.
TINY = Config((1, 1, 2, 1), (8, 12, 16, 16))
SMALL = {"channels": 16, "min_size": 96, "max_size": 160}
BUILDERS = {
    "retinanet": lambda **o: retinanet(TINY, 5, **{**SMALL, **o}),
    "mask_rcnn": lambda **o: mask_rcnn(TINY, 5, fc_channels=32, **{**SMALL, **o}),
    "semantic_fpn": lambda **o: semantic_fpn(
        TINY,
        5,
        channels=32,
        pyramid_channels=16,
        **{k: v for k, v in o.items() if "_thresh" not in k},
    ),
}
KINDS = pytest.mark.parametrize("kind", list(BUILDERS))


def build(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return BUILDERS[kind](**options)


def published(kind: str, seed: int = 1) -> Any:
    """A file's model with norms as after training, and heads that see differences."""
    torch.manual_seed(seed)
    model = Published(kind, TINY, 5, 16).eval()
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def image(*size: int) -> Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(2))


def targets(count: int = 2) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[10.0, 10, 50, 60], [30, 40, 90, 80]])[:count]
    masks = torch.zeros(count, 96, 128, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return [{"boxes": boxes, "labels": torch.tensor([1, 5])[:count], "masks": masks}]


def step(model: Any, x: Tensor | None = None) -> dict[str, Tensor]:
    """Losses of a training step, and gradients in the parameters."""
    x = image(96, 128) if x is None else x
    if hasattr(model, "head") and not hasattr(model, "transform"):
        losses = {
            "loss": nn.functional.cross_entropy(model(x[None]), torch.ones(1, *x.shape[1:]).long())
        }
    else:
        losses = model([x], targets())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    return {name: value.detach() for name, value in losses.items()}


# Published weights


def test_a_published_retinanet_detects_the_same() -> None:
    theirs = published("retinanet")
    ours = build("retinanet", score_thresh=0.3, topk_candidates=10**6, detections_per_img=10**6)
    report = load_dense_checkpoint(ours, theirs.file(mmdet_version="2.24.0"))
    assert not report.missing
    assert not report.unexpected
    assert set(report.skipped.values()) == {
        "the model is built without this stage or its norm (out_indices)"
    }
    x = image(96, 128)  # of the size that it is scaled to, and no multiple of 128
    with torch.no_grad():
        (found,) = ours.eval()([x])
        normed = ours.transform.normalize(x)[None]
        levels, maps = theirs.levels(normed), ours.backbone(normed)
        assert len(maps) == 5
        for a, b in zip(levels, maps.values(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        scores, boxes = theirs.bbox_head(levels, (96, 128))
    chosen = scores > 0.3
    places, classes = torch.where(chosen)
    kept = batched_nms(boxes[places], scores[chosen], classes, 0.5)
    assert len(kept) > 20
    assert len(found["boxes"]) == len(kept)
    torch.testing.assert_close(found["scores"], scores[chosen][kept])
    # Equal scores may come in another order: each box of one is a box of the other.
    one = torch.cat([found["boxes"], 1000.0 * found["labels"][:, None]], 1)
    other = torch.cat([boxes[places][kept], 1000.0 * (classes[kept, None] + 1)], 1)
    distances = (one[:, None] - other).abs().amax(2)
    assert distances.amin(0).max() < 1e-2
    assert distances.amin(1).max() < 1e-2


def test_a_published_mask_rcnn_proposes_boxes_and_masks_the_same() -> None:
    theirs, ours = published("mask_rcnn"), build("mask_rcnn", box_score_thresh=0.0).eval()
    report = load_dense_checkpoint(ours, theirs.file())
    assert not report.missing
    assert not report.skipped
    x = image(96, 128)
    normed = ours.transform.normalize(x)[None]
    with torch.no_grad():
        levels, maps = theirs.levels(normed), ours.backbone(normed)
        for a, b in zip(levels, maps.values(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)

        images = ImageList(normed, [(96, 128)])
        proposals, _ = ours.rpn(images, maps)
        scores, boxes = theirs.rpn_head(levels, (96, 128))
        best = scores.argmax()
        torch.testing.assert_close(proposals[0][0], boxes[best], rtol=1e-4, atol=1e-3)

        # Boxes of all levels of the pyramid, one over the border.
        rois = torch.tensor(
            [[3.0, 5, 20, 40], [10, 10, 128, 90], [0, 0, 250, 240], [-9, 4, 40, 50]]
        )
        pool = ours.roi_heads.box_roi_pool(maps, [rois], [(96, 128)])
        logits, deltas = ours.roi_heads.box_predictor(ours.roi_heads.box_head(pool))
        decoded = ours.roi_heads.box_coder.decode(deltas, [rois])
        their_scores, their_boxes = theirs.roi_head.boxes(levels, rois, (10**6, 10**6))
        torch.testing.assert_close(logits.softmax(1)[:, 1:], their_scores, rtol=1e-4, atol=1e-5)
        inside = their_boxes > 0  # they are clipped there
        torch.testing.assert_close(
            decoded[:, 1:][inside], their_boxes[inside], rtol=1e-4, atol=1e-3
        )

        pool = ours.roi_heads.mask_roi_pool(maps, [rois], [(96, 128)])
        masks = ours.roi_heads.mask_predictor(ours.roi_heads.mask_head(pool)).sigmoid()[:, 1:]
        torch.testing.assert_close(masks, theirs.roi_head.masks(levels, rois), rtol=1e-4, atol=1e-4)


def test_deltas_are_bounded_on_both_sides() -> None:
    box = torch.tensor([[0.0, 0, 64, 64]])
    for model, stds in (
        (build("retinanet"), (1.0,) * 4),
        (build("mask_rcnn"), (0.1, 0.1, 0.2, 0.2)),
    ):
        coder = getattr(model, "roi_heads", model).box_coder
        deltas = torch.tensor([[0.5, -0.5, 40.0, -40.0]]) / torch.tensor(stds)
        expected = delta2bbox(box, deltas, stds, (10**9, 10**9))
        torch.testing.assert_close(coder.decode_single(deltas, box).clamp(min=0), expected)
        assert 0 < expected[0, 3] - expected[0, 1] < 1.1


def test_boxes_on_every_level_are_pooled_from_it() -> None:
    """The rule is the published one, on boxes around each of its borders."""
    ours = build("mask_rcnn")
    sides = torch.tensor([20.0, 111, 113, 223, 225, 447, 449, 900])
    rois = torch.cat([torch.zeros(8, 2), sides[:, None].expand(8, 2)], 1)
    maps = {str(i): torch.full((1, 1, 256 >> i, 256 >> i), float(i)) for i in range(4)}
    pooled = ours.roi_heads.box_roi_pool(maps, [rois], [(1024, 1024)])
    assert pooled.amax((1, 2, 3)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [(96, 128), (90, 75)])
def test_a_published_semantic_fpn_scores_the_same(size: tuple[int, int]) -> None:
    theirs, ours = published("semantic_fpn"), build("semantic_fpn").eval()
    assert not load_dense_checkpoint(ours, theirs.file()).missing
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = theirs.decode_head(theirs.levels(x))
        expected = nn.functional.interpolate(expected, size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


@KINDS
def test_published_files_load_from_disk_into_fused_and_compiled_models(
    kind: str, tmp_path: Any
) -> None:
    torch.save(published(kind).file(CLASSES=("a", "b")), tmp_path / "published.pth")
    plain, fused = build(kind), build(kind, fused=True)
    load_dense_checkpoint(plain, tmp_path / "published.pth")
    load_dense_checkpoint(torch.compile(fused), tmp_path / "published.pth")
    assert plain.state_dict().keys() == fused.state_dict().keys()
    for key, tensor in fused.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[key]), key
    # And what was loaded is saved and read as these models name it.
    again = build(kind)
    torch.save({"model": fused.state_dict()}, tmp_path / "ours.pt")
    assert load_dense_checkpoint(again, str(tmp_path / "ours.pt")).loaded == len(fused.state_dict())
    assert all(torch.equal(t, plain.state_dict()[k]) for k, t in again.state_dict().items())


@KINDS
def test_other_classes_leave_their_layers_out_and_say_so(kind: str) -> None:
    model = build(kind)
    torch.manual_seed(1)
    file = Published(kind, TINY, 7, 16).file()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="the checkpoint has 7 classes, the model 5"):
        report = load_dense_checkpoint(model, file)
    kept = [key for key in report.skipped if key in before]
    assert len(kept) == (6 if kind == "mask_rcnn" else 2)
    for key in kept:
        assert torch.equal(model.state_dict()[key], before[key])
    assert not torch.equal(
        model.state_dict()["backbone.fpn.inner_blocks.0.0.weight"],
        before["backbone.fpn.inner_blocks.0.0.weight"],
    )


def _without_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if "mask_head" not in key}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (
            "retinanet",
            lambda: published("mask_rcnn").file(),
            "a RetinaNet, got those of a Mask R-CNN",
        ),
        (
            "mask_rcnn",
            lambda: published("retinanet").file(),
            "a Mask R-CNN, got those of a RetinaNet",
        ),
        (
            "semantic_fpn",
            lambda: published("retinanet").file(),
            "Semantic FPN, got those of a RetinaNet",
        ),
        (
            "mask_rcnn",
            lambda: _without_masks(published("mask_rcnn").state_dict()),
            "got those of an R-CNN without masks",
        ),
        (
            "semantic_fpn",
            lambda: {"decode_head.conv_seg.weight": torch.zeros(5, 4, 1, 1)},
            "a segmenter with another head",
        ),
        (
            "retinanet",
            lambda: published("retinanet").backbone.state_dict(),
            r"a network without a head .*load_checkpoint\(model.backbone.body",
        ),
        (
            "retinanet",
            lambda: published("retinanet").file(mmdet_version="1.2.0"),
            "of mmdetection 1.2.0, whose anchors lie elsewhere",
        ),
        (
            "retinanet",
            lambda: Published("retinanet", Config((2, 1, 2, 1), TINY.dims), 5, 16).file(),
            r"this is an RCViT with layers \(2, 1, 2, 1\)",
        ),
        (
            "retinanet",
            lambda: Published("retinanet", TINY, 5, 24).file(),
            r"tensors do not fit: backbone.fpn.*expected \(16, 12, 1, 1\), got \(24, 12, 1, 1\)",
        ),
        (
            "retinanet",
            lambda: {
                k: t
                for k, t in published("retinanet").state_dict().items()
                if "retina_reg" not in k
            },
            "lacks 2 of the model's tensors",
        ),
        (
            "retinanet",
            lambda: {**published("retinanet").state_dict(), "neck.more.weight": torch.zeros(1)},
            "has 1 the model lacks",
        ),
        (
            "retinanet",
            lambda: {"state_dict": 3},
            "expected a state dict under 'state_dict', got int",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    kind: str, content: Any, message: str
) -> None:
    model = build(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_dense_checkpoint(model, content())
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_only_heads_are_taken() -> None:
    with pytest.raises(TypeError, match="model: expected one of retinanet"):
        load_dense_checkpoint(nn.Linear(1, 1), {})


def test_a_classifiers_weights_go_into_the_backbone() -> None:
    model, source = build("retinanet"), published("retinanet").backbone
    load_checkpoint(model.backbone.body, {"model": source.state_dict()})
    assert torch.equal(model.backbone.body.norm2.weight, source.norm2.weight)


def test_our_averaged_weights_are_read_when_asked_for() -> None:
    model, other = build("semantic_fpn"), build("semantic_fpn")
    other.head.classifier.bias.data += 1
    content = {"model": model.state_dict(), "model_ema": other.state_dict()}
    load_dense_checkpoint(model, content, use_ema=True)
    assert torch.equal(model.head.classifier.bias, other.head.classifier.bias)
    with pytest.raises(CheckpointError, match="use_ema expected averaged weights"):
        load_dense_checkpoint(model, {"model": model.state_dict()}, use_ema=True)


# Training


def norms(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "body" in name}


@KINDS
@pytest.mark.parametrize("how", ["plain", "fused", "fused later"])
def test_frozen_norms_stay_what_they_are_and_train_their_weights(kind: str, how: str) -> None:
    model = build(kind, fused=how == "fused")
    if how == "fused later":
        assert len(fuse(model).swapped) == 5
    model.train()
    before = norms(model)
    step(model)
    after = norms(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.backbone.body.network[0][0].norm1.weight.grad is not None
    model.freeze_backbone_norms(False)
    step(model)
    moved = norms(model)
    assert not any(
        torch.equal(moved[name], after[name]) for name in moved if name.endswith("running_mean")
    )
    model.freeze_backbone_norms()
    model.eval().train()
    step(model)
    assert all(torch.equal(t, moved[name]) for name, t in norms(model).items())


@KINDS
@pytest.mark.parametrize("frozen", [True, False])
def test_fused_and_plain_train_and_predict_alike(kind: str, frozen: bool) -> None:
    plain = build(kind, freeze_norms=frozen, drop_path_rate=0.2).train()
    fused = build(kind, freeze_norms=frozen, drop_path_rate=0.2, fused=True).train()
    assert sum(isinstance(m, FusedCATM) for m in fused.modules()) == 5
    losses = []
    for model in plain, fused:
        torch.manual_seed(3)
        losses.append(step(model))
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    grads = [
        [p.grad for p in m.backbone.parameters() if p.grad is not None] for m in (plain, fused)
    ]
    assert len(grads[0]) == len(grads[1]) > 100
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 2e-3 * a.norm() + 1e-5
    x = image(96, 128)
    with torch.no_grad():
        maps = [list(m.eval().backbone(x[None]).values()) for m in (plain, fused)]
        unfuse(fused)
        maps.append(list(fused.backbone(x[None]).values()))
    for a, *others in zip(*maps, strict=True):
        for b in others:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn"])
def test_images_without_objects_and_of_mixed_sizes_train(kind: str) -> None:
    model = build(kind).train()
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 70, 120, dtype=torch.uint8),
    }
    losses = model([image(96, 128), image(70, 120)], [*targets(), empty])
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
    results = model.eval()([image(96, 128), image(33, 200)])
    assert len(results) == 2


def test_labels_of_a_retinanet_go_from_one() -> None:
    """The last of five classes is label 5, in what is found and in what is asked for."""
    model = build("retinanet", score_thresh=0.2)
    bias = model.head.classification_head.cls_logits.bias
    with torch.no_grad():
        bias.view(9, 5)[:, 4] = 3.0
        (found,) = model.eval()([image(96, 128)])
    assert set(found["labels"].tolist()) == {5}
    model.train()
    losses = {}
    for label in 1, 5:
        target = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([label])}
        losses[label] = model([image(96, 128)], [target])["classification"].item()
    assert losses[5] < losses[1]


def test_autocast_keeps_boxes_in_float32() -> None:
    model = build("retinanet", score_thresh=0.0).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model([image(96, 128)])
    assert found["boxes"].dtype == torch.float32
    # Half of bfloat16's spacing there would show as whole numbers.
    assert (found["boxes"] % 1 != 0).float().mean() > 0.3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: retinanet("rcvit_xl"),
            ValueError,
            "name: expected one of rcvit_xs, .*got 'rcvit_xl'",
        ),
        (lambda: mask_rcnn(3), TypeError, "name: expected a string or a Config, got int"),
        (lambda: semantic_fpn(TINY, 0), ValueError, "num_classes: expected an integer >= 1, got 0"),
        (lambda: semantic_fpn(TINY, dropout=1.5), ValueError, r"dropout: .*\[0, 1\), got 1.5"),
        (lambda: retinanet(TINY, channels=0), ValueError, "channels: expected an integer >= 1"),
        (lambda: mask_rcnn(TINY, fc_channels=-1), ValueError, "fc_channels: expected an integer"),
        (
            lambda: retinanet(TINY, backend="cpu"),
            ValueError,
            "backend: expected None with fused=False",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_sizes_and_drop_paths_are_the_published_ones() -> None:
    model = semantic_fpn("rcvit_m")
    rates = [m.rate for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.1)
    assert not [m for m in retinanet("rcvit_xs").modules() if type(m).__name__ == "DropPath"]
    assert model.head.dropout.p == 0.1
    assert model.head.classifier.weight.shape == (150, 128, 1, 1)
