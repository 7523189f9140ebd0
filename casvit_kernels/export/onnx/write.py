"""Builds the ONNX graph of a prepared model and writes it to a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..._optional import need
from ..converters import culprit, quiet
from ..prepare import Prepared
from ..report import ExportError
from . import graph
from .runtime import EXPORTER_OPSET


class Dynamic(NamedTuple):
    """Which sizes of the input are free."""

    batch: bool
    size: bool


def build(prepared: Prepared, dynamic: Dynamic, opset: int) -> Any:
    """The model as an ONNX graph in float32, simplified."""
    program = _program(prepared, dynamic)
    made = _exported(program, prepared, max(opset, EXPORTER_OPSET))
    # Where the exporter's version converter fails, the graph keeps another opset than asked for.
    if graph.version(made) != max(opset, EXPORTER_OPSET):
        made = _exported(program, prepared, EXPORTER_OPSET)
    graph.simplify(made)
    made = graph.convert(made, opset)
    _name_dimensions(made, dynamic)
    return made


def _program(prepared: Prepared, dynamic: Dynamic) -> Any:
    example, shapes = prepared.example, None
    if any(dynamic):
        if dynamic.batch:  # torch.export would take a batch of one for a constant
            example = prepared.noise(max(2, example.shape[0]), *example.shape[1:])
        free = torch.export.Dim.DYNAMIC
        shapes = (dict.fromkeys([0] * dynamic.batch + [2, 3] * dynamic.size, free),)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(
                prepared.exported, (example,), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        name = culprit(prepared.exported, example, _exportable)
        raise ExportError(f"{name} cannot be exported: {_first_line(error)}") from error


def _exported(program: Any, prepared: Prepared, opset: int) -> Any:
    try:
        with quiet(), torch.no_grad():
            written = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                opset_version=opset,
                input_names=["input"],
                output_names=prepared.output_names,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"the model has an operator that ONNX cannot express: {_first_line(error)}"
        ) from error
    assert written is not None
    return written.model_proto


def _exportable(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.export.export(module, args, kwargs, strict=False)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _name_dimensions(model: Any, dynamic: Dynamic) -> None:
    """Call the free dimensions ``batch``, ``height`` and ``width`` in place of ``s77``."""
    wanted = {0: "batch"} if dynamic.batch else {}
    if dynamic.size:
        wanted.update({2: "height", 3: "width"})
    at = model.graph.input[0].type.tensor_type.shape.dim
    names = {at[i].dim_param: name for i, name in wanted.items()}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r"\w+", lambda m: names.get(m.group(), m.group()), dim.dim_param
                )


def save(model: Any, draft: Path, metadata: dict[str, str]) -> None:
    """Write the graph with its metadata, without what names this machine."""
    onnx = need("onnx", "export")
    for node in model.graph.node:  # stack traces with the paths of this machine
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, str(draft))


def check(draft: Path, opset: int) -> None:
    """Hold the file to the ONNX standard and to the opset asked for."""
    onnx = need("onnx", "export")
    try:
        onnx.checker.check_model(str(draft), full_check=True)
    except Exception as error:
        raise ExportError(f"the exported file is no valid ONNX: {error}") from error
    model = onnx.load(str(draft))
    if graph.version(model) != opset:
        raise ExportError(f"opset: asked for {opset}, the exporter wrote {graph.version(model)}")
    foreign = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if foreign:
        raise ExportError(f"the exported file has operators outside ONNX: {sorted(foreign)}")
