"""GPUs: whether PyTorch can use those that are here, and whether a backend can."""

from __future__ import annotations

from collections.abc import Iterator

from .facts import Facts
from .finding import Finding

_NAME = "GPU"


def findings(facts: Facts) -> Iterator[Finding]:
    gpu = facts.gpu
    if not gpu.present:
        yield Finding(_NAME, "ok", "none here")
    elif gpu.usable:
        yield _served(facts)
    else:
        yield _unused(facts)


def _unused(facts: Facts) -> Finding:
    gpu = facts.gpu
    driver = f" (driver {gpu.driver})" if gpu.driver else ""
    visible = facts.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        found = f"one is here{driver}, CUDA_VISIBLE_DEVICES={visible!r} hides it"
        return Finding(_NAME, "note", found, "unset CUDA_VISIBLE_DEVICES")
    if gpu.built_for == "CPU":
        found = f"an NVIDIA GPU is here{driver}, and this PyTorch is built for CPUs alone"
        return Finding(_NAME, "note", found, "install a build for CUDA: https://pytorch.org")
    said = f": {gpu.said}" if gpu.said else ""
    return Finding(
        _NAME,
        "problem",
        f"an NVIDIA GPU is here{driver}, and this PyTorch (for {gpu.built_for}) cannot use it{said}",
        f"install a driver that serves {gpu.built_for}, or a PyTorch built for an older one; in a "
        "container start it with the GPU (docker run --gpus all)",
    )


def _served(facts: Facts) -> Finding:
    gpu = facts.gpu
    names = ", ".join(dict.fromkeys(gpu.usable))
    able = [name for name, reason in gpu.reasons.items() if reason is None]
    refused = {name: reason for name, reason in gpu.reasons.items() if reason is not None}
    if not able:
        found = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        remedy = "pip install 'triton>=3.6'"
        return Finding(_NAME, "problem", f"{names}; no backend can use it: {found}", remedy)
    found = f"{names}, by {' and '.join(able)}"
    if "driver" in (reason := refused.get("cuda") or ""):
        return Finding(_NAME, "note", f"{found}; not by cuda: {reason}", "install a newer driver")
    return Finding(_NAME, "ok", found)
