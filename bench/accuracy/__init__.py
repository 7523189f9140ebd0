"""Exactness of exported files: ONNX int8 on digits, Core ML packages."""
