"""Writes models to ONNX and Core ML files and checks what was written."""

from ._common import ExportError, ExportReport, Normalization, UntrainedWeights
from .coreml import to_coreml
from .onnx import PRECISIONS, to_onnx

__all__ = [
    "PRECISIONS",
    "ExportError",
    "ExportReport",
    "Normalization",
    "UntrainedWeights",
    "to_coreml",
    "to_onnx",
]
