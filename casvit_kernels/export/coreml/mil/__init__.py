"""Evaluates Core ML programs (MIL) from a saved package on any machine; see `Program`."""

from .program import Feature, Operation, Program
from .values import Unsupported

__all__ = ["Feature", "Operation", "Program", "Unsupported"]
