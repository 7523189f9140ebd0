"""The ordered registry of backends and the choice among them.

Choice, first that is set: the `backend=` argument, `use_backend(...)`, the environment variable
CASVIT_KERNELS_BACKEND, else the first registered backend that can serve the call; which of `cuda` and
`triton` comes first on a GPU, gpu_order.py says. A backend that was asked for and cannot serve the call
raises with its reason; only the automatic choice moves on.

To add a backend: write one file beside `cpu.py` that implements `base.Backend`, add it to `_REGISTRY`,
and for each operation a file of its kernels (see `ops/mixer/kernels.py`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from . import gpu_order
from .base import Backend, BackendUnavailable, Problem
from .cpu import CpuBackend
from .cuda import CudaBackend
from .native import ISA_ENVIRONMENT
from .reference import ReferenceBackend
from .triton import TritonBackend

ENVIRONMENT = "CASVIT_KERNELS_BACKEND"
_KEY = os.fsencode(ENVIRONMENT) if os.name == "posix" else ENVIRONMENT  # as os.environ keeps it

_REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        CpuBackend(),  # before Triton, which in its interpreter takes tensors on the CPU too, if asked
        CudaBackend(),
        TritonBackend(),
        ReferenceBackend(),
    )
}
_override: ContextVar[str | None] = ContextVar("casvit_kernels_backend", default=None)
_warned = False


class BackendStatus(NamedTuple):
    """A backend, and whether it can be used on this machine."""

    name: str  #: as `use_backend` and ``backend=`` take it
    usable: bool
    reason: str | None  #: why not, None when usable


class Choice(NamedTuple):
    """What `select` answers to a problem, and why."""

    backend: str | None  # that serves it; None: the call raises
    asked: str | None  # by whom it was asked for, e.g. "CASVIT_KERNELS_BACKEND"; None: by nobody
    passed_over: tuple[BackendStatus, ...]  # the earlier ones, each with its reason
    error: str | None  # what the call raises


def backends() -> list[BackendStatus]:
    """Every known backend, in order of preference, usable on this machine or why not.

    The order is that for a GPU; a CPU tensor is served by the first that computes on the CPU. A backend
    that is usable may still refuse a call, for its dtype say: `BackendUnavailable` then has the reason.
    """
    return [
        BackendStatus(b.name, (reason := b.why_not()) is None, reason)
        for b in _in_order("cuda", None)
    ]


def _in_order(device: str, ordinal: int | None) -> Iterable[Backend]:
    """By preference for a device."""
    if device != "cuda" or not gpu_order.triton_first(ordinal):
        return _REGISTRY.values()
    turned = {"cuda": "triton", "triton": "cuda"}
    return [_REGISTRY[turned.get(name, name)] for name in _REGISTRY]


def check_name(name: str | None, origin: str) -> None:
    """Raise ValueError unless `name` is None or a known backend."""
    if name is not None and name not in _REGISTRY:
        known = ", ".join(_REGISTRY)
        raise ValueError(f"{origin}: expected one of {known}, got {name!r}")


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the context, calls without a `backend=` of their own use backend `name`.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or None for the automatic choice.
            Holds for the current thread (or task) only. A function compiled with `torch.compile`
            keeps the choice it was compiled with.

    Raises:
        ValueError: the name is not known.
    """
    check_name(name, "use_backend(name)")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def get(name: str) -> Backend:
    """The backend of a name that `check_name` accepts."""
    return _REGISTRY[name]


def select(
    requested: str | None,
    problem: Problem,
    among: Container[str] | None = None,
    operation: str = "",
) -> Backend:
    """The backend that serves `problem`; see the module docstring for the order.

    Args:
        among: the backends that have the operation, "reference" among them; None: all.
        operation: its name, for the error.

    Raises:
        ValueError: the environment variable names no known backend.
        BackendUnavailable: the backend that was asked for cannot serve the problem.
    """
    name, origin = _asked(requested)
    check_name(name, origin)
    if name is not None:
        if among is not None and name not in among:
            able = ", ".join(n for n in _REGISTRY if n in among)
            raise BackendUnavailable(
                f"{origin}={name!r} has no kernels for {operation}; those that do: {able}"
            )
        backend = _REGISTRY[name]
        reason = backend.why_not(problem)
        if reason is not None:
            raise BackendUnavailable(
                f"{origin}={name!r} cannot serve this call "
                f"({problem.dtype} on {problem.device}): {reason}"
            )
        return backend
    for backend in _in_order(problem.device, problem.ordinal):
        if among is not None and backend.name not in among:
            continue
        if backend.why_not(problem) is None:
            if backend.name == "reference":
                _say_once(problem)
            return backend
    raise AssertionError("the reference backend serves every problem")


def explain(problem: Problem, among: Container[str] | None = None, operation: str = "") -> Choice:
    """The choice for a call without a `backend=` of its own; nothing is raised or warned of.

    Args:
        among, operation: as `select` takes them.
    """
    name, origin = _asked(None)
    if name is not None:
        try:
            return Choice(select(None, problem, among, operation).name, origin, (), None)
        except (ValueError, BackendUnavailable) as error:
            return Choice(None, origin, (), str(error))
    passed: list[BackendStatus] = []
    for backend in _in_order(problem.device, problem.ordinal):
        if among is not None and backend.name not in among:
            continue
        if (reason := backend.why_not(problem)) is None:
            break
        passed.append(BackendStatus(backend.name, False, reason))
    missing = _unmet(problem) if backend.name == "reference" else None
    return Choice(None if missing else backend.name, None, tuple(passed), missing)


def first_choice(requested: str | None) -> str:
    """The name of the backend that `select` takes if it can serve the problem; unchecked."""
    name, _ = _asked(requested)
    return next(iter(_REGISTRY)) if name is None else name


def _asked(requested: str | None) -> tuple[str | None, str]:
    """The name that was asked for, and where."""
    if requested is not None:
        return requested, "backend"
    if (name := _override.get()) is not None:
        return name, "use_backend"
    # Finding nothing in os.environ takes 3 us of each call (two exceptions), behind it next to nothing.
    if _KEY not in getattr(os.environ, "_data", (_KEY,)):
        return None, ENVIRONMENT
    return os.environ.get(ENVIRONMENT) or None, ENVIRONMENT


def _say_once(problem: Problem) -> None:
    """The automatic choice ended at the reference where kernels could do better: say it once."""
    global _warned
    kernels = {"cpu": "cpu", "cuda": "triton"}.get(problem.device)
    reason = None if kernels is None else _REGISTRY[kernels].why_not()
    if reason is None:
        return
    if (missing := _unmet(problem)) is not None:
        raise BackendUnavailable(missing)
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"casvit_kernels runs on its plain PyTorch reference path: {reason}", stacklevel=4
    )


def _unmet(problem: Problem) -> str | None:
    """Why the reference must not serve instead: an instruction set was asked for, and cannot be used."""
    asked = problem.device == "cpu" and os.environ.get(ISA_ENVIRONMENT)
    return _REGISTRY["cpu"].why_not() if asked else None
