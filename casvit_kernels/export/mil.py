"""The public address of the evaluator of Core ML programs; it lives in `coreml/mil/`."""

from .coreml.mil import Feature, Operation, Program, Unsupported

__all__ = ["Feature", "Operation", "Program", "Unsupported"]
