"""`to_coreml`: export to a Core ML package (ML program), and evaluate what was saved."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._optional import need
from .._version import __version__
from ..surgery.fold import plain_copy
from ._common import (
    ExportError,
    ExportReport,
    Flat,
    Normalization,
    Prepared,
    UntrainedWeights,
    _strides_fit,
    culprit,
    prepare,
    quiet,
)
from .coreml_check import Check, Errors, compressed_constants, predicted
from .coreml_compress import PRECISIONS, compress, oldest_target
from .files import staged
from .mil import Program, Unsupported
from .neural_engine import NeuralEngineReport, examine
from .padding import padded

Size = int | tuple[int, int]


class _Options(NamedTuple):
    precision: str
    target: Any  # of coremltools
    batch: tuple[int, int]  # the smallest and the largest
    sizes: tuple[tuple[int, int], ...]  # the default one first
    image_input: bool
    labels: tuple[str, ...] | None


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

    Raises:
        TypeError, ValueError: an argument does not fit, or the model cannot compute such an input.
        FileExistsError, OSError: ``path`` exists, or its directory cannot be written to.
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
    low, high = _batch(batch)
    coremltools = _coremltools()
    target = _target(coremltools, deployment_target, precision, calibration is not None)
    if image_input and normalize is False:
        normalize = Normalization(top=255.0)
    elif image_input and normalize is True:
        raise ValueError(
            "normalize: expected a Normalization from 0 to 255 with image_input (False takes the "
            "published one), got True"
        )
    with _numpy_random_state(), staged(path, ".mlpackage", overwrite) as (final, draft):
        prepared = prepare(model, input_size, low, example_input, fold=fold, normalize=normalize)
        given = prepared.example.shape[0]
        if isinstance(batch, int):
            low = high = given  # of an example, as for ONNX
        elif given != low:
            raise ValueError(
                f"batch: expected the smallest to be that of example_input, {given}, got {batch}"
            )
        options = _Options(
            precision,
            target,
            (low, high),
            _sizes(prepared, other_sizes, low != high),
            image_input,
            _labels(class_labels, prepared, high),
        )
        _check_input(prepared, options)
        chosen = None if calibration is None else _images(prepared, calibration)
        prepared, done = _for_neural_engine(prepared, model, options, fold, pad_channels)
        package = _converted(coremltools, prepared, options)
        notes = [*prepared.notes]
        errors, check = None, None
        if verify:
            check = Check(prepared, _shapes(prepared, options), options.labels, tolerance)
            original = Program(_saved(coremltools, package, prepared, options, draft))
            float_precision = "fp32" if precision == "fp32" else "fp16"
            errors = _evaluated(check, original, float_precision, options)
            notes.append(f"evaluated on the CPU from the saved package; {check.note}")
        if precision in ("int8", "palettized"):
            package, how = compress(package, draft, precision, chosen)
            notes.append(how)
            _saved(coremltools, package, prepared, options, draft)
            if check is not None:
                program = Program(draft)
                compressed_constants(program, original, precision)
                name = "int8 with activations" if calibration is not None else precision
                errors = _evaluated(check, program, name, options)
        elif check is None:
            _saved(coremltools, package, prepared, options, draft)
        if check is None:
            notes.append("not verified: the program was not evaluated")
        _reload(coremltools, prepared, options, draft)
        notes.append(_on_a_mac(coremltools, prepared, options, draft))
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


# Arguments ---------------------------------------------------------------------------------------


def _coremltools() -> Any:
    # It logs the versions it was not tested with when it is imported.
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return need("coremltools", "export")
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _numpy_random_state() -> Iterator[None]:
    """The caller's random numbers go on as they were: coremltools draws some, too."""
    import numpy

    state = numpy.random.get_state()
    try:
        yield
    finally:
        numpy.random.set_state(state)


def _batch(batch: int | tuple[int, int]) -> tuple[int, int]:
    numbers = (batch, batch) if isinstance(batch, int) else batch
    if not (
        isinstance(numbers, (tuple, list))
        and len(numbers) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
        and numbers[0] <= numbers[1]
    ):
        what = "a pair (smallest, largest)" if isinstance(batch, tuple) else "a positive integer"
        raise ValueError(f"batch: expected {what}, got {batch!r}")
    return numbers[0], numbers[1]


def _target(coremltools: Any, name: str | None, precision: str, calibrated: bool) -> Any:
    targets = coremltools.target.__members__
    oldest = targets[oldest_target(precision, calibrated)]
    if name is None:
        return oldest
    known = [key for key, value in targets.items() if value.value >= targets["iOS15"].value]
    if name not in known:
        raise ValueError(f"deployment_target: expected one of {', '.join(known)}, got {name!r}")
    if targets[name].value < oldest.value:
        what = "calibration" if calibrated else f"precision={precision!r}"
        raise ValueError(
            f"deployment_target: {what} needs {oldest.name} or what came with it or after, "
            f"got {name!r}"
        )
    return targets[name]


def _sizes(
    prepared: Prepared, others: Sequence[Size], flexible_batch: bool
) -> tuple[tuple[int, int], ...]:
    height, width = prepared.example.shape[-2:]
    sizes = [(height, width)]
    for other in others:
        size = (other, other) if isinstance(other, int) else tuple(other)
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f"other_sizes: expected integers or pairs (H, W), got {other!r}")
        if size not in sizes:
            sizes.append((size[0], size[1]))
    if len(sizes) > 1 and flexible_batch:
        raise ValueError("other_sizes: expected none with a range of batches, Core ML has no both")
    if len(sizes) > 128:
        raise ValueError(f"other_sizes: Core ML takes 128 sizes at most, got {len(sizes)}")
    for size in sizes[1:]:
        try:
            with _strides_fit(prepared.plain), torch.no_grad():
                prepared.plain(torch.zeros(1, prepared.example.shape[1], *size))
        except Exception as error:
            raise ValueError(
                f"other_sizes: the model cannot compute an input of {size}: {error}"
            ) from error
    return tuple(sizes)


def _labels(labels: Sequence[str] | None, prepared: Prepared, batch: int) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"class_labels: expected a sequence of strings, got {labels!r:.60}")
    shape = prepared.outputs[0]
    if len(prepared.outputs) > 1 or len(shape) != 2 or batch != 1:
        raise ValueError(
            "class_labels: expected a model with one output (1, classes) and batch=1, "
            f"got outputs {prepared.outputs} and batch {batch}"
        )
    if len(labels) != shape[1] or len(set(labels)) != len(labels):
        raise ValueError(
            f"class_labels: expected {shape[1]} different labels, "
            f"got {len(labels)}, {len(set(labels))} of them different"
        )
    return tuple(labels)


def _check_input(prepared: Prepared, options: _Options) -> None:
    if options.image_input and (
        prepared.example.dim() != 4
        or prepared.example.shape[1] not in (1, 3)
        or options.batch != (1, 1)
    ):
        raise ValueError(
            "image_input: expected one image with 1 or 3 channels, "
            f"got an input of shape {tuple(prepared.example.shape)}, batch {options.batch}"
        )


def _images(prepared: Prepared, calibration: Any) -> tuple[Tensor, str]:
    from ._quantize import images  # needs numpy

    return images(prepared, calibration)


# Conversion --------------------------------------------------------------------------------------


def _for_neural_engine(
    prepared: Prepared, model: nn.Module, options: _Options, fold: bool, pad: bool
) -> tuple[Prepared, tuple[str, ...]]:
    """The model as it is converted, and what was done for the Neural Engine."""
    done = []
    if fold:
        done.append("BatchNorm folded into convolutions and linear layers where it can be")
    if options.precision != "fp32":
        done.append("fp16 arithmetic")
    if options.batch[0] == options.batch[1] and len(options.sizes) == 1:
        done.append("fixed input shape")
    if pad:
        wide, report = padded(plain_copy(model).float())
        if report.changed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UntrainedWeights)  # said once already
                again = prepare(
                    wide, 224, 1, prepared.example, fold=fold, normalize=prepared.normalize or False
                )
            prepared = dataclasses.replace(prepared, exported=again.exported)
            done.append(f"channels padded with zeros: {report.before} to {report.after}")
        else:
            done.append("channels are multiples of 8 as they are")
    return prepared, tuple(done)


class _Softmax(nn.Module):
    def __init__(self, model: Flat) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)[0].softmax(1)  # type: ignore[no-any-return]


def _converted(coremltools: Any, prepared: Prepared, options: _Options) -> Any:
    import numpy

    model: nn.Module = prepared.exported
    extra: dict[str, Any] = {}
    if options.labels is None:
        extra["outputs"] = [
            coremltools.TensorType(name=name, dtype=numpy.float32) for name in prepared.output_names
        ]
    else:
        model = _Softmax(prepared.exported)
        extra["classifier_config"] = coremltools.ClassifierConfig(list(options.labels))
    floats = (
        coremltools.precision.FLOAT32
        if options.precision == "fp32"
        else (coremltools.precision.FLOAT16)
    )
    try:
        with quiet(), torch.no_grad():
            return coremltools.convert(
                _traced(model, prepared, options),
                convert_to="mlprogram",
                inputs=[_input(coremltools, prepared, options)],
                minimum_deployment_target=options.target,
                compute_precision=floats,
                skip_model_load=True,
                **extra,
            )
    except OSError:
        raise
    except Exception as error:
        name = culprit(prepared.exported, prepared.example, _convertible(coremltools))
        raise ExportError(
            f"{name} cannot be converted to Core ML: {type(error).__name__}: {error}"
        ) from error


def _convertible(coremltools: Any) -> Callable[..., None]:
    """Raises where a module alone, with the tensors it was called with, cannot be converted."""

    def convert(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        program = torch.export.export(module, args, kwargs, strict=False)
        coremltools.convert(
            program.run_decompositions({}), convert_to="milinternal", skip_model_load=True
        )

    return convert


def _traced(model: nn.Module, prepared: Prepared, options: _Options) -> Any:
    if options.batch[0] == options.batch[1] and len(options.sizes) == 1:
        program = torch.export.export(model, (prepared.example,), strict=False)
        return program.run_decompositions({})
    # coremltools takes no enumerated shapes for an exported program.
    return torch.jit.trace(model, prepared.example, check_trace=False)


def _input(coremltools: Any, prepared: Prepared, options: _Options) -> Any:
    import numpy

    low, high = options.batch
    rest = prepared.example.shape[1:]
    shape: Any = tuple(prepared.example.shape)
    if low != high:
        shape = coremltools.Shape((coremltools.RangeDim(low, high, default=low), *rest))
    elif len(options.sizes) > 1:
        shapes = [(low, rest[0], *size) for size in options.sizes]
        shape = coremltools.EnumeratedShapes(shapes, default=shapes[0])
    if not options.image_input:
        return coremltools.TensorType(name="input", shape=shape, dtype=numpy.float32)
    # Its scale is one number for all channels; the program's own is one for each.
    layout = coremltools.colorlayout.RGB if rest[0] == 3 else coremltools.colorlayout.GRAYSCALE
    return coremltools.ImageType(name="input", shape=shape, color_layout=layout)


def _shapes(prepared: Prepared, options: _Options) -> list[tuple[int, ...]]:
    """Of inputs to try: every size, the smallest and the largest batch."""
    if prepared.example.dim() != 4:
        return [tuple(prepared.example.shape)]
    channels = prepared.example.shape[1]
    batches = sorted(set(options.batch))
    return [(n, channels, *size) for n in batches for size in options.sizes]


# The file ----------------------------------------------------------------------------------------


def _saved(
    coremltools: Any, package: Any, prepared: Prepared, options: _Options, draft: Path
) -> Path:
    """Write the package with its metadata to ``draft``."""
    metadata = {**prepared.metadata, "precision": options.precision}
    package.short_description = f"{metadata['model']}, input {metadata['input range']}"
    package.version = __version__
    package.user_defined_metadata.update(metadata)
    with quiet():
        package.save(str(draft))
    return draft


def _evaluated(check: Check, program: Program, precision: str, options: _Options) -> Errors:
    try:
        return check.program(program, precision, options.image_input)
    except Unsupported as error:
        raise ExportError(f"the exported program cannot be evaluated: {error}") from error


def _reload(coremltools: Any, prepared: Prepared, options: _Options, draft: Path) -> None:
    """Read the package as an application would, and hold its description to what was asked for."""
    with quiet():
        try:
            package = coremltools.models.MLModel(str(draft), skip_model_load=True)
        except Exception as error:
            raise ExportError(f"the exported package cannot be reloaded: {error}") from error
    spec = package.get_spec()
    got = {
        feature.name: tuple(feature.type.multiArrayType.shape)
        for feature in (*spec.description.input, *spec.description.output)
        if feature.type.WhichOneof("Type") == "multiArrayType"
    }
    wanted = {} if options.image_input else {"input": tuple(prepared.example.shape)}
    if options.labels is None:
        wanted |= dict(zip(prepared.output_names, prepared.outputs, strict=True))
    fixed = options.batch[0] == options.batch[1] and len(options.sizes) == 1
    if set(got) != set(wanted) or (fixed and got != wanted):
        raise ExportError(f"the exported package: expected inputs and outputs {wanted}, got {got}")
    if spec.specificationVersion > options.target.value:
        raise ExportError(
            f"deployment_target: asked for {options.target.name}, coremltools wrote "
            f"specification {spec.specificationVersion}, expected {options.target.value} at most"
        )


def _on_a_mac(coremltools: Any, prepared: Prepared, options: _Options, draft: Path) -> str:
    if options.image_input or options.labels is not None:
        return "not predicted by Core ML itself: only tensor inputs and outputs are compared there"
    results = predicted(coremltools, draft, prepared.example, prepared.output_names)
    if results is None:
        return "not predicted by Core ML itself, which needs a Mac"
    with torch.no_grad():
        truth = prepared.truth(prepared.example.double())
    worst = 0.0
    for name, got, expected in zip(prepared.output_names, results, truth, strict=True):
        worst = float((got.reshape(expected.shape) - expected).abs().max())
        size = float(expected.abs().max())
        allowed = size * {"fp32": 1e-3, "fp16": 0.1}.get(options.precision, 1.0)
        if not worst <= allowed:
            raise ExportError(
                f"{name}: Core ML's prediction differs from the float64 reference by {worst:.3g}, "
                f"expected at most {allowed:.3g}"
            )
    return f"Core ML on this Mac: max error {worst:.2g}"


def _examined(draft: Path, done: tuple[str, ...], notes: list[str]) -> NeuralEngineReport | None:
    try:
        return examine(Program(draft), done)
    except Unsupported as error:  # without verification it may have more than can be evaluated
        notes.append(f"no report on the Neural Engine: {error}")
        return None
