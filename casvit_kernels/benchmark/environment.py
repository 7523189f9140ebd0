"""What a measurement depends on: versions, machine, threads, date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..backends.cpu import active_instruction_set


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a measurement depends on, with the date; nothing that identifies the machine's owner.

    Args:
        device: as `torch.device` takes it; of a GPU its name, capability and memory in bytes are added.

    Returns:
        Versions, CPU, cores, threads, instruction sets and the date (ISO 8601, UTC), as plain values for
        JSON.
    """
    kind = torch.device(device).type
    gpu: dict[str, Any] = {}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda or torch.version.hip,
            "triton": _installed("triton"),
        }
    return {
        "casvit_kernels": __version__,
        "torch": torch.__version__,
        "onnxruntime": _installed("onnxruntime"),
        "openvino": _installed("openvino"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": kind,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": active_instruction_set(),  # of this library's kernels; None: not built
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **gpu,
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
