"""Converts a prepared model with coremltools and saves the package."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._optional import need
from ..._version import __version__
from ...testing.numerics import against_truth
from ..converters import culprit, quiet
from ..given import FACTOR, FLOOR
from ..prepare import Flat, Prepared, prepare
from ..report import ExportError, UntrainedWeights
from .compress import disk_errors
from .options import Options
from .padding import padded


def import_coremltools() -> Any:
    """Without the log lines on untested versions that its import writes."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return need("coremltools", "export")
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def numpy_random_state() -> Iterator[None]:
    """Restore the state of NumPy's global generator, from which coremltools draws."""
    import numpy

    state = numpy.random.get_state()
    try:
        yield
    finally:
        numpy.random.set_state(state)


def for_neural_engine(
    prepared: Prepared, options: Options, fold: bool, pad: bool
) -> tuple[Prepared, tuple[str, ...]]:
    """The model as it is converted, and what was done for the Neural Engine.

    Raises:
        ExportError: the network with padded channels is another function.
    """
    done = []
    if fold:
        done.append("BatchNorm folded into convolutions and linear layers where it can be")
    if options.precision != "fp32":
        done.append("fp16 arithmetic")
    if options.batch[0] == options.batch[1] and len(options.sizes) == 1:
        done.append("fixed input shape")
    if pad:
        wide, report = padded(prepared.plain.model)
        if report.changed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UntrainedWeights)  # said once already
                again = prepare(
                    wide, 224, 1, prepared.example, fold=fold, normalize=prepared.normalize or False
                )
            _check_padded(prepared, again.plain)
            prepared = dataclasses.replace(prepared, exported=again.exported)
            done.append(f"channels padded with zeros: {report.before} to {report.after}")
        else:
            done.append("channels are multiples of 8 as they are")
    return prepared, tuple(done)


def _check_padded(prepared: Prepared, wide: nn.Module) -> None:
    """The padded network is built from a state dict, which does not tell all that a model computes."""
    x = prepared.example
    with torch.no_grad():
        results = wide(x), prepared.plain(x), prepared.truth(x.double())
    for name, got, own, truth in zip(prepared.output_names, *results, strict=True):
        found = against_truth(got, own, truth)
        if not found.largest <= found.bound(FACTOR, FLOOR):
            raise ExportError(
                f"{name}: the exported program differs from the model: with padded channels it is "
                f"another function (by {found.largest:.3g}, expected at most "
                f"{found.bound(FACTOR, FLOOR):.3g}); leave pad_channels out"
            )


class _Softmax(nn.Module):
    def __init__(self, model: Flat) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)[0].softmax(1)  # type: ignore[no-any-return]


def to_program(coremltools: Any, prepared: Prepared, options: Options) -> Any:
    """The model as coremltools' ML program."""
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
        with quiet(), torch.no_grad(), disk_errors():
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


def _traced(model: nn.Module, prepared: Prepared, options: Options) -> Any:
    if options.batch[0] == options.batch[1] and len(options.sizes) == 1:
        program = torch.export.export(model, (prepared.example,), strict=False)
        return program.run_decompositions({})
    # coremltools takes no enumerated shapes for an exported program.
    return torch.jit.trace(model, prepared.example, check_trace=False)


def _input(coremltools: Any, prepared: Prepared, options: Options) -> Any:
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


def save(coremltools: Any, package: Any, prepared: Prepared, options: Options, draft: Path) -> Path:
    """Write the package with its metadata to ``draft``."""
    metadata = {**prepared.metadata, "precision": options.precision}
    package.short_description = f"{metadata['model']}, input {metadata['input range']}"
    package.version = __version__
    package.user_defined_metadata.update(metadata)
    with quiet(), disk_errors():
        package.save(str(draft))
    return draft
