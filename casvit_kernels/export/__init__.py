"""Writes models to ONNX and Core ML files and checks what was written."""

from .coreml import to_coreml
from .inputs import Normalization
from .onnx import PRECISIONS, to_onnx
from .report import ExportError, ExportReport, UntrainedWeights

__all__ = [
    "PRECISIONS",
    "ExportError",
    "ExportReport",
    "Normalization",
    "UntrainedWeights",
    "to_coreml",
    "to_onnx",
]
