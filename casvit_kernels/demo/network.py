"""The network of the demo: built, loaded or calibrated, and its mixers' real inputs."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import models
from ..ops.mixer.reference import AdditiveTokenMixer


def build(
    name: str, checkpoint: Path | None, seed: int, classes: int = 1000, *, whole: bool = False
) -> nn.Module:
    """The model `name` in eval mode, from `checkpoint` or with its initial weights.

    whole: a checkpoint whose heads have another number of classes is refused; else they are left out.

    Raises:
        ValueError: the name is not known, or the checkpoint is not one of it; names the argument.
    """
    if name not in models.CONFIGS:
        raise ValueError(f"--model: expected one of {', '.join(models.CONFIGS)}, got {name!r}")
    torch.manual_seed(seed)
    model: nn.Module = getattr(models, name)(num_classes=classes)
    if checkpoint is not None:
        if not checkpoint.is_file():
            raise ValueError(f"--checkpoint: expected a checkpoint file, got {checkpoint}")
        with warnings.catch_warnings():
            if whole:  # raised below
                warnings.simplefilter("ignore")
            report = models.load_checkpoint(model, checkpoint)
        if whole and report.skipped:
            key, why = next(iter(report.skipped.items()))
            raise ValueError(
                f"--classes: expected the checkpoint's number, got {classes} ({key}: {why})"
            )
    model.eval()
    return model


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    """Give an untrained model the normalisation statistics of ``x`` ``(B, 3, H, W)``.

    With the initial statistics (mean 0, variance 1) activations shrink from block to block until
    the gates see nothing of the image.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this one pass
    model.train()
    model(x)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def mixers(model: nn.Module) -> dict[str, AdditiveTokenMixer]:
    """Every token mixer by name, in the order of the network."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdditiveTokenMixer)}


def stages(names: list[str]) -> list[list[str]]:
    """Names of mixers (``network.0.1.attn``) grouped by stage (``network.0``)."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rsplit(".", 2)[0], []).append(name)
    return list(groups.values())


@torch.no_grad()
def mixer_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every mixer receives while the model computes ``x``: ``(B, C, H, W)`` by name."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0].clone()

        return hook

    handles = [m.register_forward_pre_hook(keep(n)) for n, m in mixers(model).items()]  # type: ignore[arg-type]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
