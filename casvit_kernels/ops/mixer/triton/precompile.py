"""Compiling the kernels before the first call needs them, several at a time.

What is compiled are the launches of a training step, recorded from the step itself on tensors without
values: so they are the variants that a call asks for. Imports triton late.
"""

from __future__ import annotations

import contextvars
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from ....backends import BackendUnavailable
from ....backends.triton import TritonBackend
from .. import training as steps
from ..schema import Settings
from ..weights import GateWeights, MixerWeights, flatten

if TYPE_CHECKING:
    from .launch import Launch

T = TypeVar("T")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEMORY_FORMATS = (torch.channels_last, torch.contiguous_format)


class Compiled(NamedTuple):
    """One kernel that was compiled, or found in Triton's cache."""

    kernel: str
    channels: int
    dtype: torch.dtype  #: the first of those that share it
    memory_format: torch.memory_format  #: likewise
    hash: str  #: Triton's name for it


def precompile(
    channels: Iterable[int],
    *,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    memory_formats: Iterable[torch.memory_format] = (torch.channels_last,),
    training: bool = False,
    device: torch.device | str | None = None,
    target: str | None = None,
    threads: int | None = None,
) -> list[Compiled]:
    """Compile the Triton kernels of mixers, so that no call waits for it.

    A kernel is compiled for channels, dtype and layout, once for all batches and sizes of maps.
    Without this each is compiled in the first call that needs it, one after the other. The results are
    in Triton's cache on disk (``TRITON_CACHE_DIR``) too, where other processes find them.

    Args:
        channels: of the mixers, each at least 1; of a fused model
            ``{m.qkv.in_channels for m in model.modules() if isinstance(m, FusedCATM)}``.
        dtypes: that mixers compute in, so autocast's where it is on: float32, bfloat16, float16.
        memory_formats: of their inputs: ``torch.channels_last``, ``torch.contiguous_format`` (NCHW).
        training: also the kernels of batch statistics and of the backward.
        device: the GPU, by default the current one.
        target: instead of a device an architecture that need not be here, ``"sm_90"`` or ``"gfx942"``:
            fills the cache on disk alone, say while a container image is built.
        threads: that compile, by default one for each CPU.

    Returns:
        What is compiled now, each kernel once.

    Raises:
        TypeError, ValueError: an argument is none of the above (named in the message).
        BackendUnavailable: triton is missing or interprets (``TRITON_INTERPRET``), or there is no GPU
            and no ``target``.
    """
    wanted = list(
        product(
            _each(channels, "channels", "integers"),
            _each(dtypes, "dtypes", "an iterable of them"),
            _each(memory_formats, "memory_formats", "an iterable of them"),
        )
    )
    for c, dtype, memory_format in wanted:
        if isinstance(c, bool) or not isinstance(c, int):
            raise TypeError(f"channels: expected integers, got {c!r}")
        if c < 1:
            raise ValueError(f"channels: expected numbers of at least 1, got {c}")
        _check("dtypes", dtype, DTYPES)
        _check("memory_formats", memory_format, MEMORY_FORMATS)
    if target is not None and device is not None:
        raise ValueError(f"device: expected None with target={target!r}, got {device!r}")
    if target is not None and not isinstance(target, str):
        raise TypeError(f"target: expected a string, got {target!r}")
    if target is not None and not re.fullmatch(r"sm_\d+|gfx\w+", target):
        raise ValueError(f"target: expected 'sm_90', 'gfx942' or the like, got {target!r}")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise TypeError(f"threads: expected an integer, got {threads!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    place = None if device is None else torch.device(device)
    if place is not None and place.type != "cuda":
        raise ValueError(f"device: expected a GPU, got {str(device)!r}")
    reason = TritonBackend().why_not_compile(target is None)
    if reason is not None:
        raise BackendUnavailable(f"precompile: {reason}")

    found: dict[Any, tuple[Compiled, Launch]] = {}
    for c, dtype, memory_format in wanted:
        for it in launches(c, dtype, memory_format, training=training):
            kinds = tuple(getattr(a, "dtype", type(a)) for a in it.arguments)
            key = (it.name, kinds, tuple(it.constants.items()))
            found.setdefault(key, (Compiled(it.name, c, dtype, memory_format, ""), it))
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    every = [it for _, it in found.values()]
    with pool:
        if target is not None:
            kernels = list(pool.map(lambda it: compile_for(it, target), every))
        else:
            # A context of its own: Triton 3.6 does not leave the mode after an error.
            with torch.cuda.device(place):
                kernels = contextvars.copy_context().run(_compile_here, every, pool)
    return [
        named._replace(hash=kernel.hash)
        for (named, _), kernel in zip(found.values(), kernels, strict=True)
    ]


def launches(
    channels: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    *,
    training: bool = True,
    shape: tuple[int, int, int] = (2, 14, 14),
    device: str = "meta",
) -> list[Launch]:
    """Those of a training step of a mixer, or of inference. shape: B, H, W."""
    from . import launch, phases

    b, height, width = shape
    x = torch.empty(
        (b, channels, height, width), dtype=dtype, device=device, memory_format=memory_format
    )
    w, p = _weights(channels, not training, device), phases.TritonPhases()
    s = Settings(1e-5, 1e-5, training, training, dtype, "triton", "")
    with launch.recorded() as record, torch.no_grad():
        out, saved = steps.forward(p, x, w, s)
        if training:
            steps.backward(p, out, x, w, s, saved, [True, *(t is not None for t in flatten(w))])
    return record


def _weights(c: int, running: bool, device: str) -> MixerWeights:
    def e(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device)

    taps, vector, square = e(c, 1, 3, 3), e(c), e(c, c, 1, 1)
    statistic = vector if running else None
    norm = (vector, vector, statistic, statistic)
    gate = GateWeights(taps, vector, *norm, e(1, c, 1, 1), square)
    return MixerWeights(e(3 * c, c, 1, 1), e(3 * c), gate, gate, taps, vector, taps, vector)


def _compile_here(every: list[Launch], pool: ThreadPoolExecutor) -> list[Any]:
    """For the current device, as a launch would."""
    import triton

    from .launch import KERNELS
    from .plan import warp_size

    with triton.AsyncCompileMode(pool):
        kernels = [
            KERNELS[it.name].warmup(
                *it.arguments, grid=it.grid, **it.constants, **it.options(warp_size())
            )
            for it in every
        ]
    return [kernel.result() if hasattr(kernel, "result") else kernel for kernel in kernels]


def specialise(it: Launch, target: str) -> tuple[Any, Any, tuple[Any, ...]]:
    """Triton's own view of a launch: kernel, its backend for the target, and what it binds: arguments,
    for each the type and value that it compiles for, and options, which are its cache's key."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from .launch import KERNELS

    warp = 64 if target.startswith("gfx9") else 32
    gpu = (
        GPUTarget("hip", target, warp)
        if target.startswith("gfx")
        else GPUTarget("cuda", int(target[3:]), warp)
    )
    kernel, backend = KERNELS[it.name], make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = it.options(64 if target.startswith("gfx") else 32)
    return kernel, backend, bind(*it.arguments, **it.constants, **options)


def compile_for(it: Launch, target: str) -> Any:
    """Triton's `CompiledKernel` of one launch for a GPU that need not be there."""
    import triton
    from triton.compiler import ASTSource

    kernel, backend, (bound, found, options) = specialise(it, target)
    # As `JITFunction.run` does, so that it finds the result on disk.
    options, *source = kernel._pack_args(
        backend, {**it.constants, **options}, bound, found, options
    )
    options = options.__dict__
    return triton.compile(ASTSource(kernel, *source), target=backend.target, options=options)


def _each(values: Iterable[T], name: str, what: str) -> list[T]:
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected {what}, got {values!r}")
    return list(values)


def _check(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected some of {', '.join(map(str, known))}, got {value!r}")
