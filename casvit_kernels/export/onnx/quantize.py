"""Half precision and 8 bits for an exported ONNX graph, by the tools of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..._optional import need
from ..converters import quiet
from ..report import ExportError
from . import graph

if TYPE_CHECKING:
    import numpy

INT8_ERROR = 0.3  # of the standard deviation of the outputs


def half(model: Any) -> Any:
    """Float16, except for means (long sums over a map), the input and the outputs."""
    float16 = need("onnxruntime.transformers.float16", "export")
    onnx_model = need("onnxruntime.transformers.onnx_model", "export")
    with quiet():
        made = float16.convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "ReduceMean", "GlobalAveragePool"],
        )
        sorted_model = onnx_model.OnnxModel(made)  # it puts casts at the end
        sorted_model.topological_sort()
    return sorted_model.model


def static(model: Any, calibration: Tensor, folder: Path) -> tuple[Any, str]:
    """Quantised by ONNX Runtime's static post-training quantisation, and a note.

    Weights for each output channel and symmetric, activations for each tensor. Gates stay in float32,
    because their sigmoid scales whole maps, and so do the elementwise operators between convolutions.
    """
    onnx, quantization = need("onnx", "export"), need("onnxruntime.quantization", "export")
    kept = set(graph.gates(model))
    source, target = folder / "float.onnx", folder / "quantised.onnx"
    try:
        onnx.save(model, str(source))
        with quiet():
            quantization.quantize_static(
                str(source),
                str(target),
                _reader(quantization, calibration),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm"],
                nodes_to_exclude=sorted(kept),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        made = onnx.load(str(target))
    except OSError:
        raise
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot quantise the model: {error}") from error
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    total = sum(node.op_type in ("Conv", "Gemm") for node in model.graph.node)
    left = sum(node.op_type in ("Conv", "Gemm") and node.name in kept for node in model.graph.node)
    if left == total:
        raise ExportError("precision='int8': nothing of the model can be quantised, all is gates")
    return made, f"int8: {total - left} of {total} convolutions and linear layers; gates in float32"


def _reader(quantization: Any, calibration: Tensor) -> Any:
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images: Iterator[Tensor] = iter(calibration.split(1))

        def get_next(self) -> dict[str, numpy.ndarray[Any, Any]] | None:
            x = next(self.images, None)
            return None if x is None else {"input": x.numpy()}

    return Reader()
