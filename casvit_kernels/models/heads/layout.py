"""Where the tensors of a published detector or segmenter belong: keys, and order of classes.

Published files have the layout of mmdetection 2 and 3 and mmsegmentation 0 and 1. In it the classes of
R-CNN heads come first and the background last; here, as in torchvision, background is class 0. What a
class-specific head has for the background (deltas, masks) is never read: zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


class Rule(NamedTuple):
    """A published key as a pattern, ours as its replacement, and what becomes of the tensor."""

    pattern: str
    ours: str
    change: Change | None = None


def _background_first(rows: Tensor) -> Tensor:
    """``(K + 1, ...)`` with background last."""
    return rows.roll(1, 0)


def _background_boxes(rows: Tensor) -> Tensor:
    """``(4 K, ...)``: four deltas of each class."""
    return torch.cat([rows.new_zeros(4, *rows.shape[1:]), rows])


def _background_mask(rows: Tensor) -> Tensor:
    """``(K, ...)``: a mask of each class."""
    return torch.cat([rows.new_zeros(1, *rows.shape[1:]), rows])


_END = r"\.(weight|bias)"
_BODY = Rule(r"backbone\.(.+)", r"backbone.body.\1")


def _pyramid(levels: int) -> tuple[Rule, ...]:
    inner = rf"neck\.lateral_convs\.([0-{levels - 1}])\.conv{_END}"
    layer = rf"neck\.fpn_convs\.([0-{levels - 1}])\.conv{_END}"
    return (
        _BODY,
        Rule(inner, r"backbone.fpn.inner_blocks.\1.0.\2"),
        Rule(layer, r"backbone.fpn.layer_blocks.\1.0.\2"),
    )


RETINANET = (
    *_pyramid(3),
    Rule(rf"neck\.fpn_convs\.3\.conv{_END}", r"backbone.fpn.extra_blocks.p6.\1"),
    Rule(rf"neck\.fpn_convs\.4\.conv{_END}", r"backbone.fpn.extra_blocks.p7.\1"),
    Rule(rf"bbox_head\.cls_convs\.(\d)\.conv{_END}", r"head.classification_head.conv.\1.0.\2"),
    Rule(rf"bbox_head\.reg_convs\.(\d)\.conv{_END}", r"head.regression_head.conv.\1.0.\2"),
    Rule(rf"bbox_head\.retina_cls{_END}", r"head.classification_head.cls_logits.\1"),
    Rule(rf"bbox_head\.retina_reg{_END}", r"head.regression_head.bbox_reg.\1"),
)

_BOX, _MASK = r"roi_head\.bbox_head", r"roi_head\.mask_head"
MASK_RCNN = (
    *_pyramid(4),
    Rule(rf"rpn_head\.rpn_conv{_END}", r"rpn.head.conv.0.0.\1"),
    Rule(rf"rpn_head\.rpn_cls{_END}", r"rpn.head.cls_logits.\1"),
    Rule(rf"rpn_head\.rpn_reg{_END}", r"rpn.head.bbox_pred.\1"),
    Rule(rf"{_BOX}\.shared_fcs\.0{_END}", r"roi_heads.box_head.fc6.\1"),
    Rule(rf"{_BOX}\.shared_fcs\.1{_END}", r"roi_heads.box_head.fc7.\1"),
    Rule(rf"{_BOX}\.fc_cls{_END}", r"roi_heads.box_predictor.cls_score.\1", _background_first),
    Rule(rf"{_BOX}\.fc_reg{_END}", r"roi_heads.box_predictor.bbox_pred.\1", _background_boxes),
    Rule(rf"{_MASK}\.convs\.(\d)\.conv{_END}", r"roi_heads.mask_head.\1.0.\2"),
    Rule(rf"{_MASK}\.upsample{_END}", r"roi_heads.mask_predictor.conv5_mask.\1"),
    Rule(
        rf"{_MASK}\.conv_logits{_END}",
        r"roi_heads.mask_predictor.mask_fcn_logits.\1",
        _background_mask,
    ),
)


def _scale_heads() -> tuple[Rule, ...]:
    """A convolution and its norm are one module there; here they stand one by one."""
    rules = []
    for level, convolutions in enumerate((1, 1, 2, 3)):
        for step in range(convolutions):
            # Convolution, norm and activation count once there and thrice here; a doubling once.
            there, here = (2 * step, 4 * step) if level else (0, 0)
            theirs, ours = (
                rf"decode_head\.scale_heads\.{level}\.{there}",
                f"head.scale_heads.{level}",
            )
            rules += [
                Rule(rf"{theirs}\.conv\.weight", f"{ours}.{here}.weight"),
                Rule(rf"{theirs}\.bn\.(\w+)", rf"{ours}.{here + 1}.\1"),
            ]
    return tuple(rules)


SEMANTIC_FPN = (
    *_pyramid(4),
    *_scale_heads(),
    Rule(rf"decode_head\.conv_seg{_END}", r"head.classifier.\1"),
)


class Kind(NamedTuple):
    """One kind of head.

    name: in messages.
    rules: of published keys.
    classes: for the layers whose rows are per class, by our key without ".weight": how many of the rows
        a class has, and how many more classes (the background) there are.
    """

    name: str
    rules: tuple[Rule, ...]
    classes: Mapping[str, tuple[int, int]]


KINDS = {
    "RetinaNet": Kind("a RetinaNet", RETINANET, {"head.classification_head.cls_logits": (9, 0)}),
    "MaskRCNN": Kind(
        "a Mask R-CNN",
        MASK_RCNN,
        {
            "roi_heads.box_predictor.cls_score": (1, 1),
            "roi_heads.box_predictor.bbox_pred": (4, 1),
            "roi_heads.mask_predictor.mask_fcn_logits": (1, 1),
        },
    ),
    "SemanticFPN": Kind("a Semantic FPN", SEMANTIC_FPN, {"head.classifier": (1, 0)}),
}

# What tells a head by a key; of published files first, then of ours, then of heads that are not here.
_SIGNS = (
    (r"bbox_head\.retina_cls\.|head\.classification_head\.cls_logits\.", "RetinaNet"),
    (r"roi_head\.mask_head\.|roi_heads\.mask_predictor\.", "MaskRCNN"),
    (r"decode_head\.scale_heads\.|head\.scale_heads\.", "SemanticFPN"),
    (r"roi_head\.|roi_heads\.", "an R-CNN without masks"),
    (r"decode_head\.", "a segmenter with another head than Semantic FPN's"),
    (r"bbox_head\.", "a detector with another head than RetinaNet's"),
    (r"(backbone\.)?patch_embed\.", "a network without a head"),
)


def kind_of(keys: Mapping[str, Tensor]) -> str:
    """A name in `KINDS`, or in words what else the keys belong to."""
    for pattern, kind in _SIGNS:
        if any(re.match(pattern, key) for key in keys):
            return kind
    return "something else"


def is_published(keys: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of published files and not ours."""
    return any(re.match(r"(neck|bbox_head|rpn_head|roi_head|decode_head)\.", key) for key in keys)


def translated(
    state: Mapping[str, Tensor], rules: tuple[Rule, ...]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors under our keys and in our order of classes, and the keys that no rule knows."""
    ours: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        for rule in rules:
            match = re.fullmatch(rule.pattern, key)
            if match:
                ours[match.expand(rule.ours)] = rule.change(tensor) if rule.change else tensor
                break
        else:
            unknown.append(key)
    return ours, tuple(unknown)
