"""Detectors and segmenters in the layout of mmdetection 2 and mmsegmentation 0, from their formulas.

Modules are named as there, so that a state dict is one of a published file; what they compute is
compared with `casvit_kernels.models.heads`. Nothing of torchvision's detection package is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from casvit_kernels.models import RCViT


def conv_module(before: int, after: int, kernel: int, norm: bool = False, stride: int = 1) -> Any:
    """A convolution under ``conv``, and a norm under ``bn``."""
    module = nn.Module()
    module.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=not norm)
    if norm:
        module.bn = nn.BatchNorm2d(after)
        nn.init.uniform_(module.bn.weight, 0.5, 1.5)
        nn.init.normal_(module.bn.bias)
        nn.init.normal_(module.bn.running_mean, std=0.2)
        nn.init.uniform_(module.bn.running_var, 0.5, 2.0)
    return module


def run(module: Any, x: Tensor) -> Tensor:
    x = module.conv(x)
    return module.bn(x).relu() if hasattr(module, "bn") else x


class FPN(nn.Module):
    """``extra``: "on_input" (two levels by convolutions on the last input), "pool" (one) or "none"."""

    def __init__(self, widths: tuple[int, ...], channels: int, start: int, extra: str) -> None:
        super().__init__()
        self.start, self.extra = start, extra
        used = widths[start:]
        self.lateral_convs = nn.ModuleList(conv_module(w, channels, 1) for w in used)
        self.fpn_convs = nn.ModuleList(conv_module(channels, channels, 3) for _ in used)
        if extra == "on_input":
            self.fpn_convs.append(conv_module(widths[-1], channels, 3, stride=2))
            self.fpn_convs.append(conv_module(channels, channels, 3, stride=2))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        laterals = [
            run(c, x) for c, x in zip(self.lateral_convs, inputs[self.start :], strict=True)
        ]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(
                laterals[i], laterals[i - 1].shape[2:], mode="nearest"
            )
        outs = [run(self.fpn_convs[i], x) for i, x in enumerate(laterals)]
        if self.extra == "on_input":
            outs.append(run(self.fpn_convs[-2], inputs[-1]))
            outs.append(run(self.fpn_convs[-1], outs[-1]))
        elif self.extra == "pool":
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return outs


def grid(stride: int, scales: list[float], height: int, width: int) -> Tensor:
    """Anchors of a level: for each place (row by row) all ratios, for each of those all scales."""
    cells = []
    for ratio in (0.5, 1.0, 2.0):
        for scale in scales:
            w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
            cells.append([-w / 2, -h / 2, w / 2, h / 2])
    rows = []
    for y in range(height):
        for x in range(width):
            shift = [x * stride, y * stride] * 2
            rows += [[a + b for a, b in zip(cell, shift, strict=True)] for cell in cells]
    return torch.tensor(rows)


def delta2bbox(rois: Tensor, deltas: Tensor, stds: tuple[float, ...], size: Any) -> Tensor:
    dx, dy, dw, dh = (deltas * torch.tensor(stds)).unbind(1)
    most = abs(math.log(16 / 1000))
    dw, dh = dw.clamp(-most, most), dh.clamp(-most, most)
    px, py = (rois[:, 0] + rois[:, 2]) / 2, (rois[:, 1] + rois[:, 3]) / 2
    pw, ph = rois[:, 2] - rois[:, 0], rois[:, 3] - rois[:, 1]
    gx, gy, gw, gh = px + pw * dx, py + ph * dy, pw * dw.exp(), ph * dh.exp()
    boxes = torch.stack([gx - gw / 2, gy - gh / 2, gx + gw / 2, gy + gh / 2], 1)
    height, width = size
    return torch.stack([boxes[:, i].clamp(0, width if i % 2 == 0 else height) for i in range(4)], 1)


def flat(map_: Tensor, last: int) -> Tensor:
    """``(1, A * last, H, W)`` to ``(H * W * A, last)``."""
    return map_.permute(0, 2, 3, 1).reshape(-1, last)


class RetinaHead(nn.Module):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.classes = classes
        self.cls_convs = nn.ModuleList(conv_module(channels, channels, 3) for _ in range(4))
        self.reg_convs = nn.ModuleList(conv_module(channels, channels, 3) for _ in range(4))
        self.retina_cls = nn.Conv2d(channels, 9 * classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(channels, 36, 3, padding=1)

    def forward(self, levels: list[Tensor], size: Any) -> tuple[Tensor, Tensor]:
        """Scores ``(anchors, K)`` and boxes ``(anchors, 4)`` of all levels."""
        scores, boxes = [], []
        scales = [4 * 2 ** (i / 3) for i in range(3)]
        for stride, level in zip((8, 16, 32, 64, 128), levels, strict=True):
            one = two = level
            for a, b in zip(self.cls_convs, self.reg_convs, strict=True):
                one, two = run(a, one).relu(), run(b, two).relu()
            scores.append(flat(self.retina_cls(one), self.classes).sigmoid())
            anchors = grid(stride, scales, *level.shape[2:])
            boxes.append(delta2bbox(anchors, flat(self.retina_reg(two), 4), (1.0,) * 4, size))
        return torch.cat(scores), torch.cat(boxes)


class RPNHead(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, 3, 1)
        self.rpn_reg = nn.Conv2d(channels, 12, 1)

    def forward(self, levels: list[Tensor], size: Any) -> tuple[Tensor, Tensor]:
        scores, boxes = [], []
        for stride, level in zip((4, 8, 16, 32, 64), levels, strict=True):
            x = self.rpn_conv(level).relu()
            anchors = grid(stride, [8.0], *level.shape[2:])
            scores.append(flat(self.rpn_cls(x), 1)[:, 0].sigmoid())
            boxes.append(delta2bbox(anchors, flat(self.rpn_reg(x), 4), (1.0,) * 4, size))
        return torch.cat(scores), torch.cat(boxes)


def pooled(levels: list[Tensor], rois: Tensor, bins: int) -> Tensor:
    """RoIAlign, aligned, from the level of each box's size."""
    out = []
    for roi in rois:
        side = math.sqrt(float((roi[2] - roi[0]) * (roi[3] - roi[1])))
        level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3)
        box = torch.cat([roi.new_zeros(1), roi])[None]
        out.append(roi_align(levels[level], box, bins, 1 / (4 << level), 0, aligned=True))
    return torch.cat(out)


class RoIHead(nn.Module):
    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.bbox_head = nn.Module()
        self.bbox_head.shared_fcs = nn.ModuleList(
            [nn.Linear(channels * 49, width), nn.Linear(width, width)]
        )
        self.bbox_head.fc_cls = nn.Linear(width, classes + 1)  # background last
        self.bbox_head.fc_reg = nn.Linear(width, 4 * classes)
        self.mask_head = nn.Module()
        self.mask_head.convs = nn.ModuleList(conv_module(channels, channels, 3) for _ in range(4))
        self.mask_head.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.mask_head.conv_logits = nn.Conv2d(channels, classes, 1)

    def boxes(self, levels: list[Tensor], rois: Tensor, size: Any) -> tuple[Tensor, Tensor]:
        """Scores ``(N, K)`` without background and boxes ``(N, K, 4)``."""
        x = pooled(levels, rois, 7).flatten(1)
        for layer in self.bbox_head.shared_fcs:
            x = layer(x).relu()
        scores = self.bbox_head.fc_cls(x).softmax(1)[:, :-1]
        deltas = self.bbox_head.fc_reg(x).unflatten(1, (-1, 4))
        boxes = [
            delta2bbox(rois, deltas[:, k], (0.1, 0.1, 0.2, 0.2), size)
            for k in range(deltas.shape[1])
        ]
        return scores, torch.stack(boxes, 1)

    def masks(self, levels: list[Tensor], rois: Tensor) -> Tensor:
        """``(N, K, 28, 28)`` probabilities."""
        x = pooled(levels, rois, 14)
        for layer in self.mask_head.convs:
            x = run(layer, x).relu()
        x = self.mask_head.upsample(x).relu()
        return self.mask_head.conv_logits(x).sigmoid()


class FPNHead(nn.Module):
    def __init__(self, classes: int, before: int, channels: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.scale_heads = nn.ModuleList()
        for level in range(4):
            steps: list[nn.Module] = []
            for step in range(max(1, level)):
                steps.append(conv_module(before if step == 0 else channels, channels, 3, norm=True))
                if level:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*steps))

    def forward(self, levels: list[Tensor]) -> Tensor:
        out: Any = None
        for head, x in zip(self.scale_heads, levels, strict=True):
            for step in head:
                x = run(step, x) if hasattr(step, "conv") else step(x)
            if out is not None:
                x = F.interpolate(x, out.shape[2:], mode="bilinear", align_corners=False)
            out = x if out is None else out + x
        return self.conv_seg(out)


class Published(nn.Module):
    """A model of the published layout: backbone, neck and one of the heads."""

    def __init__(self, kind: str, config: Any, classes: int, channels: int, width: int = 32):
        super().__init__()
        self.backbone = RCViT(config, fork_feat=True)
        if kind == "retinanet":
            self.neck = FPN(config.dims, channels, 1, "on_input")
            self.bbox_head = RetinaHead(classes, channels)
        elif kind == "mask_rcnn":
            self.neck = FPN(config.dims, channels, 0, "pool")
            self.rpn_head = RPNHead(channels)
            self.roi_head = RoIHead(classes, channels, width)
        else:
            self.neck = FPN(config.dims, channels, 0, "none")
            self.decode_head = FPNHead(classes, channels, width)

    def levels(self, x: Tensor) -> list[Tensor]:
        return self.neck(self.backbone(x))

    def file(self, **meta: Any) -> dict[str, Any]:
        """What a published file holds."""
        return {"meta": {"epoch": 12, **meta}, "state_dict": self.state_dict()}
