"""`to_coreml`: coremltools' conversion, and a check that evaluates the saved package."""

from .export import to_coreml

__all__ = ["to_coreml"]
