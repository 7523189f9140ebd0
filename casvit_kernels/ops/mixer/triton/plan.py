"""What a launch needs beside its tensors, worked out once for maps of one kind."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..schema import output_memory_format
from . import tuning
from .tuning import (
    BLOCK,
    BLOCK_CHANNELS,
    BLOCK_IMAGES,
    BLOCK_TERMS,
    PER_GATE,
    SMALL_THREADS,
    cut,
    tile,
)

# Kernels that have as many warps where these are wider: with fewer a thread needs too many registers.
SAME_WARPS = ("combine", "backward_gate")
# Plans kept: those of eight kernels, for four stages at some thirty sizes and batches.
MOST = 1024
_MAJOR, _MINOR = map(int, triton.__version__.split(".")[:2])


class Maps(NamedTuple):
    """What plans depend on, of x (B, C, H, W)."""

    shape: torch.Size
    pixels_last: bool  # NCHW, else channels_last
    itemsize: int  # of the dtype computed in; nothing else of it matters here
    device: torch.device


class Plan(NamedTuple):
    """One kernel's launch for such maps."""

    name: str  # in launch.KERNELS
    grid: tuple[int, int, int]  # where a program has a tile: programs, blocks of channels, gates
    parts: int  # programs that share an image
    sizes: tuple[int | float, ...]  # the last of its arguments at run time
    constants: dict[str, Any]  # compiled in
    threads: int
    keywords: dict[str, Any]  # constants, and options of Triton's compiler on this device
    one_device: bool  # no other device than that of the maps can be current


def maps_of(x: Tensor, dtype: torch.dtype) -> Maps:
    """dtype: the one computed in."""
    pixels_last = output_memory_format(x) is torch.contiguous_format
    return Maps(x.shape, pixels_last, dtype.itemsize, x.device)


def warp_size() -> int:
    """Threads of a warp that this PyTorch's GPUs have; of AMD's the data-centre ones."""
    return 64 if torch.version.hip is not None else 32


def options(name: str, threads: int, warp: int) -> dict[str, Any]:
    """For Triton's compiler. warp: threads of a warp."""
    return {
        "num_warps": threads // (32 if name in SAME_WARPS else warp),
        "enable_fp_fusion": True,  # its default is to change
    }


@functools.lru_cache(MOST)
def plan(name: str, maps: Maps) -> Plan:
    """How a kernel is launched for maps like these.

    Raises:
        ValueError: an image is too large for the offsets within a tile.
    """
    b, c, height, width = maps.shape
    constants: dict[str, Any] = {"C": c}
    sizes: tuple[int | float, ...]
    if name == "merge_statistics":
        programs = plan("statistics", maps).grid[0]
        constants["BLOCK"] = BLOCK
        threads, grid = SMALL_THREADS[name], (-(-c // BLOCK), 2, 1)
        return _plan(name, maps, grid, 1, (programs,), constants, threads)
    if name == "channel_gates":
        parts = plan("gates", maps).parts
        constants |= {"BB": BLOCK_IMAGES, "BC": BLOCK_CHANNELS, "BK": BLOCK_TERMS}
        threads, grid = SMALL_THREADS[name], (-(-c // BLOCK_CHANNELS), -(-b // BLOCK_IMAGES), 2)
        sizes = (parts, 1 / (height * width), b)
        return _plan(name, maps, grid, 1, sizes, constants, threads)
    t = tile(name, c, maps.pixels_last, maps.itemsize, (_MAJOR, _MINOR))
    together = max(1, min(b, (t.pixels + 1) // (width + 1)))
    # Offsets from the start of a row, and those within a tile of several images, have 32 bits.
    if 3 * c * height * width * together >= 2**31:
        raise ValueError(
            "x: expected images whose q, k and v have fewer than 2^31 elements together with "
            f"backend='triton', got shape {tuple(maps.shape)}"
        )
    size = cut(name, c, b, height, width, multiprocessors(maps.device))
    constants |= {
        "PIXELS_LAST": maps.pixels_last,
        "TW": t.pixels,
        "BC": t.channels,
        "STAGES": t.stages,
    }
    grid = (size.programs, -(-c // t.channels), 2 if name in PER_GATE else 1)
    sizes = (b, height, width, size.rows, size.repeat)
    return _plan(name, maps, grid, size.parts, sizes, constants, t.threads)


def _plan(
    name: str,
    maps: Maps,
    grid: tuple[int, int, int],
    parts: int,
    sizes: tuple[int | float, ...],
    constants: dict[str, Any],
    threads: int,
) -> Plan:
    keywords = constants | options(name, threads, warp_size())
    one_device = maps.device.type != "cuda" or torch.cuda.device_count() == 1
    return Plan(name, grid, parts, sizes, constants, threads, keywords, one_device)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where there is none, in the interpreter and for counts, `tuning.MULTIPROCESSORS`."""
    if device.type != "cuda":
        return tuning.MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
