"""A ViT of timm for the demo: built at a size, loaded, never downloaded."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._optional import need


@dataclass(frozen=True)
class Network:
    """A model in eval mode without its classifier, and what it wants of images."""

    model: nn.Module
    size: int  # pixels, both ways
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build(name: str, size: int | None, checkpoint: Path | None, seed: int) -> Network:
    """The model `name` of timm, from `checkpoint` or with its initial weights.

    Args:
        size: pixels of its images, both ways; None: those it was made for.
        seed: of the initial weights.

    Raises:
        ValueError: timm has no such model, it cannot run at that size, or the checkpoint is not one of
            it; the message names the argument.
        MissingExtra: timm is not installed.
    """
    timm = need("timm", "timm")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f" (near: {', '.join(near)})" if near else ""
        raise ValueError(f"--model: expected the name of a timm model, got {name!r}{hint}")
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0).eval()
    if checkpoint is not None:
        _load(model, name, checkpoint)
    wanted = need("timm.data", "timm").resolve_model_data_config(model)
    usual = int(wanted["input_size"][-1])
    if size is not None and size != usual:
        _resize(model, name, size)
    mean, std = tuple(wanted["mean"]), tuple(wanted["std"])
    return Network(model, usual if size is None else size, mean, std)


def _load(model: nn.Module, name: str, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"--checkpoint: expected a checkpoint file, got {path}")
    try:
        state = need("timm.models", "timm").load_state_dict(str(path))  # safe loading alone
        rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if rename is not None:  # published files of this architecture
            state = rename(state, model)
        missing, unexpected = model.load_state_dict(state, strict=False)
    # A file of anything: unpickling, renaming and comparing shapes raise what they like.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"--checkpoint: expected weights of {name}, got {path} ({reason})"
        ) from None
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or "head"
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    unexpected = [key for key in unexpected if not key.startswith(tuple(f"{h}." for h in heads))]
    for keys, what in ((missing, "lacks"), (unexpected, "has")):
        if keys:
            raise ValueError(
                f"--checkpoint: expected weights of {name}, got {path}, which {what} "
                f"{keys[0]!r} and {len(keys) - 1} more"
            )


def _resize(model: nn.Module, name: str, size: int) -> None:
    embedding: Any = getattr(model, "patch_embed", None)
    resize: Any = getattr(model, "set_input_size", None)
    if resize is None or not hasattr(embedding, "feat_ratio"):
        raise ValueError(f"--size: {name} cannot be set to another size: leave --size out")
    patch = int(embedding.feat_ratio())
    if size % patch:
        raise ValueError(f"--size: expected a multiple of the patch size, {patch}, got {size}")
    resize(img_size=(size, size))
