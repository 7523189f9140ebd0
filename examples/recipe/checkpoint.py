"""Checkpoints of a run: written all or nothing, read safely, whole or not at all."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .problem import Problem

FORMAT = "casvit_kernels train_classification 1"


def write(path: Path, content: Mapping[str, Any], form: str = FORMAT) -> None:
    """Replace the file at ``path`` by ``content``, a mapping that `torch.save` takes.

    Whenever the process or the machine dies, ``path`` holds the old or the new content, complete.
    ``form`` says which script's checkpoint it is.

    Raises:
        Problem: the disk is full or refuses the file; what was there is kept.
    """
    buffer = io.BytesIO()
    torch.save({**content, "format": form}, buffer)
    # One name, so that what a killed run leaves behind is overwritten by the next.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the one saved before is kept" if path.exists() else ""
        raise Problem(f"{path}: cannot save a checkpoint: {error.strerror}{kept}") from error


def read(path: Path, form: str = FORMAT) -> dict[str, Any]:
    """What `write` put at ``path``, on the CPU; only tensors and plain data are read.

    Raises:
        Problem: no such file, a damaged one, or not a checkpoint of this script.
    """
    expected = f"{path}: expected a checkpoint of this script"
    try:
        # torch.load does not compare checksums: a flipped bit would become a weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Problem(f"{expected}, got: {error.strerror or error}") from error
    except Exception as error:  # what a damaged or foreign file makes the readers raise: anything
        raise Problem(f"{expected}, got a file that is damaged or something else") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != form:
        raise Problem(
            f"{expected}, got another checkpoint (format {found!r}); to start from its weights, "
            "give it to --finetune"
        )
    result: dict[str, Any] = content
    return result


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator that this process draws from, in plain data."""
    numpy = np.random.get_state(legacy=False)
    inner = numpy["state"]
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes() if _is_cuda(device) else None,
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": inner["key"].tobytes(), "pos": int(inner["pos"])}},
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Continue where `random_state` was taken."""
    torch.set_rng_state(_tensor(state["torch"]))
    if _is_cuda(device) and state["cuda"] is not None:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    key = np.frombuffer(inner["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**inner, "key": key}})


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _sync_directory(directory: Path) -> None:
    """Make the renaming itself last, where the system can open a directory."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
