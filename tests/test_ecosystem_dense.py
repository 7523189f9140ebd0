"""timm, segmentation-models-pytorch, torchvision and transformers stand on an RCViT, plain and fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import casvit_kernels.models  # noqa: F401  timm knows the models from here on
from casvit_kernels import FusedCATM, fuse
from casvit_kernels.models import rcvit_xs

timm = pytest.importorskip("timm")


def image(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def segmenter(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        smp = pytest.importorskip("segmentation_models_pytorch")
        return getattr(smp, name)("tu-rcvit_xs", encoder_weights=None, classes=4, **options)

    return build


def detector(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        detection = pytest.importorskip("torchvision.models.detection")
        body = rcvit_xs(num_classes=0)
        backbone = detection.backbone_utils.BackboneWithFPN(
            body.sequential(),
            {f"stage{index}": str(index) for index in range(4)},
            list(body.config.dims),
            32,
        )
        return getattr(detection, name)(backbone, 4, min_size=64, max_size=64, **options)

    return build


def retinanet() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    # As many kinds of anchors as levels: four and the one that BackboneWithFPN adds.
    sizes = tuple((side,) for side in (16, 32, 64, 128, 256))
    generator = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    return detector("RetinaNet", anchor_generator=generator)()


def transformers_backbone() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(backbone="rcvit_xs", use_pretrained_backbone=False)
    return transformers.TimmBackbone(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model("rcvit_xs", features_only=True),
    "timm-two": lambda: timm.create_model("rcvit_xs", features_only=True, out_indices=(-3, 2)),
    "smp-unet": segmenter("Unet"),
    "smp-unet-4": segmenter("Unet", encoder_depth=4, decoder_channels=(64, 32, 16, 8)),
    "smp-fpn": segmenter("FPN"),
    "smp-upernet": segmenter("UPerNet"),
    "smp-segformer": segmenter("Segformer"),
    "smp-deeplab": segmenter("DeepLabV3Plus", encoder_depth=4),
    "torchvision-faster": detector("FasterRCNN"),
    "torchvision-mask": detector("MaskRCNN"),
    "torchvision-retina": retinanet,
    "transformers": transformers_backbone,
}


def targets() -> list[dict[str, Tensor]]:
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 10:40, 8:50] = 1
    box, label = torch.tensor([[8.0, 10, 50, 40]]), torch.tensor([2])
    return [{"boxes": box, "labels": label, "masks": masks}] * 2


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if hasattr(found, "feature_maps"):
        return list(found.feature_maps)
    values = found.values() if isinstance(found, dict) else found
    return [tensor for value in values for tensor in tensors(value)]


def outputs(name: str, model: nn.Module) -> list[Tensor]:
    """Maps, scores or losses; of a detector in eval its pyramid, as boxes come in any order."""
    x = image(2, 3, 64, 64)
    torch.manual_seed(0)  # of dropout, and of the boxes that are looked at
    if name.startswith("torchvision"):
        if model.training:
            return tensors(model(list(x), targets()))
        return tensors(model.backbone(x))  # type: ignore[operator]
    return tensors(model(x))


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_and_a_fused_forward_equal_to_the_plain_one(name: str) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]().train()
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    three_stages = name in ("timm-two", "smp-unet-4", "smp-deeplab")
    assert len(report.swapped) == (8 if three_stages else 10)
    assert not report.refused
    gradients = []
    for model in plain, fused:
        found = outputs(name, model)
        sum(o.float().square().mean() for o in found).backward()  # type: ignore[union-attr]
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        optimizer.step()
    assert len(gradients[0]) == len(gradients[1]) > 100
    # Over one place a channel, in the last stage, BatchNorm of two images magnifies roundings.
    total = sum(float(g.norm()) ** 2 for g in gradients[0]) ** 0.5
    apart = sum(float((a - b).norm()) ** 2 for a, b in zip(*gradients, strict=True)) ** 0.5
    assert apart < 2e-2 * total
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    fused.load_state_dict(before)
    plain.eval()
    fused.eval()
    with torch.no_grad():
        for a, b in zip(outputs(name, fused), outputs(name, plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["torchvision-faster", "torchvision-mask", "torchvision-retina"])
def test_detectors_find_the_same_boxes(name: str) -> None:
    plain = MODELS[name]().eval()
    fused = copy.deepcopy(plain)
    fuse(fused)
    with torch.no_grad():
        one, other = (model([image(3, 64, 64)])[0] for model in (plain, fused))
    assert len(one["boxes"]) == len(other["boxes"])
    if len(one["boxes"]):
        assert (one["scores"] - other["scores"]).abs().max() < 1e-3


def test_fused_mixers_by_an_option_of_each_package() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    for model in (
        timm.create_model("rcvit_xs", features_only=True, fused=True),
        smp.Unet("tu-rcvit_xs", encoder_weights=None, fused=True),
    ):
        assert sum(isinstance(module, FusedCATM) for module in model.modules()) == 10


@pytest.mark.parametrize("name", ["DeepLabV3", "DeepLabV3Plus", "PAN"])
@pytest.mark.parametrize("stride", [8, 16])
def test_a_dilated_encoder_is_refused_with_the_reason(name: str, stride: int) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    if name == "PAN" and stride == 8:
        pytest.skip("PAN has strides of 16 and 32")
    with pytest.raises(
        ValueError, match=f"output_stride: expected 32.* rcvit_xs is dilated, got {stride}"
    ):
        getattr(smp, name)("tu-rcvit_xs", encoder_weights=None, encoder_output_stride=stride)


def test_a_stride_that_the_stages_have_is_taken() -> None:
    model = timm.create_model("rcvit_xs", features_only=True, output_stride=16, out_indices=(0, 2))
    assert model.feature_info.reduction() == [4, 16]
    with pytest.raises(ValueError, match=r"expected 16 or 32, .* got 8 \(out_indices without"):
        timm.create_model("rcvit_xs", features_only=True, output_stride=8, out_indices=(0, 2))


def test_timm_refuses_another_stride_for_features() -> None:
    for stride in 8, 16, 64:
        with pytest.raises(ValueError, match=f"output_stride: expected 32.*got {stride}"):
            timm.create_model("rcvit_xs", features_only=True, output_stride=stride)


def test_frozen_norms_hold_below_the_tools() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-rcvit_xs", encoder_weights=None)
    model.encoder.model.freeze_norms()
    fuse(model)
    model.train()
    body = model.encoder.model
    before = {name: buffer.clone() for name, buffer in body.named_buffers()}
    model(image(2, 3, 64, 64)).mean().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in body.named_buffers())
    assert model.decoder.training
    body.freeze_norms(False)
    model(image(2, 3, 64, 64)).mean().backward()
    moved = dict(body.named_buffers())
    assert not any(torch.equal(moved[n], before[n]) for n in moved if n.endswith("running_mean"))


def test_stages_in_order_are_the_models_own() -> None:
    model = rcvit_xs(num_classes=0).eval()
    stages = model.sequential()
    assert [name for name, _ in stages.named_children()] == [
        "stem",
        *(f"stage{i}" for i in range(4)),
    ]
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_stages(x)
        for (name, stage), index in zip(stages.named_children(), (-1, 0, 1, 2, 3), strict=True):
            x = stage(x)
            assert index < 0 or torch.equal(x, expected[index]), name
    assert {id(p) for p in stages.parameters()} < {id(p) for p in model.parameters()}


def test_transformers_backbone_has_its_defaults() -> None:
    backbone = transformers_backbone().eval()
    with torch.no_grad():
        maps = backbone(image(1, 3, 64, 96)).feature_maps
    assert [tuple(map_.shape) for map_ in maps] == [(1, 220, 2, 3)]
