"""`to_onnx`: export with torch's dynamo exporter, then run the file in ONNX Runtime and compare."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ._common import (
    ExportError,
    ExportReport,
    Prepared,
    noise_like,
    prepare,
    quiet,
    require,
    staged,
)

_OLDEST_OPSET = 18  # what torch's exporter writes; newer ones are converted from it


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_size: int | tuple[int, int] = 224,
    batch: int = 1,
    dynamic_batch: bool = False,
    opset: int = 18,
    overwrite: bool = False,
    example_input: Tensor | None = None,
) -> ExportReport:
    """Write ``model`` in eval mode as one float32 ONNX file and check it in ONNX Runtime.

    The model, fused or not, is copied and left as it is. The file is written under another name,
    passes ``onnx.checker``, is compared with the unfused model in float64 on random input, and only
    then moved to ``path``: it must be about as exact as PyTorch in float32.

    Args:
        model: takes one tensor; gives one or several tensors (also in tuples, lists or dicts),
            which are called ``output`` or ``output0, output1, ...``. The input is called ``input``.
        path: ends in ``.onnx``.
        input_size: H and W of the input in pixels, one number or a pair. The number of channels is
            that of the model's first Conv2d.
        batch: images in a call.
        dynamic_batch: whether the file takes any batch of at least one; tried with two sizes.
        opset: 18 or later.
        overwrite: whether an existing file may be replaced.
        example_input: floating tensor that gives the shape instead of ``input_size``, ``batch`` and
            the first Conv2d.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model cannot compute such an input.
        FileExistsError, OSError: ``path`` exists, or its directory cannot be written to.
        ImportError: a package of the ``export`` extra is missing.
        ExportError: the file was written and failed its check; it is removed.
    """
    onnx = require("onnx")
    require("onnxscript")
    require("onnxruntime")
    newest = onnx.defs.onnx_opset_version()
    if (
        isinstance(opset, bool)
        or not isinstance(opset, int)
        or not (_OLDEST_OPSET <= opset <= newest)
    ):
        raise ValueError(
            f"opset: expected an integer from {_OLDEST_OPSET} to {newest}, got {opset!r}"
        )
    with staged(path, ".onnx", overwrite) as (final, draft):
        if final.is_dir():
            raise IsADirectoryError(f"path: expected a file name, got the directory {final}")
        prepared = prepare(model, input_size, batch, example_input)
        _write(prepared, draft, dynamic_batch, opset)
        _check_graph(draft, opset)
        batch = prepared.example.shape[0]
        errors = [
            _compare(prepared, draft, prepared.example),
            *(
                _compare(prepared, draft, noise_like(prepared.example, n))
                for n in ((batch, 1, batch + 2) if dynamic_batch else (batch,))
            ),
        ]
        size = draft.stat().st_size
    return ExportReport(
        path=final,
        format="onnx",
        bytes=size,
        max_error=max(worst for worst, _ in errors),
        mean_error=sum(mean for _, mean in errors) / len(errors),
        notes=prepared.notes,
    )


def _write(prepared: Prepared, draft: Path, dynamic_batch: bool, opset: int) -> None:
    example, shapes = prepared.example, None
    if dynamic_batch:
        # torch.export would take a batch of one for a constant.
        example = noise_like(example, max(2, example.shape[0]))
        shapes = ({0: torch.export.Dim("batch")},)
    with quiet(), torch.no_grad():
        torch.onnx.export(
            prepared.exported,
            (example,),
            draft,
            dynamo=True,
            external_data=False,
            opset_version=opset,
            input_names=["input"],
            output_names=prepared.output_names,
            dynamic_shapes=shapes,
        )


def _check_graph(draft: Path, opset: int) -> None:
    onnx = require("onnx")
    try:
        onnx.checker.check_model(str(draft), full_check=True)
    except Exception as error:
        raise ExportError(f"the exported file is no valid ONNX: {error}") from error
    graph = onnx.load(str(draft))
    versions = {entry.domain: entry.version for entry in graph.opset_import}
    if versions.get("") != opset:
        raise ExportError(f"opset: asked for {opset}, the exporter wrote {versions.get('')}")
    foreign = {node.domain for node in graph.graph.node} - {"", "ai.onnx"}
    if foreign:
        raise ExportError(f"the exported file has operators outside ONNX: {sorted(foreign)}")


def _compare(prepared: Prepared, draft: Path, x: Tensor) -> tuple[float, float]:
    """Max and mean absolute error of ONNX Runtime against float64."""
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(draft), options, providers=["CPUExecutionProvider"])
        results = session.run(prepared.output_names, {"input": x.numpy()})
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the exported file: {error}") from error
    with torch.no_grad():
        truth = prepared.truth(x.double())
        eager = prepared.plain(x)
    worst, total, count = 0.0, 0.0, 0
    for name, got, own, expected in zip(prepared.output_names, results, eager, truth, strict=True):
        if got.shape != tuple(expected.shape):
            raise ExportError(f"{name}: expected shape {tuple(expected.shape)}, got {got.shape}")
        difference = (torch.from_numpy(got).double() - expected).abs()
        # Ten times what PyTorch itself loses in float32, or about a hundred roundings.
        bound = max(
            10 * float((own.double() - expected).abs().max()), 1e-5 * float(expected.abs().max())
        )
        if not float(difference.max()) <= bound:
            raise ExportError(
                f"{name}: the exported file differs from the float64 reference by "
                f"{float(difference.max()):.3g}, expected at most {bound:.3g}"
            )
        worst = max(worst, float(difference.max()))
        total, count = total + float(difference.sum()), count + difference.numel()
    return worst, total / count
