"""What all training scripts settle about the machine and where they write to."""

from __future__ import annotations

import argparse
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from .problem import Problem


def settle_machine(options: argparse.Namespace) -> None:
    """Replace "auto" in ``device`` and ``amp``, and None in ``workers``."""
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.amp == "auto":
        native = options.device == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        options.amp = "none" if options.device == "cpu" else "bf16" if native else "fp16"
    if options.workers is None:
        together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        options.workers = max(1, min(4, (os.cpu_count() or 1) // together))


def settle_output(options: argparse.Namespace, last_name: str) -> None:
    """Check ``output`` and ``resume``, and replace "auto" in the latter; raise `Problem` early."""
    if options.output is None:
        raise Problem("--output: expected a directory to write to, got none")
    last = options.output / last_name
    if options.resume == "auto":
        options.resume = last if last.exists() else None
    elif options.resume is not None:
        options.resume = Path(options.resume)
    if last.exists() and (options.resume is None or not last.samefile(options.resume)):
        raise Problem(
            f"--output: {options.output} holds a run: continue it with --resume auto, or give "
            "another directory"
        )


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes[amp]) if amp in dtypes else nullcontext()


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(
            f"--output: expected a directory that can be written to, got {path}: {error.strerror}"
        ) from error


def plain(value: Any) -> Any:
    """`value` as a checkpoint holds it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def say(text: str) -> None:
    print(text, flush=True)
