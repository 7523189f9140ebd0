"""Pads the channels of a network with zeros to a multiple of 8: the same function, aligned maps.

A padded channel is zero in every map: its weights and biases are zero, a normalisation maps zero to
zero, and ReLU, GELU and the gates' products keep zero. So the other channels keep their values, up to
the order in which sums are rounded.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models.checkpoint import config_of
from ...models.rcvit import Config, RCViT
from ...ops.mixer.reference import AdditiveTokenMixer

MULTIPLE = 8


class PadReport(NamedTuple):
    """Channels of the maps before and after, stage by stage (one entry for a mixer)."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def changed(self) -> bool:
        return self.before != self.after


class Cropped(nn.Module):
    """A model whose maps are wider than its outputs should be.

    Args:
        model: gives a tensor or a list of tensors, channels in dimension 1.
        channels: to keep, for each output; None keeps all.
    """

    def __init__(self, model: nn.Module, channels: tuple[int, ...] | None) -> None:
        super().__init__()
        self.model = model
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        out: Tensor | list[Tensor] = self.model(x)
        if self.channels is None:
            return out
        if isinstance(out, Tensor):
            return _first(out, self.channels[0])
        return [_first(y, n) for y, n in zip(out, self.channels, strict=True)]


def _first(x: Tensor, channels: int) -> Tensor:
    # A slice that takes all is an alias, which coremltools does not convert.
    return x if x.shape[1] == channels else x[:, :channels]


def padded(model: nn.Module, multiple: int = MULTIPLE) -> tuple[nn.Module, PadReport]:
    """A copy of ``model`` in eval mode, in which every map has a multiple of ``multiple`` channels.

    Inputs and outputs keep their shapes: a dense backbone or a mixer of 220 channels computes 224 and
    returns 220.

    Args:
        model: an RCViT of this package or of another repository (known by its state dict), or a
            single mixer. Not folded.
        multiple: of channels.

    Returns:
        The copy and what was padded. Where nothing needs padding it is a plain copy.

    Raises:
        ValueError: ``model`` is neither, so what a padded channel does is not known.
    """
    if isinstance(model, AdditiveTokenMixer):
        return _padded_mixer(model, multiple)
    state = model.state_dict()
    config = config_of(state)
    if config is None:
        raise ValueError(
            f"pad_channels: expected an RCViT or a mixer, got {type(model).__name__} with another "
            "state dict"
        )
    a, b, c, d = (_up(dim, multiple) for dim in config.dims)
    report = PadReport(config.dims, (a, b, c, d))
    if not report.changed:
        return _copied(model), report
    dense = "norm.weight" not in state
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    wide = RCViT(
        Config(config.layers, (a, b, c, d)),
        num_classes=classes,
        in_chans=state["patch_embed.0.weight"].shape[1],
        fork_feat=dense,
        distillation="dist_head.weight" in state,
    )
    _fill(wide, state, "pad_channels: the model's state dict")
    _take_eps(wide, model)
    channels = config.dims if dense else None if classes else config.dims[-1:]
    return Cropped(wide.eval(), channels).eval(), report


def _padded_mixer(mixer: AdditiveTokenMixer, multiple: int) -> tuple[nn.Module, PadReport]:
    if not isinstance(mixer.qkv, nn.Conv2d):
        raise ValueError(
            f"pad_channels: expected the published mixer, got one whose qkv is a "
            f"{type(mixer.qkv).__name__}"
        )
    dim = mixer.qkv.in_channels
    report = PadReport((dim,), (_up(dim, multiple),))
    if not report.changed:
        return _copied(mixer), report
    bias = mixer.qkv.bias is not None
    wide = AdditiveTokenMixer(report.after[0], attn_bias=bias)
    wide.qkv = nn.Conv2d(dim, 3 * report.after[0], 1, bias=bias)  # of the input as it is
    _fill(wide, mixer.state_dict(), "pad_channels: the mixer's state dict")
    _take_eps(wide, mixer)
    return Cropped(wide.eval(), (dim,)).eval(), report


def _copied(model: nn.Module) -> nn.Module:
    same = copy.deepcopy(model)
    same.eval()  # not chained: overridden in published code, it returns None
    return same


@torch.no_grad()
def _fill(wide: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Copy the weights into the first channels of ``wide``, zeros into the others."""
    target = wide.state_dict()
    if set(target) != set(state):
        difference = sorted(set(target) ^ set(state))
        raise ValueError(
            f"{what}: expected the published keys, got a difference in {difference[:4]}"
        )
    filled = {}
    for key, value in state.items():
        shape = target[key].shape
        parts = value.chunk(3) if ".qkv." in f".{key}" else (value,)
        wider = []
        for part in parts:
            rows = shape[0] // len(parts) if shape else 0
            into = torch.ones if key.endswith("running_var") else torch.zeros
            full = into((rows, *shape[1:]) if shape else shape, dtype=value.dtype)
            full[tuple(slice(n) for n in part.shape)] = part.cpu()
            wider.append(full)
        filled[key] = torch.cat(wider) if shape else wider[0]
    wide.load_state_dict(filled, assign=True)
    wide.requires_grad_(False)


def _take_eps(wide: nn.Module, model: nn.Module) -> None:
    for name, norm in wide.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = getattr(model.get_submodule(name), "eps", norm.eps)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
