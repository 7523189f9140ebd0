"""`to_onnx`: write a model as one ONNX file, run the file and compare."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..._optional import need
from ..calibration import images as calibration_images
from ..files import staged
from ..inputs import Normalization
from ..prepare import prepare
from ..report import ExportReport
from . import quantize, write
from . import verify as checks
from .runtime import OLDEST_OPSET, newest_opset

PRECISIONS = ("fp32", "fp16", "int8")


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: int | tuple[int, int] = 224,
    *,
    batch: int | Literal["dynamic"] = 1,
    dynamic_size: bool = False,
    opset: int = 20,
    precision: str = "fp32",
    fold: bool = True,
    normalize: Normalization | bool = False,
    calibration: Tensor | str | os.PathLike[str] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    example_input: Tensor | None = None,
) -> ExportReport:
    """Write ``model`` in eval mode as one ONNX file and check it in ONNX Runtime.

    The model, fused or not, is copied and left as it is. The copy's BatchNorms are folded, its qkv
    convolutions taken apart and its two heads joined, which ONNX Runtime computes quicker. The file
    is written under another name, passes ``onnx.checker``, is compared with the model in float64 on
    random input and on photographs, and only then moved to ``path``.

    Args:
        model: takes one tensor; gives one or several tensors (also in tuples, lists or dicts),
            which are called ``output`` or ``output0, output1, ...``, those of a dense backbone
            (``fork_feat``) ``stage1`` to ``stage4``. The input is called ``input``.
        path: ends in ``.onnx``.
        input_size: H and W of the input in pixels, one number or a pair. The number of channels is
            that of the model's first Conv2d.
        batch: images in a call, or ``"dynamic"``: any number of at least one, tried with three.
        dynamic_size: whether the file takes any H and W, tried with three.
        opset: 17 up to the newest that the installed ONNX Runtime runs.
        precision: ``"fp32"``; ``"fp16"``: half precision, means and input and outputs in float32;
            ``"int8"``: convolutions and linear layers in 8 bits by ONNX Runtime's static
            quantisation, gates and what lies between in float32.
        fold: whether BatchNorms are folded, see `casvit_kernels.fold_for_inference`.
        normalize: put the normalisation of the input into the file: ImageNet's, or a
            `Normalization`.
        calibration: for ``"int8"``: images from which value ranges are taken, either as the model's
            input ``(N, C, H, W)`` or as a directory. None: photographs that ship with scikit-learn
            and scikit-image; some hundred images of your own data are better.
        verify: whether the file's numbers are compared.
        overwrite: whether an existing file may be replaced.
        example_input: floating tensor that gives the shape instead of ``input_size``, ``batch`` and
            the first Conv2d.

    Returns:
        `ExportReport`: printed, it says what was written and how exact it is.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model cannot compute such an input.
        FileExistsError, OSError: ``path`` exists, or cannot be written to.
        ImportError: a package of the ``export`` extra is missing.
        ExportError: the model cannot be exported (the module is named), or the file was written and
            failed its check; it is removed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "export")
    _check_arguments(batch, opset, precision, calibration)
    with (
        torch.autocast("cpu", enabled=False),
        staged(path, ".onnx", overwrite, folder=False) as (final, draft),
    ):
        dynamic = write.Dynamic(batch == "dynamic", dynamic_size)
        count = 1 if isinstance(batch, str) else batch
        prepared = prepare(model, input_size, count, example_input, fold=fold, normalize=normalize)
        if dynamic_size and prepared.example.dim() != 4:
            raise ValueError(
                "dynamic_size: expected an input (N, C, H, W), "
                f"got an example of shape {tuple(prepared.example.shape)}"
            )
        notes = [f"{precision}, opset {opset}", *prepared.notes]
        images = None
        if precision == "int8":  # before the slow part: it may be refused
            images, note = calibration_images(prepared, calibration)
            notes.append(note)
        written = write.build(prepared, dynamic, opset)
        if precision == "fp16":
            checks.check_range(prepared)
            written = quantize.half(written)
        elif images is not None:
            written, note = quantize.static(written, images, draft.parent)
            notes.append(note)
        write.save(written, draft, {**prepared.metadata, "precision": precision})
        write.check(draft, opset)
        found = checks.Found()
        if verify:
            found = checks.verify(prepared, draft, dynamic, precision, images, notes)
        else:
            notes.append("numbers not checked (verify=False)")
        size = draft.stat().st_size
    return ExportReport(
        path=final,
        format="onnx",
        bytes=size,
        max_error=found.worst,
        mean_error=found.mean,
        notes=tuple(notes),
        top1=found.top1,
        images=found.images,
    )


def _check_arguments(batch: Any, opset: Any, precision: Any, calibration: Any) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if isinstance(batch, str) and batch != "dynamic":
        raise ValueError(f'batch: expected a positive integer or "dynamic", got {batch!r}')
    if calibration is not None and precision != "int8":
        raise ValueError(
            f'calibration: expected None with precision={precision!r}, for "int8" only'
        )
    newest = newest_opset()
    if (
        isinstance(opset, bool)
        or not isinstance(opset, int)
        or not (OLDEST_OPSET <= opset <= newest)
    ):
        raise ValueError(
            f"opset: expected an integer from {OLDEST_OPSET} to {newest}, the newest that this "
            f"ONNX Runtime runs, got {opset!r}"
        )
