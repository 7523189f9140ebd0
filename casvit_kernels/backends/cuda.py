"""CUDA kernels on NVIDIA GPUs, for bfloat16 and float16: the native library's second target."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from . import native
from .base import BackendUnavailable, Problem

DTYPES = (torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)  # Ampere: bfloat16 on tensor cores, cp.async
_CHUNK = 4  # channels that a kernel reads together
_SMALLEST_TILE = 6 * 2 * 16  # bytes for each chunk: six rows of two pairs


class CudaBackend:
    name = "cuda"

    def why_not(self, problem: Problem | None = None) -> str | None:
        library, reason = native.load()
        if library is None:
            return reason
        if (reason := _not_built(library)) is not None:
            return reason
        if problem is not None:
            # First: to look at a GPU starts CUDA.
            if problem.device != "cuda":
                return f"it computes on 'cuda', the tensors are on {problem.device!r}"
            if problem.dtype not in DTYPES:
                return f"it computes bfloat16 and float16, not {problem.dtype}"
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = None if problem is None else problem.ordinal
        reason = _device(library, count, index)
        if reason is None and problem is not None and problem.channels:
            reason = _too_large(problem.channels, range(count) if index is None else (index,))
        return reason


def channels_read(channels: int) -> int:
    """Of q, k and v each: what the kernels read of a pixel, zeros behind its channels included."""
    return -(-channels // _CHUNK) * _CHUNK


@functools.cache
def _not_built(library: ctypes.CDLL) -> str | None:
    if not hasattr(library, "casvit_cuda_architectures"):
        return (
            "the native library was built without CUDA kernels: no nvcc was found "
            "('make cuda' in the source tree installs one and builds them)"
        )
    for name in ("architectures", "version", "plan"):
        getattr(library, f"casvit_cuda_{name}").restype = ctypes.c_char_p
    library.casvit_cuda_driver.restype = ctypes.c_int
    library.casvit_cuda_runtime.restype = ctypes.c_int
    library.casvit_cuda_streams.restype = ctypes.c_int
    return None


def library() -> ctypes.CDLL:
    """The native library.

    Raises:
        BackendUnavailable: it has no CUDA kernels, or there is none.
    """
    found, reason = native.load()
    if found is None or (reason := _not_built(found)) is not None:
        raise BackendUnavailable(f"backend='cuda' has no kernels here: {reason}")
    return found


@contextmanager
def launches(count: int) -> Iterator[None]:
    """Within the context the mixer takes one launch or two after its product, whatever is planned.

    For tests and measurements: of the whole process, and not of graphs captured before.

    Args:
        count: 1, by clusters of blocks, or 2. A call whose maps do not fit into one raises.

    Raises:
        ValueError: the count is another.
        BackendUnavailable: the library has no CUDA kernels.
    """
    if count not in (1, 2):
        raise ValueError(f"count: expected 1 or 2 launches, got {count!r}")
    found = library()
    found.casvit_cuda_launches(count)
    try:
        yield
    finally:
        found.casvit_cuda_launches(0)


def build() -> str | None:
    """What the CUDA kernels were compiled with and for; None where they were not."""
    library, _ = native.load()
    if library is None or _not_built(library) is not None:
        return None
    names = library.casvit_cuda_architectures().decode()
    return f"nvcc {library.casvit_cuda_version().decode()} for {names}"


@functools.cache
def _device(library: ctypes.CDLL, count: int, index: int | None) -> str | None:
    """Why a GPU cannot be used, of so many; None for the newest."""
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU, this PyTorch is built for AMD"
    if count == 0:
        return "no GPU that this PyTorch can use: torch.cuda.is_available() is False"
    if not library.casvit_cuda_streams():
        return f"it does not find the current CUDA stream of torch {torch.__version__}"
    driver, runtime = library.casvit_cuda_driver(), library.casvit_cuda_runtime()
    if driver // 1000 < runtime // 1000:
        return (
            f"it was built with CUDA {_version(runtime)}, the driver serves up to {_version(driver)}: "
            "install a newer driver"
        )
    which = ""
    if index is None:
        which = "the newest here, "
        index = max(range(count), key=torch.cuda.get_device_capability)
    major, minor = torch.cuda.get_device_capability(index)
    where = f"{which}{torch.cuda.get_device_name(index)} (cuda:{index}), has {major}.{minor}"
    if (major, minor) < OLDEST_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or later, {where}"
    names = library.casvit_cuda_architectures().decode().split(",")
    if serves(names, major, minor):
        return None
    return f"it was built for {', '.join(names)}, and {where}"


def serves(architectures: list[str], major: int, minor: int) -> bool:
    """Whether a library built for these runs on a compute capability.

    Args:
        architectures: ``sm_80`` (machine code, for later ones of its major version, too), ``sm_90a``
            (for that one alone) or ``compute_80`` (compiled by the driver, for all later ones).
    """
    have = major * 10 + minor
    for name in architectures:
        kind, _, number = name.partition("_")
        own = int(number.rstrip("abcdefghijklmnopqrstuvwxyz"))
        alone = not number.isdigit()
        if have == own or (not alone and own <= have and (kind == "compute" or own // 10 == major)):
            return True
    return False


def _too_large(channels: int, devices: Iterable[int]) -> str | None:
    own = channels_read(channels) // _CHUNK | 1
    least = min(map(_shared_memory, devices))
    if own * _SMALLEST_TILE + 2048 <= least:
        return None
    return (
        f"{channels} channels of the smallest tile need {own * _SMALLEST_TILE + 2048:,} bytes of shared "
        f"memory, a block may have {least:,}"
    )


@functools.cache
def _shared_memory(index: int) -> int:
    """Bytes that a block may ask for."""
    return int(torch.cuda.get_device_properties(index).shared_memory_per_block_optin)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
