"""What the checks look at, gathered once; a check is given facts, so that tests can give others."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..backends import backends, check_name, cpu, get, native
from ..ops.mixer import weights
from ..ops.mixer.structure import watched_globally
from .cgroup import quota
from .variables import BACKEND

PACKAGE = Path(__file__).parents[1]


class Native(NamedTuple):
    """The native library."""

    why_not: str | None  # it cannot be used; else None
    compiler: str = ""
    same_weights: bool = True  # in the order that this version's Python names them in
    sources_newer: bool = False  # than the library; where they lie beside it
    sets: Mapping[
        str, str | None
    ] = {}  # instruction sets, best first: None where usable, else why not
    loaded_by_parent: bool = False  # this process was forked after that


class Gpu(NamedTuple):
    """GPUs, and what this PyTorch makes of them."""

    present: bool  # a device file of an NVIDIA GPU is there, or PyTorch can use one
    usable: tuple[str, ...] = ()  # names of those that PyTorch can use
    built_for: str = "CPU"  # what PyTorch was built for: "CPU", "CUDA 13.0", "ROCm 7.0"
    driver: str | None = None  # NVIDIA's
    said: str | None = None  # PyTorch, when it was asked
    reasons: Mapping[str, str | None] = {}  # why `cuda` and `triton` cannot be used, or None


class Facts(NamedTuple):
    """Of one process, and the machine that it runs on."""

    environ: Mapping[str, str]
    torch: str  # version
    native: Native
    elsewhere: str | None  # another installation with a native library, beside what was imported
    threads: int  # of PyTorch, and so of the kernels
    cpus: int  # of the machine
    allowed: int  # of them, that this process may run on
    quota: float | None  # CPUs' worth of time that it may take
    load: float | None  # processes that ran or waited, over the last minute
    maps: str | None  # /proc/self/maps, where there is one
    cpuinfo: str | None  # /proc/cpuinfo, likewise
    backend_error: str | None  # what CASVIT_KERNELS_BACKEND asks for and is not there
    modes: tuple[str, ...]  # keys of `settings.MODES`
    gpu: Gpu

    @property
    def limit(self) -> int:
        """Threads that can run at a time."""
        most = self.allowed if self.quota is None else min(self.allowed, -(-self.quota // 1))
        return max(1, int(most))


def gather() -> Facts:
    """The facts of this process and this machine."""
    return Facts(
        environ=dict(os.environ),
        torch=torch.__version__,
        native=_native(),
        elsewhere=_elsewhere(),
        threads=torch.get_num_threads(),
        cpus=os.cpu_count() or 1,
        allowed=_allowed(),
        quota=quota(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        maps=_read("/proc/self/maps"),
        cpuinfo=_read("/proc/cpuinfo"),
        backend_error=_backend_error(),
        modes=_modes(),
        gpu=_gpu(),
    )


def _native() -> Native:
    library, reason = native.load()
    if library is None:
        return Native(reason)
    names = [name.replace(".", "_") for name in weights.NAMES]
    built = (PACKAGE / "_C.so").stat().st_mtime
    sources = (PACKAGE.parent / "csrc").rglob("*.*")
    return Native(
        None,
        library.casvit_build_info().decode(),
        library.casvit_mixer_weights().decode().split(",") == names,
        any(p.stat().st_mtime > built for p in sources if p.suffix in (".cpp", ".h", ".cu")),
        cpu.instruction_sets(),
        native.loaded_by() != os.getpid(),
    )


def _elsewhere() -> str | None:
    for found in importlib.metadata.distributions(name="casvit-kernels"):
        folder = Path(str(found.locate_file("casvit_kernels")))
        if (folder / "_C.so").is_file() and not folder.samefile(PACKAGE):
            return str(folder)
    return None


def _allowed() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _backend_error() -> str | None:
    name = os.environ.get(BACKEND) or None
    try:
        check_name(name, BACKEND)
    except ValueError as error:
        return str(error)
    reason = None if name is None else get(name).why_not()
    return None if reason is None else f"{name!r} cannot be used: {reason}"


def _modes() -> tuple[str, ...]:
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    found = {
        "anomaly": torch.is_anomaly_enabled(),
        "fill": torch.are_deterministic_algorithms_enabled() and fills,
        "hooks": watched_globally(),
        "functions": torch._C._len_torch_function_stack() > 0,
    }
    return tuple(name for name, on in found.items() if on)


def _gpu() -> Gpu:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    built = "CPU"
    if torch.version.cuda:
        built = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    names = tuple(torch.cuda.get_device_name(i) for i in range(count))
    driver = _read("/proc/driver/nvidia/version") or ""
    words = driver.partition("Kernel Module")[2].split()
    return Gpu(
        bool(names) or any(Path("/dev").glob("nvidia[0-9]*")),
        names,
        built,
        # "... Kernel Module  535.104.05  ...", or "... Kernel Module for x86_64  570.86.10  ...".
        next((word for word in words if word[0].isdigit()), None),
        str(said[0].message).partition(". ")[0] if said else None,
        {b.name: b.reason for b in backends() if b.name in ("cuda", "triton")},
    )


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
