"""The installed ONNX Runtime: how it is started here, and the newest opset that it runs."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..._optional import need
from ..converters import quiet

OLDEST_OPSET = 17
EXPORTER_OPSET = 18  # the oldest that torch's exporter writes


@functools.cache
def newest_opset() -> int:
    """The newest opset that the installed onnx writes and the installed ONNX Runtime runs."""
    onnx, runtime = need("onnx", "export"), need("onnxruntime", "export")
    for opset in range(onnx.defs.onnx_opset_version(), EXPORTER_OPSET, -1):
        values = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in ("x", "y")]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", values[:1], values[1:]
        )
        imports = [onnx.helper.make_opsetid("", opset)]
        model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
        try:
            with quiet():
                runtime.InferenceSession(
                    model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
                )
        except Exception:
            continue
        return opset
    return EXPORTER_OPSET


def session_options() -> Any:
    """Silent, with as many threads as PyTorch."""
    options = need("onnxruntime", "export").SessionOptions()
    options.log_severity_level = 4  # fatal errors only: the others are raised
    options.intra_op_num_threads = torch.get_num_threads()
    return options
