"""Published settings (arXiv 2210.01035) for `expedite`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SOURCE = "arXiv 2210.01035, settings of its experiments"


@dataclass(frozen=True)
class Preset:
    """One published experiment.

    Attributes:
        task: of dense prediction.
        model: what it was published for.
        data: what it was published for.
        at, grid, iterations, window, temperature, neighbours: for `expedite`. The paper gives the number
            of clusters; the grid is its square root both ways.
        in_windows: clusters are made inside of each attention window (Swin), which `expedite` refuses;
            the grid is a window's, and `cluster_tokens` serves it with windows as the batch.
        source: where the figures are from.
    """

    task: str
    model: str
    data: str
    at: int
    grid: tuple[int, int]
    iterations: int
    window: int
    temperature: float
    neighbours: int
    in_windows: bool = False
    source: str = SOURCE

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `expedite`, as in ``expedite(model, **PRESETS[name].settings)``.

        Raises:
            ValueError: clusters are made inside of windows, which `expedite` does not serve.
        """
        if self.in_windows:
            raise ValueError(
                f"{self.model}: its clusters are made inside of each attention window, which expedite "
                "does not serve: give windows as the batch to cluster_tokens"
            )
        names = ("at", "grid", "iterations", "window", "temperature", "neighbours")
        return {name: getattr(self, name) for name in names}


# Of the five tasks (semantic, panoptic and instance segmentation, detection, depth) these are the
# settings in our sources; those of detection, of depth and of panoptic segmentation are not among them.
PRESETS = {
    "segmenter_vit_large_ade20k": Preset(
        "semantic segmentation", "Segmenter ViT-L/16", "ADE20K", 10, (28, 28), 5, 5, 0.02, 20
    ),
    "segmenter_vit_large_cityscapes": Preset(
        "semantic segmentation", "Segmenter ViT-L/16", "Cityscapes", 12, (32, 32), 5, 5, 0.02, 20
    ),
    "segmenter_vit_large_pascal_context": Preset(
        "semantic segmentation",
        "Segmenter ViT-L/16",
        "Pascal Context",
        14,
        (20, 20),
        5,
        5,
        0.02,
        20,
    ),
    # Which of segmentation's three tasks this was is not in our sources.
    "mask2former_swin_large_ade20k": Preset(
        "segmentation", "Mask2Former Swin-L", "ADE20K", 8, (8, 8), 5, 5, 0.01, 10, in_windows=True
    ),
}
