"""An RCViT with a feature pyramid on top: what all heads stand on."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool
from typing_extensions import Self

from ..rcvit import CONFIGS, Config, RCViT

# Stochastic depth of the published dense models; 0 for a size of one's own.
DROP_PATH = {"rcvit_xs": 0.0, "rcvit_s": 0.0, "rcvit_m": 0.1, "rcvit_t": 0.1}


class ExtraConvolutions(ExtraFPNBlock):  # type: ignore[misc]
    """Two more levels by convolutions of stride 2, the first of them on the backbone's last map.

    Unlike torchvision's `LastLevelP6P7` without a ReLU between the two, and on the backbone's map even
    where it has as many channels as the pyramid, as in rcvit_s.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, str(len(names)), str(len(names) + 1)]


class Pyramid(nn.Module):
    """``body``, an RCViT without classifier, and ``fpn``, torchvision's feature pyramid on its maps.

    Args:
        body: built with ``fork_feat=True``; its ``out_indices`` are the levels.
        channels: of every level of the pyramid.
        extra: ``"convolutions"`` for two more levels of strides 64 and 128, ``"pool"`` for one of
            stride 64, ``None``.

    Input ``(B, in_chans, H, W)``, normalised, a floating dtype. Output: an ordered dict with keys "0",
    "1", ... fine to coarse, of maps ``(B, channels, ceil(H/s), ceil(W/s))``.
    """

    def __init__(self, body: RCViT, channels: int, extra: str | None) -> None:
        super().__init__()
        widths = [body.config.dims[index] for index in body.out_indices]
        blocks: dict[str | None, Any] = {
            "convolutions": lambda: ExtraConvolutions(widths[-1], channels),
            "pool": LastLevelMaxPool,
            None: lambda: None,
        }
        self.body = body
        self.fpn = FeaturePyramidNetwork(widths, channels, blocks[extra]())
        self.out_channels = channels
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        levels: dict[str, Tensor] = self.fpn(
            OrderedDict((str(index), map_) for index, map_ in enumerate(maps))
        )
        return levels


class OnPyramid(nn.Module):
    """What models whose ``backbone`` is a `Pyramid` have in common."""

    backbone: Pyramid

    def freeze_backbone_norms(self, frozen: bool = True) -> Self:
        """Keep every BatchNorm of the backbone in eval mode, whatever `train` says later.

        The published detectors and segmenters are trained so, from a classifier's weights: with few
        images a batch its statistics are better than the batch's. Weights and biases of the norms stay
        trainable. ``frozen=False`` undoes it. Returns the model.
        """
        self.backbone.body.freeze_norms(frozen)
        return self


def build(
    name: str | Config,
    levels: tuple[int, ...],
    channels: int,
    extra: str | None,
    drop_path_rate: float | None,
    freeze_norms: bool,
    body_options: dict[str, Any],
) -> Pyramid:
    """The backbone of a head; arguments as in `retinanet`."""
    if isinstance(name, str):
        if name not in CONFIGS:
            raise ValueError(
                f"name: expected one of {', '.join(CONFIGS)} or a Config, got {name!r}"
            )
        config = CONFIGS[name]
    elif isinstance(name, Config):
        config = name
    else:
        raise TypeError(f"name: expected a string or a Config, got {type(name).__name__}")
    check_count("channels", channels)
    if drop_path_rate is None:
        drop_path_rate = DROP_PATH.get(name, 0.0) if isinstance(name, str) else 0.0
    body = RCViT(
        config,
        fork_feat=True,
        out_indices=levels,
        drop_path_rate=drop_path_rate,
        **body_options,
    )
    return Pyramid(body.freeze_norms(freeze_norms), channels, extra)


def check_count(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
