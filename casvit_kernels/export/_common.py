"""What every export shares: the arguments, the copies to export and to compare with, the file."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..module import FusedCATM
from ..swap import unfuse, unfused


class ExportError(RuntimeError):
    """A file was written that fails its check (and was removed), or could not be written at all."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from the float64 reference.

    ``max_error`` and ``mean_error`` are absolute, over all outputs, for random input; None where
    the file cannot be run on this machine. ``notes`` say what the caller may not expect.
    """

    path: Path
    format: str
    bytes: int
    max_error: float | None
    mean_error: float | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.format}, {self.bytes / 1e6:.1f} MB)"]
        if self.max_error is not None and self.mean_error is not None:
            lines.append(
                f"  error against float64: max {self.max_error:.2g}, mean {self.mean_error:.2g}"
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


class Flat(nn.Module):
    """A model with one input, called ``input``, and a flat tuple of tensors as its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        leaves = _pytree.tree_leaves(self.model(input))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class Prepared:
    """Copies of the caller's model in eval mode on the CPU, and an input for them."""

    exported: Flat  # float32, fused as the caller's model is
    plain: Flat  # float32, unfused
    truth: Flat  # float64, unfused
    example: Tensor  # float32
    outputs: tuple[tuple[int, ...], ...]  # shapes for `example`
    notes: tuple[str, ...]

    @property
    def output_names(self) -> list[str]:
        if len(self.outputs) == 1:
            return ["output"]
        return [f"output{i}" for i in range(len(self.outputs))]


def require(package: str) -> Any:
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this export needs {package}: pip install casvit-kernels[export]"
        ) from error


def prepare(
    model: nn.Module, input_size: int | tuple[int, int], batch: int, example_input: Tensor | None
) -> Prepared:
    """Check the arguments, copy the model and run it once in float64."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors):
        raise ValueError("model: expected parameters with values, got some on the meta device")
    example = _example(model, input_size, batch, example_input)
    notes = []
    if any(m.training for m in model.modules()):
        notes.append("exported in eval mode; the model itself was left in training mode")
    dtypes = {t.dtype for t in tensors if t.is_floating_point()} - {torch.float32}
    if dtypes:
        names = ", ".join(sorted(str(d) for d in dtypes))
        notes.append(f"exported from a float32 copy; the model has parameters in {names}")

    exported = copy.deepcopy(model).eval().cpu().float()
    exported.requires_grad_(False)
    plain = _unfused(copy.deepcopy(exported))
    truth = Flat(copy.deepcopy(plain).double())
    try:
        with torch.no_grad():
            outputs = truth(example.double())
    except Exception as error:
        raise ValueError(
            f"input_size: the model cannot compute an input of shape {tuple(example.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not outputs:
        raise ValueError("model: expected an output with at least one tensor, got none")
    shapes = tuple(tuple(out.shape) for out in outputs)
    return Prepared(Flat(exported), Flat(plain), truth, example, shapes, tuple(notes))


def _unfused(model: nn.Module) -> nn.Module:
    if isinstance(model, FusedCATM):
        return unfused(model)
    unfuse(model)
    return model


def _example(
    model: nn.Module, input_size: int | tuple[int, int], batch: int, example_input: Tensor | None
) -> Tensor:
    if example_input is not None:
        if not isinstance(example_input, Tensor) or not example_input.dtype.is_floating_point:
            raise TypeError(f"example_input: expected a floating tensor, got {example_input!r:.60}")
        if example_input.dim() == 0 or example_input.numel() == 0:
            raise ValueError(
                "example_input: expected at least one element and a batch dimension, "
                f"got shape {tuple(example_input.shape)}"
            )
        return example_input.detach().cpu().float().contiguous()
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(map(_is_positive, size))):
        raise ValueError(
            f"input_size: expected a positive integer or a pair (H, W), got {input_size!r}"
        )
    if not _is_positive(batch):
        raise ValueError(f"batch: expected a positive integer, got {batch!r}")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(
            "model: expected a Conv2d to read the number of input channels from, got none: "
            "pass example_input"
        )
    return _noise((batch, first.in_channels, *size))


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def noise_like(example: Tensor, batch: int) -> Tensor:
    """Random float32 input of the example's shape but for the batch."""
    return _noise((batch, *example.shape[1:]))


@contextlib.contextmanager
def staged(
    path: str | os.PathLike[str], suffix: str, overwrite: bool
) -> Iterator[tuple[Path, Path]]:
    """The final path, and one beside it to write to, moved there when the block ends without error.

    Raises:
        ValueError: ``path`` does not end in ``suffix``.
        FileExistsError: ``path`` exists and ``overwrite`` is False.
        OSError: the directory is missing or cannot be written to.
    """
    final = Path(path)
    if final.suffix != suffix:
        raise ValueError(f"path: expected a name that ends in {suffix}, got {str(path)!r}")
    if final.exists() and not overwrite:
        raise FileExistsError(f"path: {final} exists already: pass overwrite=True to replace it")
    if not final.parent.is_dir():
        raise NotADirectoryError(f"path: expected an existing directory, got {final.parent}")
    try:
        folder = tempfile.TemporaryDirectory(prefix=".casvit-export-", dir=final.parent)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"path: cannot write into the directory ({error.strerror})",
            str(final.parent),
        ) from error
    with folder as name:
        draft = Path(name, f"draft{suffix}")
        yield final, draft
        aside = Path(name, "replaced")
        if final.is_dir():  # a package: a directory with content cannot be replaced in one step
            final.rename(aside)
        try:
            draft.replace(final)
        except BaseException:
            if aside.exists():
                aside.rename(final)
            raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back progress bars, log lines and warnings of an exporter; its exceptions pass."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
