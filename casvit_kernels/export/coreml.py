"""`to_coreml`: export to a Core ML package (ML program) and reload it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._common import ExportError, ExportReport, Prepared, prepare, quiet, require, staged

_PRECISIONS = ("fp16", "fp32")


def to_coreml(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_size: int | tuple[int, int] = 224,
    batch: int = 1,
    precision: str = "fp16",
    overwrite: bool = False,
    example_input: Tensor | None = None,
) -> ExportReport:
    """Write ``model`` in eval mode as a Core ML package (iOS 15, macOS 12 and later).

    The model, fused or not, is copied and left as it is. The package is written under another name,
    reloaded, its inputs and outputs are checked, and only then it is moved to ``path``. Core ML
    predicts on a Mac only, so the numbers it computes are not checked here.

    Args:
        model: as for `casvit_kernels.export.to_onnx`, also the names of input and outputs.
        path: ends in ``.mlpackage``.
        input_size, batch, overwrite, example_input: as for `casvit_kernels.export.to_onnx`.
        precision: ``"fp16"`` or ``"fp32"``, for weights and arithmetic; input and outputs are
            float32.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model cannot compute such an input.
        FileExistsError, OSError: ``path`` exists, or its directory cannot be written to.
        ImportError: coremltools is missing.
        ExportError: the package was written and failed its check; it is removed.
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(_PRECISIONS)}, got {precision!r}")
    coremltools = _coremltools()
    with staged(path, ".mlpackage", overwrite) as (final, draft):
        prepared = prepare(model, input_size, batch, example_input)
        _write(coremltools, prepared, draft, precision)
        _check(coremltools, prepared, draft)
        size = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
    return ExportReport(
        path=final,
        format="coreml",
        bytes=size,
        max_error=None,
        mean_error=None,
        notes=(
            *prepared.notes,
            f"ML program in {precision}; names and shapes were checked, numbers were not: "
            "Core ML predicts on a Mac only",
        ),
    )


def _coremltools() -> Any:
    # It logs the versions it was not tested with when it is imported.
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return require("coremltools")
    finally:
        logging.disable(disabled)


def _write(coremltools: Any, prepared: Prepared, draft: Path, precision: str) -> None:
    import numpy

    with quiet(), torch.no_grad():
        program = torch.export.export(prepared.exported, (prepared.example,), strict=False)
        package = coremltools.convert(
            program.run_decompositions({}),
            convert_to="mlprogram",
            inputs=[
                coremltools.TensorType(
                    name="input", shape=tuple(prepared.example.shape), dtype=numpy.float32
                )
            ],
            outputs=[
                coremltools.TensorType(name=name, dtype=numpy.float32)
                for name in prepared.output_names
            ],
            minimum_deployment_target=coremltools.target.iOS15,
            compute_precision=(
                coremltools.precision.FLOAT16
                if precision == "fp16"
                else coremltools.precision.FLOAT32
            ),
            skip_model_load=True,
        )
        package.save(str(draft))


def _check(coremltools: Any, prepared: Prepared, draft: Path) -> None:
    with quiet():
        try:
            package = coremltools.models.MLModel(str(draft), skip_model_load=True)
        except Exception as error:
            raise ExportError(f"the exported package cannot be reloaded: {error}") from error
        description = package.get_spec().description
    got = {
        feature.name: tuple(feature.type.multiArrayType.shape)
        for feature in (*description.input, *description.output)
    }
    wanted = {
        "input": tuple(prepared.example.shape),
        **dict(zip(prepared.output_names, prepared.outputs, strict=True)),
    }
    if got != wanted:
        raise ExportError(f"the exported package: expected inputs and outputs {wanted}, got {got}")
