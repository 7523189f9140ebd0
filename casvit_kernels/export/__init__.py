"""Writes models to ONNX and Core ML files and checks what was written."""

from ._common import ExportError, ExportReport
from .coreml import to_coreml
from .onnx import to_onnx

__all__ = ["ExportError", "ExportReport", "to_coreml", "to_onnx"]
