"""Which calls of a whole network kernels serve, and with how many threads."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...backends import BackendUnavailable, Problem, first_choice, select
from ...backends.cpu import active_instruction_set, instruction_sets
from ..mixer.structure import watched_globally
from ..tracing import transformed
from . import cpu
from .kernels import PRECISIONS, NetworkKernels

# What serves instead of the native kernels; None: themselves. Tests put formulas here.
_instead: NetworkKernels | None = None
_BF16_SETS = ("amx", "avx512_bf16")
ABLE = ("cpu", "reference")  # backends that have whole networks


def kernels() -> NetworkKernels | None:
    """Those of the CPU, where the native library has them."""
    return cpu.kernels() if _instead is None else _instead


def check_precision(precision: object) -> str:
    """`precision` itself.

    Raises:
        ValueError: it is not known.
        BackendUnavailable: the CPU cannot compute in it, with the instruction sets there are.
    """
    if not isinstance(precision, str) or precision not in PRECISIONS:
        known = " or ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision: expected {known}, got {precision!r}")
    if precision != "fp32" and not cpu.has_precision(precision):
        raise BackendUnavailable(
            f"precision: expected 'fp32', got {precision!r}, which {why_not_precision(precision)}"
        )
    return precision


def why_not_precision(precision: str) -> str:
    """Of one that is not served here: what it needs, and what there is."""
    if precision == "fp32":
        return "needs the native library"
    there = instruction_sets()
    usable = ", ".join(name for name, reason in there.items() if reason is None) or "none"
    return (
        f"needs the instruction set {' or '.join(_BF16_SETS)}; this CPU and this build have {usable}, "
        f"in use is {active_instruction_set()}"
    )


def plain_call(x: Tensor) -> bool:
    """Whether nobody follows or changes the operations of this call, and x is where kernels are.

    Gradients are not asked for here.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._is_tracing()
        and not transformed()
        and not watched_globally()
    )


def chosen() -> NetworkKernels | None:
    """The kernels for float32 on the CPU, or None where the model itself is to compute.

    Raises:
        BackendUnavailable: the backend that was asked for, or the instruction set, cannot serve.
        ValueError: the environment variable names no known backend.
    """
    found = kernels()
    if first_choice(None) == "cpu" and found is not None:
        return found
    # The reasons, and the warning where the native library is missing.
    backend = select(None, Problem("cpu", torch.float32), ABLE, "a whole network")
    return found if backend.name == "cpu" else None


# A compiled function keeps the choice it was compiled with.
chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def thread_count() -> int:
    """How many threads a call may use: those of PyTorch, whose pool the kernels share."""
    return torch.get_num_threads() if _has_openmp() else 1


@functools.cache
def _has_openmp() -> bool:
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
