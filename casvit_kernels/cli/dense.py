"""What `casvit-kernels export --head` writes: dense backbones, with their pyramid, and segmenters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models

BACKBONE, SEGMENTER = "backbone", "semantic_fpn"
HEADS = (BACKBONE, "retinanet", "mask_rcnn", SEGMENTER)


def build(
    head: str, name: str, checkpoint: Path | None, seed: int, classes: int | None
) -> nn.Module:
    """The part that a file can hold, in eval mode, from `checkpoint` or with initial weights.

    ``"backbone"``: the maps of four stages. Of a detector the backbone with its pyramid: what is behind
    it keeps as many boxes as it finds. A segmenter is whole.

    Raises:
        ValueError: the checkpoint is not one of it; names the argument.
        MissingExtra: torchvision is missing, and `head` is no backbone.
    """
    if checkpoint is not None and not checkpoint.is_file():
        raise ValueError(f"--checkpoint: expected a checkpoint file, got {checkpoint}")
    torch.manual_seed(seed)
    if head == BACKBONE:
        model: nn.Module = getattr(models, name)(fork_feat=True)
        if checkpoint is not None:
            models.load_checkpoint(model, checkpoint)
        return model.eval()
    from ..models import heads

    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    whole: nn.Module = getattr(heads, head)(name, **options)
    if checkpoint is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # raised below, or not in the file
            report = heads.load_dense_checkpoint(whole, checkpoint)
        left_out = {key: why for key, why in report.skipped.items() if key.startswith("head.")}
        if head == SEGMENTER and left_out:
            key, why = next(iter(left_out.items()))
            raise ValueError(
                f"--classes: expected the checkpoint's number, got {classes} ({key}: {why})"
            )
    whole.eval()
    return whole if head == SEGMENTER else whole.get_submodule("backbone")
