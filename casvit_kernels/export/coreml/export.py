"""`to_coreml`: write a model as a Core ML package (ML program), evaluate what was saved and compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration import images as calibration_images
from ..files import staged
from ..inputs import Normalization
from ..prepare import Prepared, prepare
from ..report import ExportError, ExportReport
from . import convert
from .compress import PRECISIONS, compress
from .mil import Program, Unsupported
from .neural_engine import NeuralEngineReport, examine
from .options import Options, Size, batch_range, check_input, labels_of, sizes_of, target_of
from .verify import Check, Errors, check_description, check_prediction, compressed_constants


def to_coreml(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: Size = 224,
    *,
    batch: int | tuple[int, int] = 1,
    other_sizes: Sequence[Size] = (),
    precision: str = "fp16",
    deployment_target: str | None = None,
    image_input: bool = False,
    class_labels: Sequence[str] | None = None,
    normalize: Normalization | bool = False,
    fold: bool = True,
    pad_channels: bool = False,
    calibration: Tensor | str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    overwrite: bool = False,
    example_input: Tensor | None = None,
) -> ExportReport:
    """Write ``model`` in eval mode as a Core ML package (ML program).

    The model, fused or not, is copied and left as it is. The package is written under another name
    and read again; its program is evaluated on the CPU, operation by operation with fp16 rounding, on
    random input and photographs, and compared with the unfolded model in float64. On a Mac Core ML
    predicts, too. Only then the package is moved to ``path``: what does not match, or was not
    finished, is removed.

    Args:
        model: as for `casvit_kernels.export.to_onnx`, also the names of input and outputs.
        path: ends in ``.mlpackage``.
        input_size, normalize, fold, overwrite, example_input: as for `casvit_kernels.export.to_onnx`.
        batch: images in a call, or the smallest and largest number of them.
        other_sizes: sizes the package takes beside ``input_size`` (enumerated shapes).
        precision: ``"fp16"``, ``"fp32"``, for weights and arithmetic; ``"int8"``: weights of 8 bits with
            a scale for each channel; ``"palettized"``: weights of 6 bits, a table for each tensor; both
            with fp16 arithmetic, and with the gates' convolutions left in fp16. Input and outputs are
            float32 (or an image).
        deployment_target: oldest system that must run it, as coremltools calls it (``"iOS16"``,
            ``"macOS13"``); None: the oldest that can (iOS 15; 16 if compressed; 17 with
            ``calibration``).
        image_input: the input is an image (RGB or grayscale), normalised in the program by
            ``normalize``, or if that is False by the published training's mean and deviation.
        class_labels: names of the classes: makes the package a classifier, with the outputs
            ``classLabel`` and ``classLabel_probs`` after a softmax.
        pad_channels: widen maps with zeros to a multiple of 8 channels (220 to 224).
        calibration: with ``precision="int8"``: images ``(N, C, H, W)`` as the package takes them (0 to
            255 for ``image_input``), or a directory of pictures; the inputs of convolutions and linear
            layers are then of 8 bits, too (not of additions and products).
        tolerance: error of a compressed program that passes, root mean square over that of the outputs;
            None: 0.2 for int8, 0.3 for palettized, 0.5 with ``calibration``. fp16 and fp32 are held to
            PyTorch's own rounding.
        verify: False skips evaluation and comparison, not coremltools' own checks.

    Returns:
        `ExportReport`, with what is known of the program on the Neural Engine.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model cannot compute such an input.
        FileExistsError, OSError: ``path`` exists, or cannot be written to.
        ImportError: coremltools is missing.
        ExportError: the model cannot be converted, or the package was written and failed its check; it
            is removed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if calibration is not None and precision != "int8":
        raise ValueError(
            f"calibration: expected None with precision={precision!r}, "
            f"got {type(calibration).__name__}"
        )
    if tolerance is not None and not (isinstance(tolerance, float) and tolerance > 0):
        raise ValueError(f"tolerance: expected a number above 0 or None, got {tolerance!r}")
    low, high = batch_range(batch)
    coremltools = convert.import_coremltools()
    target = target_of(coremltools, deployment_target, precision, calibration is not None)
    if image_input and normalize is False:
        normalize = Normalization(top=255.0)
    elif image_input and normalize is True:
        raise ValueError(
            "normalize: expected a Normalization from 0 to 255 with image_input (False takes the "
            "published one), got True"
        )
    with (
        torch.autocast("cpu", enabled=False),
        convert.numpy_random_state(),
        staged(path, ".mlpackage", overwrite, folder=True) as (final, draft),
    ):
        prepared = prepare(model, input_size, low, example_input, fold=fold, normalize=normalize)
        given = prepared.example.shape[0]
        if isinstance(batch, int):
            low = high = given  # of an example, as for ONNX
        elif given != low:
            raise ValueError(
                f"batch: expected the smallest to be that of example_input, {given}, got {batch}"
            )
        options = Options(
            precision,
            target,
            (low, high),
            sizes_of(prepared, other_sizes, low != high),
            image_input,
            labels_of(class_labels, prepared, high),
        )
        check_input(prepared, options)
        chosen = None if calibration is None else calibration_images(prepared, calibration)
        prepared, done = convert.for_neural_engine(prepared, options, fold, pad_channels)
        package = convert.to_program(coremltools, prepared, options)
        notes = [*prepared.notes]
        errors, check = None, None
        if verify:
            check = Check(prepared, _shapes(prepared, options), options.labels, tolerance)
            original = Program(convert.save(coremltools, package, prepared, options, draft))
            float_precision = "fp32" if precision == "fp32" else "fp16"
            errors = _evaluated(check, original, float_precision, options)
            notes.append(f"evaluated on the CPU from the saved package; {check.note}")
        if precision in ("int8", "palettized"):
            package, how = compress(package, draft, precision, chosen)
            notes.append(how)
            convert.save(coremltools, package, prepared, options, draft)
            if check is not None:
                program = Program(draft)
                compressed_constants(program, original, precision)
                name = "int8 with activations" if calibration is not None else precision
                errors = _evaluated(check, program, name, options)
        elif check is None:
            convert.save(coremltools, package, prepared, options, draft)
        if check is None:
            notes.append("not verified: the program was not evaluated")
        check_description(coremltools, prepared, options, draft)
        notes.append(check_prediction(coremltools, prepared, options, draft))
        engine = _examined(draft, done, notes)
        size = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
    return ExportReport(
        path=final,
        format="coreml",
        bytes=size,
        max_error=None if errors is None else errors.max,
        mean_error=None if errors is None else errors.mean,
        notes=(*notes, f"ML program in {precision} for {options.target.name} and later"),
        top1=None if errors is None else errors.top1,
        images=0 if errors is None else errors.images,
        neural_engine=engine,
    )


def _shapes(prepared: Prepared, options: Options) -> list[tuple[int, ...]]:
    """Of inputs to try: every size, the smallest and the largest batch."""
    if prepared.example.dim() != 4:
        return [tuple(prepared.example.shape)]
    channels = prepared.example.shape[1]
    batches = sorted(set(options.batch))
    return [(n, channels, *size) for n in batches for size in options.sizes]


def _evaluated(check: Check, program: Program, precision: str, options: Options) -> Errors:
    try:
        return check.program(program, precision, options.image_input)
    except Unsupported as error:
        raise ExportError(f"the exported program cannot be evaluated: {error}") from error


def _examined(draft: Path, done: tuple[str, ...], notes: list[str]) -> NeuralEngineReport | None:
    try:
        return examine(Program(draft), done)
    except Unsupported as error:  # without verification it may have more than can be evaluated
        notes.append(f"no report on the Neural Engine: {error}")
        return None
