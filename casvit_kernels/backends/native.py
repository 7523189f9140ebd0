"""Finds and loads the compiled library; knows nothing about what is in it.

The library is built against the stable ABI of torch, so one file serves every supported torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

ISA_ENVIRONMENT = "CASVIT_KERNELS_CPU_ISA"
REMEDY = (
    "install a C++17 compiler, such as g++ or clang, and, in the source tree, run "
    "'pip install --no-cache-dir --force-reinstall --no-deps .' or 'make setup'"
)


_loaded_by: int | None = None


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library and None, or None and the reason why it cannot be used."""
    global _loaded_by
    path = Path(__file__).parent.parent / "_C.so"
    if not path.exists():
        return None, f"the native library was not built ({path.name} is missing): {REMEDY}"
    try:
        torch.ops.load_library(str(path))
        library = _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        return None, (
            f"the native library does not load with torch {torch.__version__}: {error}; {REMEDY}"
        )
    _loaded_by = os.getpid()
    forced = os.environ.get(ISA_ENVIRONMENT)
    if forced:
        # Bytes that are no UTF-8 come as surrogates; they name no instruction set either.
        name = forced.encode("utf-8", "backslashreplace")
        reason = library.casvit_cpu_isa_select(name).decode("utf-8", "replace")
        if reason:
            return None, f"{ISA_ENVIRONMENT}={forced!r} cannot be used: {reason}"
    return library, None


def loaded_by() -> int | None:
    """The process that loaded the library: another one where this was forked afterwards."""
    return _loaded_by


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("active", "known", "reason", "select"):
        getattr(library, f"casvit_cpu_isa_{name}").restype = ctypes.c_char_p
    library.casvit_cpu_isa_reason.argtypes = [ctypes.c_char_p]
    library.casvit_cpu_isa_select.argtypes = [ctypes.c_char_p]
    for name in ("qkv", "grad_sum"):
        function = getattr(library, f"casvit_cpu_{name}_floats")
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * 4
    plan = ctypes.POINTER(ctypes.c_int64)
    for name, arguments in (
        ("network_precision", [ctypes.c_int64]),
        ("network_scratch", [plan, *[ctypes.c_int64] * 6]),
        ("cpu_fma_loop", [ctypes.c_int64] * 2),
    ):
        function = getattr(library, f"casvit_{name}")
        function.restype, function.argtypes = ctypes.c_int64, arguments
    library.casvit_build_info.restype = ctypes.c_char_p
    library.casvit_mixer_weights.restype = ctypes.c_char_p
    return library
