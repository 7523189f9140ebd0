"""`to_onnx`: torch's dynamo exporter, rewrites of the graph, and a check in ONNX Runtime."""

from .export import PRECISIONS, to_onnx
from .runtime import newest_opset

__all__ = ["PRECISIONS", "newest_opset", "to_onnx"]
