"""Anchors, box deltas and pooling as the published detectors have them, where torchvision differs.

Each is a subclass of torchvision's own. In those anchors are rounded to whole pixels and their distance
is inferred from the padded image, deltas are bounded on one side, and pooling starts half a pixel off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, roi_align

RATIOS = (0.5, 1.0, 2.0)  # height by width


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors centred on ``stride * (column, row)``, with sides that are not rounded.

    Args:
        strides: of the levels.
        scales: of the square anchors' sides, in strides.
    """

    def __init__(self, strides: tuple[int, ...], scales: tuple[float, ...]) -> None:
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        super().__init__(sizes, (RATIOS,) * len(strides))
        self.strides = strides

    def generate_anchors(
        self,
        scales: tuple[float, ...],
        aspect_ratios: tuple[float, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """``(ratios * scales, 4)``: corners around (0, 0), all scales of a ratio together."""
        sides = torch.tensor(scales, dtype=dtype, device=device)
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        half_w = (sides / roots[:, None]).flatten() / 2
        half_h = (sides * roots[:, None]).flatten() / 2
        return torch.stack([-half_w, -half_h, half_w, half_h], 1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        like = feature_maps[0]
        # Under bfloat16 autocast pixels beyond 256 would be rounded.
        self.set_cell_anchors(torch.promote_types(like.dtype, torch.float32), like.device)
        sizes = [list(map_.shape[-2:]) for map_ in feature_maps]
        steps = [[torch.tensor(s, device=like.device)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors(sizes, steps))
        return [anchors] * len(image_list.image_sizes)


class Deltas(BoxCoder):  # type: ignore[misc]
    """torchvision's box coder, with the logarithm of a side's ratio bounded from below too.

    Decodes in the boxes' dtype: under autocast deltas are of fewer digits than pixels need.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        rel_codes = rel_codes.to(torch.promote_types(rel_codes.dtype, boxes.dtype))
        least = rel_codes.new_tensor(
            [-math.inf, -math.inf, *(-self.bbox_xform_clip * w for w in self.weights[2:])]
        )
        bounded = rel_codes.unflatten(-1, (-1, 4)).maximum(least).flatten(-2)
        decoded: Tensor = super().decode_single(bounded, boxes)
        return decoded


class Pooling(MultiScaleRoIAlign):  # type: ignore[misc]
    """RoIAlign with pixel centres at half integers, from the level that a box's size asks for.

    Boxes of up to 112 pixels (the square root of their area) are pooled from the first level, each
    doubling from one further. Every bin takes as many samples as it has pixels.

    Args:
        output_size: bins of a side.
        strides: of the levels, named "0", "1", ...
    """

    def __init__(self, output_size: int, strides: tuple[int, ...]) -> None:
        names = [str(level) for level in range(len(strides))]
        super().__init__(names, output_size, sampling_ratio=0)
        self.strides = strides

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """``(boxes, C, output_size, output_size)``; boxes in pixels of the image."""
        images = torch.cat([b.new_full((len(b), 1), index) for index, b in enumerate(boxes)])
        corners = torch.cat(boxes)
        rois = torch.cat([images, corners], 1)
        sides = (corners[:, 2:] - corners[:, :2]).prod(1).sqrt()
        levels = (sides / (14 * self.strides[0]) + 1e-6).log2().floor()
        levels = levels.clamp(0, len(self.strides) - 1)
        maps = [x[name] for name in self.featmap_names]
        out = maps[0].new_zeros((len(rois), maps[0].shape[1], *self.output_size))
        for level, (map_, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(levels == level)[0]
            pooled = roi_align(map_, rois[chosen], self.output_size, 1 / stride, aligned=True)
            out[chosen] = pooled.to(out.dtype)
        return out
