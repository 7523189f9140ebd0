"""Half precision and 8 bits for an exported ONNX graph, by the tools of ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import photographs
from .._optional import MissingExtra, need
from . import _graph
from ._common import ExportError, Prepared, quiet, resized

if TYPE_CHECKING:
    import numpy

INT8_ERROR = 0.3  # of the standard deviation of the outputs
FEW = 32  # fewer images than this are pointed out


def images(
    prepared: Prepared, calibration: Tensor | str | os.PathLike[str] | None
) -> tuple[Tensor, str]:
    """What to calibrate with, as an input of the model, and a note.

    Raises:
        TypeError, ValueError: they do not fit the model, or none are at hand.
    """
    shape = tuple(prepared.example.shape[1:])
    if isinstance(calibration, Tensor):
        x = calibration.detach().cpu()
        if not x.dtype.is_floating_point or tuple(x.shape[1:]) != shape or not len(x):
            raise ValueError(
                f"calibration: expected floating images of shape (N, {', '.join(map(str, shape))}), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        return x.float(), f"calibrated with {_number(len(x))}"
    if calibration is not None and not isinstance(calibration, (str, os.PathLike)):
        raise TypeError(
            f"calibration: expected a tensor or a directory, got {type(calibration).__name__}"
        )
    if len(shape) != 3 or shape[0] != 3:
        raise ValueError(
            f"calibration: expected a tensor for a model of input shape {shape}: "
            "pictures have 3 channels"
        )
    try:
        folder = None if calibration is None else Path(calibration)
        found = photographs.load(folder, "calibration")
    except MissingExtra as error:
        raise ValueError(f"calibration: expected images of your own: {error}") from None
    x = resized(found.pixels, shape[1:], prepared.normalize)
    of = "photographs that ship with packages" if calibration is None else str(calibration)
    return x, f"calibrated with {_number(len(x))} of {of}"


def _number(count: int) -> str:
    return f"{count} images" + (" (some hundred are better)" if count < FEW else "")


def half(model: Any) -> Any:
    """Float16 but for means, which would lose digits over a large map, and input and outputs."""
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

    Weights for each output channel and symmetric, activations for each tensor. Gates, whose sigmoid
    multiplies a whole map by what an error of theirs becomes, stay in float32, and so does what lies
    between the convolutions.
    """
    onnx, quantization = need("onnx", "export"), need("onnxruntime.quantization", "export")
    kept = set(_graph.gates(model))
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
