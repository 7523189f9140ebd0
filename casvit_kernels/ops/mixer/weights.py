"""The weights of one mixer: their order, once; everything that needs the order derives it from here.

The order is that of the fields of `MixerWeights` with those of the two gates in place: operator schemas,
autograd and the C++ bindings (`csrc/bindings/tensors.h`, held to it by a test) take 22 tensors in it.
May import: torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class GateWeights(NamedTuple):
    """Weights of one gate (``oper_q`` or ``oper_k``): spatial, then channel.

    ``norm_*`` are those of a BatchNorm over C channels with running statistics.
    """

    depthwise_weight: Tensor  #: (C, 1, 3, 3)
    depthwise_bias: Tensor  #: (C,)
    norm_weight: Tensor | None  #: (C,), None when the norm has no affine part
    norm_bias: Tensor | None  #: (C,)
    norm_mean: Tensor | None  #: (C,), None when the norm tracks no statistics
    norm_var: Tensor | None  #: (C,)
    spatial_weight: Tensor  #: (1, C, 1, 1)
    channel_weight: Tensor  #: (C, C, 1, 1)


class MixerWeights(NamedTuple):
    """All weights of one mixer, in state-dict order."""

    qkv_weight: Tensor  #: (3C, C, 1, 1)
    qkv_bias: Tensor | None  #: (3C,)
    q: GateWeights
    k: GateWeights
    dwc_weight: Tensor  #: (C, 1, 3, 3)
    dwc_bias: Tensor  #: (C,)
    proj_weight: Tensor  #: (C, 1, 3, 3)
    proj_bias: Tensor  #: (C,)


def flatten(w: MixerWeights) -> tuple[Tensor | None, ...]:
    """The 22 tensors in order."""
    return (w[0], w[1], *w.q, *w.k, *w[4:])


def unflatten(flat: Sequence[Any]) -> MixerWeights:
    """The inverse of `flatten`, of any 22 values."""
    a: Any = flat
    return MixerWeights(a[0], a[1], GateWeights(*a[2:10]), GateWeights(*a[10:18]), *a[18:22])


# Of each tensor its name, "qkv_weight" ... "q.depthwise_weight" ... "proj_bias".
NAMES: tuple[str, ...] = tuple(
    name
    for field in MixerWeights._fields
    for name in ([f"{field}.{n}" for n in GateWeights._fields] if len(field) == 1 else [field])
)
COUNT = len(NAMES)  # 22
OPTIONAL = frozenset(n for n in NAMES if n == "qkv_bias" or ".norm_" in n)
# As parameters of an operator; None where a BatchNorm's running statistics are not read.
SCHEMA = ", ".join(
    f"Tensor{'?' if name in OPTIONAL else ''} {name.replace('.', '_')}" for name in NAMES
)

# Where they are in a mixer. The modules that own weights: below each gate four, see GATE.
GATE = ("0.block.0", "0.block.1", "0.block.3", "1.block.1")  # depthwise, norm, spatial, channel
OWNERS: tuple[str, ...] = (
    "qkv",
    *(f"{gate}.{path}" for gate in ("oper_q", "oper_k") for path in GATE),
    "dwc",
    "proj",
)
_GATE_ENTRIES = (
    (0, "weight"),
    (0, "bias"),
    (1, "weight"),
    (1, "bias"),
    (1, "running_mean"),
    (1, "running_var"),
    (2, "weight"),
    (3, "weight"),
)
# Of each tensor the index of its owner in OWNERS, and its name there.
ENTRIES: tuple[tuple[int, str], ...] = (
    (0, "weight"),
    (0, "bias"),
    *((1 + i, name) for i, name in _GATE_ENTRIES),
    *((5 + i, name) for i, name in _GATE_ENTRIES),
    (9, "weight"),
    (9, "bias"),
    (10, "weight"),
    (10, "bias"),
)
PATHS: tuple[str, ...] = tuple(f"{OWNERS[i]}.{name}" for i, name in ENTRIES)
BUFFERS = ("running_mean", "running_var")


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
    if all(t is None or (t.dtype is dtype and t.device == device) for t in flatten(w)):
        return True
    alike = True
    for name, t in named(w):
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


def _shapes(c: int) -> tuple[tuple[int, ...], ...]:
    """Of the 22 tensors with c channels, in order."""
    by_name = {
        "qkv_weight": (3 * c, c, 1, 1),
        "qkv_bias": (3 * c,),
        "depthwise_weight": (c, 1, 3, 3),
        "dwc_weight": (c, 1, 3, 3),
        "proj_weight": (c, 1, 3, 3),
        "spatial_weight": (1, c, 1, 1),
        "channel_weight": (c, c, 1, 1),
    }
    return tuple(by_name.get(name.rpartition(".")[2], (c,)) for name in NAMES)


_kept_shapes = functools.lru_cache(_shapes)


def check_shapes(w: MixerWeights) -> None:
    """Raise unless the weights have the shapes that `MixerWeights` and `GateWeights` say.

    Kernels count elements only: they would read another shape with as many elements as if it fitted.

    Raises:
        ValueError: a weight has another shape (the message names it).
    """
    # A compiler ignores caches, and warns that it does.
    shapes = _shapes if torch.compiler.is_compiling() else _kept_shapes
    for name, t, shape in zip(NAMES, flatten(w), shapes(w.qkv_weight.shape[1]), strict=True):
        if t is not None and t.shape != shape:
            raise ValueError(f"weights.{name}: expected shape {shape}, got {tuple(t.shape)}")


def named(w: MixerWeights) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are there, with their `NAMES`."""
    return ((n, t) for n, t in zip(NAMES, flatten(w), strict=True) if t is not None)
