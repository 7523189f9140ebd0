"""Semantic FPN on an RCViT."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ..rcvit import Config
from .pyramid import OnPyramid, Pyramid, build, check_count

STRIDES = (4, 8, 16, 32)


class Double(nn.Module):
    """Bilinear upsampling of ``(B, C, H, W)`` to ``(B, C, 2H, 2W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class SemanticFPNHead(nn.Module):
    """Every level through 3x3 convolutions and doublings up to stride 4, summed and classified.

    Args:
        in_channels: of every level.
        channels: between.
        num_classes: outputs.
        dropout: probability of dropping a channel before the classifier.

    Input: maps of strides 4, 8, 16 and 32. Output ``(B, num_classes, ceil(H/4), ceil(W/4))``.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for stride in STRIDES:
            steps: list[nn.Module] = []
            doublings = int(math.log2(stride // STRIDES[0]))
            for step in range(max(1, doublings)):
                steps += [
                    nn.Conv2d(
                        in_channels if step == 0 else channels, channels, 3, 1, 1, bias=False
                    ),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
                if doublings:
                    steps.append(Double())
            self.scale_heads.append(nn.Sequential(*steps))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.classifier:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(self, levels: list[Tensor]) -> Tensor:
        out: Tensor = self.scale_heads[0](levels[0])
        for head, level in zip(list(self.scale_heads)[1:], levels[1:], strict=True):
            # Doubled maps are a little larger where a size is no multiple of 32.
            out = out + F.interpolate(
                head(level), out.shape[2:], mode="bilinear", align_corners=False
            )
        scores: Tensor = self.classifier(self.dropout(out))
        return scores


class SemanticFPN(OnPyramid):
    """A segmenter: ``(B, in_chans, H, W)``, normalised, to scores ``(B, num_classes, H, W)``.

    Args:
        backbone: a `Pyramid` with levels of strides 4, 8, 16 and 32.
        num_classes: outputs.
        channels: of the head.
        dropout: probability of dropping a channel before the classifier.

    Source: Semantic FPN, arXiv 1901.02446.
    """

    def __init__(
        self, backbone: Pyramid, num_classes: int, channels: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.head = SemanticFPNHead(backbone.out_channels, channels, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(list(self.backbone(x).values()))
        return F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=False)


def semantic_fpn(
    name: str | Config,
    num_classes: int = 150,
    *,
    channels: int = 128,
    pyramid_channels: int = 256,
    dropout: float = 0.1,
    drop_path_rate: float | None = None,
    freeze_norms: bool = True,
    fused: bool = False,
    backend: str | None = None,
    in_chans: int = 3,
    drop_rate: float = 0.0,
) -> SemanticFPN:
    """Semantic FPN as published with CAS-ViT: levels of strides 4, 8, 16 and 32.

    Args:
        name: "rcvit_xs", "rcvit_s", "rcvit_m" or "rcvit_t"; or a `Config`.
        num_classes: outputs, background included where it is one; 150 of ADE20K.
        channels: of the head.
        pyramid_channels: of the pyramid.
        dropout: probability of dropping a channel before the classifier.
        drop_path_rate: None for the published one: 0 (xs, s), 0.1 (m, t).
        freeze_norms: keep the backbone's BatchNorms in eval mode, as published, for training from a
            classifier's weights; False to train them, from scratch. `freeze_backbone_norms` changes it.
        fused, backend, in_chans, drop_rate: as for `RCViT`.

    Input ``(B, in_chans, H, W)``, a floating dtype, normalised by ImageNet's mean and deviation. Output
    ``(B, num_classes, H, W)``, scores for `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError, TypeError: an argument is out of range (named in the message).

    Source: CAS-ViT, arXiv 2408.03703, section 4; Semantic FPN, arXiv 1901.02446.
    """
    check_count("num_classes", num_classes)
    check_count("pyramid_channels", pyramid_channels)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
    check_count("channels", channels)
    body = {"fused": fused, "backend": backend, "in_chans": in_chans, "drop_rate": drop_rate}
    pyramid = build(name, (0, 1, 2, 3), pyramid_channels, None, drop_path_rate, freeze_norms, body)
    return SemanticFPN(pyramid, num_classes, channels, dropout)
