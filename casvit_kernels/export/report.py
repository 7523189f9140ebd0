"""`ExportReport`: what was written and how far it is from the model; and what an export raises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .coreml.neural_engine import NeuralEngineReport


class ExportError(RuntimeError):
    """A file was written that fails its check (and was removed), or could not be written at all."""


class UntrainedWeights(UserWarning):
    """The exported model looks as if it had never been trained."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from the float64 reference.

    Attributes:
        path: of the file or package.
        format: ``"onnx"`` or ``"coreml"``.
        bytes: its size.
        max_error: absolute, over all outputs, for random input and photographs; None where the numbers
            were not checked.
        mean_error: likewise.
        notes: what was done to the model, and what the caller may not expect.
        top1: share of the images whose largest output is the same as in float64, 0 to 1; None where the
            model gives no class scores.
        images: how many photographs, or images of the caller, that is a share of.
        neural_engine: of a Core ML package, what is known of it there.
    """

    path: Path
    format: str
    bytes: int
    max_error: float | None
    mean_error: float | None
    notes: tuple[str, ...]
    top1: float | None = None
    images: int = 0
    neural_engine: NeuralEngineReport | None = None

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.format}, {self.bytes / 1e6:.1f} MB)"]
        if self.max_error is not None and self.mean_error is not None:
            lines.append(
                f"  error against float64: max {self.max_error:.2g}, mean {self.mean_error:.2g}"
            )
        if self.top1 is not None:
            lines.append(f"  same top class as float64: {self.top1:.1%} of {self.images} images")
        lines += [f"  {note}" for note in self.notes]
        if self.neural_engine is not None:
            lines += [f"  {line}" for line in str(self.neural_engine).splitlines()]
        return "\n".join(lines)
