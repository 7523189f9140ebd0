"""RetinaNet and Mask R-CNN on an RCViT: torchvision's detectors with the published settings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import detection as tv
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from ..rcvit import Config
from .geometry import Anchors, Deltas, Pooling
from .pyramid import OnPyramid, Pyramid, build, check_count

RETINANET_STRIDES = (8, 16, 32, 64, 128)
RCNN_STRIDES = (4, 8, 16, 32, 64)


class RetinaNet(OnPyramid, tv.RetinaNet):  # type: ignore[misc]
    """torchvision's RetinaNet over a `Pyramid`, with labels from 1 as in torchvision's R-CNNs.

    Its classification head has no column for background: class ``k`` of it is label ``k + 1``.
    Arguments are those of torchvision's class, with ``num_classes`` without background. Images, targets,
    losses and results: see `retinanet`. Source: arXiv 1708.02002.
    """

    box_coder: Any

    def __init__(self, backbone: Pyramid, num_classes: int, **options: Any) -> None:
        scales = tuple(4 * 2 ** (third / 3) for third in range(3))
        settings = {"detections_per_img": 100, **options}
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=Anchors(RETINANET_STRIDES, scales),
            **settings,
        )
        self.num_classes = num_classes
        self.box_coder = Deltas(self.box_coder.weights)

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
    ) -> dict[str, Tensor]:
        shifted = [{**target, "labels": target["labels"] - 1} for target in targets]
        losses: dict[str, Tensor] = super().compute_loss(shifted, head_outputs, anchors)
        return losses

    def postprocess_detections(self, *arguments: Any) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = super().postprocess_detections(*arguments)
        return [{**image, "labels": image["labels"] + 1} for image in found]


class MaskRCNN(OnPyramid, tv.MaskRCNN):  # type: ignore[misc]
    """torchvision's Mask R-CNN over a `Pyramid`; label 0 is background.

    Arguments are those of torchvision's class, with ``num_classes`` without background, and
    ``fc_channels``, the width of the two layers before the boxes' classes. Images, targets, losses and
    results: see `mask_rcnn`. Source: arXiv 1703.06870.
    """

    rpn: Any
    roi_heads: Any

    def __init__(
        self, backbone: Pyramid, num_classes: int, fc_channels: int = 1024, **options: Any
    ) -> None:
        channels, outputs = backbone.out_channels, num_classes + 1
        settings = {"rpn_pre_nms_top_n_test": 1000, "rpn_post_nms_top_n_train": 1000, **options}
        super().__init__(
            backbone,
            rpn_anchor_generator=Anchors(RCNN_STRIDES, (8.0,)),
            box_roi_pool=Pooling(7, RCNN_STRIDES[:-1]),
            box_head=TwoMLPHead(channels * 7 * 7, fc_channels),
            box_predictor=FastRCNNPredictor(fc_channels, outputs),
            mask_roi_pool=Pooling(14, RCNN_STRIDES[:-1]),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, outputs),
            **settings,
        )
        self.num_classes = num_classes
        for part in self.rpn, self.roi_heads:
            part.box_coder = Deltas(part.box_coder.weights)
        # As published; torchvision's own layers start with other spreads.
        for layer, std in (
            (self.roi_heads.box_predictor.cls_score, 0.01),
            (self.roi_heads.box_predictor.bbox_pred, 0.001),
        ):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


def retinanet(
    name: str | Config,
    num_classes: int = 80,
    *,
    channels: int = 256,
    drop_path_rate: float | None = None,
    freeze_norms: bool = True,
    fused: bool = False,
    backend: str | None = None,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    **options: Any,
) -> RetinaNet:
    """RetinaNet as published with CAS-ViT: a pyramid from stride 8 to 128, nine anchors a place.

    Args:
        name: "rcvit_xs", "rcvit_s", "rcvit_m" or "rcvit_t"; or a `Config`.
        num_classes: without background. Labels go from 1 to ``num_classes``.
        channels: of the pyramid and the head.
        drop_path_rate: None for the published one: 0 (xs, s), 0.1 (m, t).
        freeze_norms: keep the backbone's BatchNorms in eval mode, as published, for training from a
            classifier's weights; False to train them, from scratch. `freeze_backbone_norms` changes it.
        fused, backend, in_chans, drop_rate: as for `RCViT`.
        options: of torchvision's `RetinaNet`, such as ``min_size``, ``max_size``, ``score_thresh``.

    The model takes a list of images ``(in_chans, H, W)``, floating, in [0, 1], of any sizes, and in
    training a list of targets: ``boxes`` ``(N, 4)`` floating, x1 y1 x2 y2 in pixels, and ``labels``
    ``(N,)`` int64. In training it returns a dict of losses, which are torchvision's; else for every
    image ``boxes``, ``scores`` and ``labels``.

    Raises:
        ValueError, TypeError: an argument is out of range, or no such option (named in the message).

    Source: CAS-ViT, arXiv 2408.03703, section 4; RetinaNet, arXiv 1708.02002.
    """
    check_count("num_classes", num_classes)
    body = {"fused": fused, "backend": backend, "in_chans": in_chans, "drop_rate": drop_rate}
    pyramid = build(name, (1, 2, 3), channels, "convolutions", drop_path_rate, freeze_norms, body)
    return RetinaNet(pyramid, num_classes, **options)


def mask_rcnn(
    name: str | Config,
    num_classes: int = 80,
    *,
    channels: int = 256,
    fc_channels: int = 1024,
    drop_path_rate: float | None = None,
    freeze_norms: bool = True,
    fused: bool = False,
    backend: str | None = None,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    **options: Any,
) -> MaskRCNN:
    """Mask R-CNN as published with CAS-ViT: a pyramid from stride 4 to 64, three anchors a place.

    Args:
        name, num_classes, channels, drop_path_rate, freeze_norms: as for `retinanet`.
        fused, backend, in_chans, drop_rate: as for `RCViT`.
        fc_channels: width of the two layers before the boxes' classes.
        options: of torchvision's `MaskRCNN`.

    Images, targets and results as for `retinanet`, and ``masks``: of targets ``(N, H, W)`` uint8, of
    results ``(N, 1, H, W)`` probabilities.

    Raises:
        ValueError, TypeError: an argument is out of range, or no such option (named in the message).

    Source: CAS-ViT, arXiv 2408.03703, section 4; Mask R-CNN, arXiv 1703.06870.
    """
    check_count("num_classes", num_classes)
    check_count("fc_channels", fc_channels)
    body = {"fused": fused, "backend": backend, "in_chans": in_chans, "drop_rate": drop_rate}
    pyramid = build(name, (0, 1, 2, 3), channels, "pool", drop_path_rate, freeze_norms, body)
    return MaskRCNN(pyramid, num_classes, fc_channels, **options)
