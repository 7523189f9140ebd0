"""Do the weights of one mixer agree in device and dtype?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import MixerWeights

_HALVES = (torch.bfloat16, torch.float16)
_CAST = (torch.float32, *_HALVES)  # what autocast brings to one dtype


def autocasts(w: MixerWeights) -> bool:
    """Whether autocast is on where these weights are."""
    device = w.qkv_weight.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def check_alike(w: MixerWeights) -> bool:
    """Raise unless one call can compute with all of these weights, as plain PyTorch would.

    All must be on the device of ``qkv_weight`` and of its dtype; those of a BatchNorm may be float32
    beside bfloat16 or float16. Under autocast any of these three may be mixed.

    Returns:
        Whether they agree without autocast, too.

    Raises:
        ValueError: a weight is on another device (the message names it).
        TypeError: a weight is of another dtype (the message names it).
    """
    device, dtype, autocast = w.qkv_weight.device, w.qkv_weight.dtype, autocasts(w)
    flat = (w[0], w[1], *w.q, *w.k, *w[4:])
    if all(t is None or (t.dtype is dtype and t.device == device) for t in flat):
        return True
    alike = True
    for name, t in _named(w):
        if t.device != device:
            raise ValueError(
                f"weights.{name}: expected the device of weights.qkv_weight, {device}, "
                f"got {t.device}"
            )
        if t.dtype == dtype:
            continue
        if t.dtype == torch.float32 and dtype in _HALVES and ".norm_" in name:
            continue
        alike = False
        if not (autocast and t.dtype in _CAST and dtype in _CAST):
            remedy = f"autocast casts {', '.join(map(str, _CAST))} alone"
            if not autocast:
                remedy = "convert one of them, or use torch.autocast"
            raise TypeError(
                f"weights.{name}: expected the dtype of weights.qkv_weight, {dtype}, "
                f"got {t.dtype} ({remedy})"
            )
    return alike


def _named(w: MixerWeights) -> Iterator[tuple[str, Tensor]]:
    own = {**w._asdict(), "q": None, "k": None}
    of_gates = {f"{z}.{n}": t for z in ("q", "k") for n, t in getattr(w, z)._asdict().items()}
    return ((name, t) for name, t in {**own, **of_gates}.items() if t is not None)
