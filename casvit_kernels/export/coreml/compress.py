"""Compression of Core ML packages with coremltools' own tools after training."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._optional import need
from ..converters import quiet
from ..report import ExportError
from .mil import Operation, Program

PRECISIONS = ("fp16", "fp32", "int8", "palettized")
PALETTE_BITS = 6


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """coremltools writes weights by a library that calls a full disk a RuntimeError: raise OSError."""
    try:
        yield
    except RuntimeError as error:
        if "Writer]" not in str(error):  # [MIL FileWriter], [MIL StorageWriter]
            raise
        raise OSError(
            f"coremltools cannot write weights to {tempfile.gettempdir()} (is it full?): {error}"
        ) from error


def oldest_target(precision: str, calibrated: bool) -> str:
    """The first system whose programs can hold it."""
    if calibrated:
        return "iOS17"
    return "iOS16" if precision in ("int8", "palettized") else "iOS15"


def compress(
    package: Any, draft: Path, precision: str, calibration: tuple[Tensor, str] | None
) -> tuple[Any, str]:
    """Compress the weights of a package in fp16, and with images its activations.

    Args:
        package: coremltools' model.
        draft: where it was or will be saved; written to if it is not there.
        calibration: images and a note about them, or None for weights alone.

    Returns:
        The compressed model, and a note about it.
    """
    optimize = need("coremltools.optimize.coreml", "export")
    if not draft.exists():
        with quiet(), disk_errors():
            package.save(str(draft))
    program = Program(draft)
    gates = gate_convolutions(program)
    kept = dict.fromkeys(gates)
    with quiet(), disk_errors():
        if precision == "palettized":
            entries = optimize.OpPalettizerConfig(mode="kmeans", nbits=PALETTE_BITS)
            config = optimize.OptimizationConfig(global_config=entries, op_name_configs=kept)
            small = optimize.palettize_weights(package, config)
            return (
                small,
                f"weights of {PALETTE_BITS} bits, {len(gates)} gates' convolutions in fp16",
            )
        scaled = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
        config = optimize.OptimizationConfig(global_config=scaled, op_name_configs=kept)
        note = f"weights of 8 bits, {len(gates)} gates' convolutions in fp16"
        if calibration is not None:
            images, said = calibration
            package = _quantized_activations(optimize, package, program, images)
            note += f"; activations of 8 bits, {said}"
        return optimize.linear_quantize_weights(package, config), note


def gate_convolutions(program: Program) -> list[str]:
    """Names of the convolutions whose result goes to a sigmoid."""
    logits = {
        name
        for operation in program.operations
        if operation.type == "sigmoid"
        for name, _ in operation.parameters["x"]
    }
    return [
        operation.name
        for operation in program.operations
        if operation.type == "conv" and operation.outputs[0][0] in logits
    ]


def _quantized_activations(optimize: Any, package: Any, program: Program, images: Tensor) -> Any:
    """Inputs of convolutions and linear layers in 8 bits.

    Not of additions, which coremltools would quantise, too: they carry what all blocks before have
    summed up. Products and sigmoids stay in fp16 in any case.
    """
    scaled = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
    config = optimize.OptimizationConfig(op_type_configs={"conv": scaled, "linear": scaled})
    with _calibrated_by(activation_ranges(program, images)):
        return optimize.linear_quantize_activations(package, config, [])


def activation_ranges(program: Program, images: Tensor) -> dict[str, dict[str, Any]]:
    """Smallest and largest value of every result, by name, over ``images``."""
    ranges: dict[str, dict[str, Any]] = {}

    def widen(name: str, value: Tensor) -> None:
        low, high = value.float().aminmax()
        known = ranges.setdefault(name, {"rmin": low.numpy(), "rmax": high.numpy()})
        known["rmin"] = min(known["rmin"], low.numpy())
        known["rmax"] = max(known["rmax"], high.numpy())

    def observe(operation: Operation, value: Tensor) -> None:
        # Of several outputs the one that was not seen with this operation: order is kept.
        widen(next(seen), value)

    size = program.inputs[0].shape
    batch = size[0] if len(size) == 4 else 1
    for part in images.float().split(batch):
        if len(part) < batch:
            part = torch.cat([part, images[:1].expand(batch - len(part), -1, -1, -1)])
        widen("input", part)
        seen = (
            name
            for operation in program.operations
            if not operation.type.startswith("constexpr_")
            for name, declared in operation.outputs
            if declared is not None
        )
        program({"input": part}, observe)
    return ranges


@contextlib.contextmanager
def _calibrated_by(ranges: dict[str, dict[str, Any]]) -> Iterator[None]:
    """coremltools' activation quantisation takes these ranges: its own predicts, on a Mac only."""
    tool = need("coremltools.optimize.coreml._post_training_quantization", "export")
    name = "_get_activation_calibration_stats"
    if not hasattr(tool, name):
        version = need("coremltools", "export").__version__
        raise ExportError(f"calibration: coremltools {version} measures activations in another way")
    own = getattr(tool, name)
    setattr(tool, name, lambda *arguments: ranges)
    try:
        yield
    finally:
        setattr(tool, name, own)
