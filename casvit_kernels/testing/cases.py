"""What is checked: shapes, layouts, dtypes and modes, as a fixed list and a seeded sweep.

May import: torch, `models` for the sizes of real mixers.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends import check_name
from ..models.rcvit import CONFIGS

Shape = tuple[int, int, int, int]
FORMATS = {False: torch.contiguous_format, True: torch.channels_last}


class Target(NamedTuple):
    """Where a backend is checked, and in which dtypes."""

    device: str
    dtypes: tuple[torch.dtype, ...]


def _triton_device() -> str:
    """Where there is no GPU, Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# A new backend joins by one line.
BACKENDS: dict[str, Target] = {
    "reference": Target("cpu", (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    "cpu": Target("cpu", (torch.float32, torch.bfloat16, torch.float16)),
    "cuda": Target("cuda", (torch.bfloat16, torch.float16)),
    "triton": Target(_triton_device(), (torch.float32, torch.bfloat16, torch.float16)),
}

# eval: no gradients. frozen: training, BatchNorm in eval. train: batch statistics.
MODES = ("eval", "frozen", "train")

LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",  # out of a larger buffer, NaN around
    "sliced channels_last",
    "strided",  # every second row and column of a larger buffer, NaN between
    "transposed",  # height innermost
    "permuted",  # batch innermost
    "expanded",  # batch stride 0
)

_BOTH = ("contiguous", "channels_last")
# (B, C, H, W), layouts, modes, dtypes (None: all of the backend).
_PLAN: tuple[
    tuple[Shape, tuple[str, ...], tuple[str, ...], tuple[torch.dtype, ...] | None], ...
] = (
    ((3, 3, 13, 9), LAYOUTS, MODES, None),
    ((2, 33, 7, 7), LAYOUTS, MODES, None),
    ((0, 3, 7, 7), _BOTH, MODES, None),
    ((1, 1, 1, 1), _BOTH, MODES, None),
    ((5, 1, 1, 1), _BOTH, MODES, None),
    ((5, 33, 1, 1), _BOTH, MODES, None),
    ((3, 3, 1, 7), _BOTH, MODES, None),
    ((5, 3, 7, 1), _BOTH, MODES, None),
    ((5, 3, 7, 7), _BOTH, MODES, None),
    ((2, 48, 13, 9), _BOTH, MODES, None),
    ((1, 33, 33, 47), _BOTH, ("eval", "frozen"), (torch.float32, torch.bfloat16)),
    ((1, 48, 56, 56), LAYOUTS, ("eval",), (torch.float32, torch.bfloat16)),
    ((5, 220, 7, 7), _BOTH, ("eval", "train"), (torch.float32, torch.bfloat16)),
    ((2, 512, 7, 7), _BOTH, ("eval",), None),
    ((1, 512, 33, 47), _BOTH, ("eval",), (torch.float32,)),
)
_SWEEP, _LONG_SWEEP = 12, 400
# Triton's interpreter takes seconds for each of these: several images in a tile, several tiles and
# bands of an image, one and many blocks of channels, of images for the channel gates, odd sizes.
_F32, _F16 = (torch.float32,), (torch.float16,)
_INTERPRETED_PLAN = (
    ((3, 3, 7, 9), LAYOUTS, ("eval",), _F32),
    ((3, 3, 7, 9), _BOTH, ("frozen", "train"), (torch.float32, torch.float16, torch.bfloat16)),
    ((1, 2, 9, 33), _BOTH, ("train",), (torch.float32, torch.float16)),
    ((1, 33, 3, 47), _BOTH, ("eval", "train"), _F32),
    ((2, 130, 3, 7), _BOTH, ("train",), _F16),
    ((1, 260, 2, 9), _BOTH, ("train",), _F32),
    ((17, 17, 1, 3), _BOTH, ("train",), _F32),
    ((0, 3, 7, 7), _BOTH, MODES, _F32),
    ((1, 1, 1, 1), _BOTH, MODES, _F32),
    ((5, 3, 1, 1), _BOTH, ("train",), _F32),
    ((3, 3, 5, 1), _BOTH, ("train",), _F32),
)
INPUTS = (224, 384)  # heights and widths of images in `real_cases`


class Case(NamedTuple):
    """One check: what is run, and the seed of its weights and input."""

    backend: str
    dtype: torch.dtype
    layout: str
    mode: str
    shape: Shape
    attn_bias: bool = False
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.backend}-{dtype_name(self.dtype)}-{self.layout}-{self.mode}-{shape}"


def cases(
    backend: str,
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    modes: Iterable[str] = MODES,
    long: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> list[Case]:
    """The cases that `run` checks: a fixed list, then a seeded random sweep.

    Args:
        backend: a key of `BACKENDS`.
        dtypes: leave out all others; None for all that the backend computes.
        modes: of `MODES`, leave out all others.
        long: 400 random cases instead of 12.
        seed: of the sweep, and of all weights and inputs.
        device: where the backend computes, as in `torch.device`; None: where `BACKENDS` says.

    Raises:
        ValueError: unknown backend, or a dtype or mode that is not checked.
    """
    check_name(backend, "backend")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    own_device, known = BACKENDS[backend]
    device = device or own_device
    wanted = known if dtypes is None else tuple(dtypes)
    wanted_modes = tuple(modes)
    for dtype in wanted:
        if dtype not in known:
            names = ", ".join(map(dtype_name, known))
            raise ValueError(f"dtypes: {backend!r} computes {names}, got {dtype!r}")
    for mode in wanted_modes:
        if mode not in MODES:
            raise ValueError(f"modes: expected some of {', '.join(MODES)}, got {mode!r}")
    interpreted = backend == "triton" and torch.device(device).type == "cpu"
    plan, sweep = (_INTERPRETED_PLAN, 0) if interpreted else (_PLAN, _SWEEP)
    found = [
        Case(backend, dtype, layout, mode, shape, i % 2 == 1, seed, device)
        for i, (shape, layouts, plan_modes, plan_dtypes) in enumerate(plan)
        for dtype in known
        if plan_dtypes is None or dtype in plan_dtypes
        for mode in plan_modes
        for layout in layouts
    ]
    rng = random.Random(seed)
    for i in range(_LONG_SWEEP if long else sweep):
        size = 64 if long else 24
        shape = (rng.randint(1, 9), rng.randint(1, 130), rng.randint(1, size), rng.randint(1, size))
        layout, mode, dtype = rng.choice(LAYOUTS), rng.choice(MODES), rng.choice(known)
        bias = rng.random() < 0.5
        found.append(Case(backend, dtype, layout, mode, shape, bias, seed * 1000 + i + 1, device))
    return [
        case
        for case in found
        if case.dtype in wanted and case.mode in wanted_modes and not _undefined(case)
    ]


def cover(every: Iterable[Case], together: int = 2) -> list[Case]:
    """As few of these cases as cover every pair of values of dtype, layout, mode, shape and bias.

    Most faults show with two values together (a layout in one dtype, a mode at one shape); the others
    are for the whole list. Greedy, in order: the same cases always.

    Args:
        every: cases to choose from.
        together: how many values; 1 covers each value by itself.
    """
    fields = ("dtype", "layout", "mode", "shape", "attn_bias")

    def pairs(case: Case) -> set[tuple[object, ...]]:
        values = [(field, getattr(case, field)) for field in fields]
        return set(itertools.combinations(values, together))

    left = {case: pairs(case) for case in every}
    chosen: dict[Case, None] = {}
    missing = set().union(*left.values())
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        missing -= left.pop(best)
        chosen[best] = None
    return sorted(chosen, key=lambda case: (case.shape, str(case.dtype), case.mode, case.layout))


def real_cases(
    backend: str, batch: int, *, inputs: Iterable[int] = INPUTS, device: str | None = None
) -> list[Case]:
    """Every mixer of xs, s, m and t in every dtype of the backend, both layouts and every mode.

    Args:
        backend, device: as `cases` takes them.
        batch: images.
        inputs: heights and widths of the images, multiples of 32.
    """
    target = BACKENDS[backend]
    shapes = {  # no set: its order would change from run to run
        (batch, config.dims[stage], size // (4 << stage), size // (4 << stage)): None
        for size in inputs
        for stage in range(4)
        for config in CONFIGS.values()
    }
    return [
        Case(backend, dtype, layout, mode, shape, False, 0, device or target.device)
        for shape in shapes
        for dtype in target.dtypes
        for mode in MODES
        for layout in _BOTH
    ]


def set_mode(mixer: nn.Module, mode: str) -> None:
    """Put a mixer into one of `MODES`, in place."""
    mixer.train(mode != "eval")
    if mode == "frozen":
        for module in mixer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def lay_out(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A tensor of these values in one of `LAYOUTS`, and the buffer that it views.

    Args:
        values: ``(B, C, H, W)``. For ``"expanded"`` all images must be equal.
        layout: of `LAYOUTS`.

    Raises:
        ValueError: the layout is not known.
    """
    b, c, h, w = values.shape

    def empty(*shape: int) -> Tensor:
        last = FORMATS["channels_last" in layout]
        buffer = torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=last)
        return buffer.fill_(math.nan)

    if layout in _BOTH:
        buffer = view = empty(b, c, h, w)
    elif layout.startswith("sliced"):
        buffer = empty(b + 2, c + 2, h + 2, w + 3)
        view = buffer[1 : b + 1, 1 : c + 1, 1 : h + 1, 1 : w + 1]
    elif layout == "strided":
        buffer = empty(b, c, 2 * h, 2 * w)
        view = buffer[:, :, ::2, ::2]
    elif layout == "transposed":
        buffer = empty(b, c, w, h)
        view = buffer.transpose(2, 3)
    elif layout == "permuted":
        buffer = empty(c, h, w, b)
        view = buffer.permute(3, 0, 1, 2)
    elif layout == "expanded":
        buffer = values[:1].clone(memory_format=torch.contiguous_format)
        return buffer.expand(b, -1, -1, -1), buffer
    else:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    view.copy_(values)
    return view, buffer


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _undefined(case: Case) -> bool:
    # The variance of one value: nn.BatchNorm2d refuses it.
    b, _, h, w = case.shape
    return case.mode == "train" and b * h * w == 1
