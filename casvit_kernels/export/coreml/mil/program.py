"""`Program`: a saved Core ML package as a function of tensors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...._optional import need
from .operations import CONSTANT, FUNCTIONS, Arguments
from .values import TORCH_DTYPES, TensorType, Unsupported, Value, Values, tensor_type

Observer = Callable[["Operation", Tensor], None]


class Feature(NamedTuple):
    """An input or output as an application sees it."""

    name: str
    kind: str  #: "multiArray", "image", "string", "int64" or "dictionary"
    shape: tuple[int, ...]  #: the default one; () where the kind has none


class Operation(NamedTuple):
    """One operation; a parameter is an earlier result or constant by name, a value, or several."""

    type: str
    name: str
    parameters: dict[str, list[tuple[str | None, Value]]]  #: each (name, None) or (None, constant)
    outputs: tuple[tuple[str, TensorType | None], ...]  #: None for what is no tensor


class Program:
    """A Core ML ML program, read from a saved ``.mlpackage`` and evaluated on the CPU.

    It takes the operations of the file, one by one, and nothing of the converter that wrote them.
    Arithmetic inside an operation is float32; every result is rounded to the type that the file
    declares for it (fp16, fp32, int8), and must have the declared shape. Compressed constants
    (``constexpr_`` operations) are decompressed, and rounded likewise, once.

    Args:
        path: the package.

    Raises:
        Unsupported: an operation, parameter or type that is not evaluated; the message names it.
        ValueError: the package holds no ML program.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        package = _open(path)
        spec = package.get_spec()
        if spec.WhichOneof("Type") != "mlProgram":
            raise ValueError(f"path: expected an ML program, got a {spec.WhichOneof('Type')}")
        self.inputs = tuple(_feature(f) for f in spec.description.input)
        self.outputs = tuple(_feature(f) for f in spec.description.output)
        self.metadata = dict(spec.description.metadata.userDefined)
        functions = spec.mlProgram.functions
        if set(functions) != {"main"}:
            raise Unsupported(f"functions {sorted(functions)}, expected main alone")
        main = functions["main"]
        block = main.block_specializations[main.opset]
        self.opset: str = main.opset
        self._types = {value.name: tensor_type(value.type) for value in main.inputs}
        self._results = tuple(block.outputs)
        values = Values(Path(package.weights_dir or path))
        self.constants: dict[str, Value] = {}
        self.operations: list[Operation] = []  # without constants
        for operation in block.operations:
            self._take(operation, values)

    def constant(self, operation: Operation, parameter: str) -> Value:
        """The value of a parameter that is a constant.

        Raises:
            KeyError: the operation has no such parameter, or it is a result of another operation.
        """
        ((name, value),) = operation.parameters[parameter]
        return value if name is None else self.constants[name]

    def _take(self, spec: Any, values: Values) -> None:
        if spec.type == "const":
            self.constants[spec.outputs[0].name] = values.read(spec.attributes["val"])
            return
        operation = _operation(spec, values)
        if operation.type not in FUNCTIONS:
            raise Unsupported(f"operation {operation.type} ({operation.name})")
        if operation.type.startswith(CONSTANT):
            results = self._evaluate(operation, {})
            self.constants.update(results)
        self.operations.append(operation)

    def __call__(
        self, inputs: Mapping[str, Tensor], observe: Observer | None = None
    ) -> dict[str, Value]:
        """Evaluate the program.

        Args:
            inputs: a tensor for each of `inputs`. Images are ``(B, 3, H, W)`` or ``(B, 1, H, W)``
                with values from 0 to 255, in the order of colours that the file asks for.
            observe: called with each operation and each tensor it gives, rounded, in order.

        Returns:
            Of each of `outputs` a tensor; of a classifier a label and a dictionary.

        Raises:
            Unsupported: see the class.
            ValueError: an input is missing or has another shape.
        """
        known: dict[str, Value] = {}
        for name, declared in self._types.items():
            if name not in inputs:
                raise ValueError(f"inputs: expected {sorted(self._types)}, got {sorted(inputs)}")
            known[name] = inputs[name].to(TORCH_DTYPES[declared.dtype])
            if not _fits(known[name].shape, declared.shape):
                raise ValueError(
                    f"inputs: {name}: expected shape {declared.shape}, "
                    f"got {tuple(inputs[name].shape)}"
                )
        for operation in self.operations:
            if operation.type.startswith(CONSTANT):
                continue
            results = self._evaluate(operation, known)
            known.update(results)
            if observe is not None:
                for value in results.values():
                    if isinstance(value, Tensor):
                        observe(operation, value)
        return {name: known[name] for name in self._results}

    @torch.no_grad()
    def _evaluate(self, operation: Operation, known: dict[str, Value]) -> dict[str, Value]:
        arguments = Arguments(
            {key: self._argument(value, known) for key, value in operation.parameters.items()}
        )
        where = f"operation {operation.type} ({operation.name})"
        try:
            results = FUNCTIONS[operation.type](arguments)
        except Unsupported as error:
            raise Unsupported(f"{where}: {error}") from None
        if arguments.unread:
            raise Unsupported(f"{where}: parameters {sorted(arguments.unread)}")
        if not isinstance(results, tuple):
            results = (results,)
        if len(results) != len(operation.outputs):
            raise Unsupported(
                f"{where}: {len(operation.outputs)} outputs, evaluates {len(results)}"
            )
        rounded: dict[str, Value] = {}
        for value, (name, declared) in zip(results, operation.outputs, strict=True):
            if declared is not None:
                if not _fits(value.shape, declared.shape):
                    raise Unsupported(
                        f"{where}: declares shape {declared.shape}, evaluates to {tuple(value.shape)}"
                    )
                value = value.to(TORCH_DTYPES[declared.dtype])
            rounded[name] = value
        return rounded

    def _argument(self, bindings: list[tuple[str | None, Value]], known: dict[str, Value]) -> Value:
        values = [
            constant if name is None else known[name] if name in known else self.constants[name]
            for name, constant in bindings
        ]
        return values[0] if len(values) == 1 else values


def _open(path: str | os.PathLike[str]) -> Any:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # coremltools logs the versions it was not tested with
    try:
        return need("coremltools", "export").models.MLModel(os.fspath(path), skip_model_load=True)
    finally:
        logging.disable(disabled)


def _feature(spec: Any) -> Feature:
    kind = spec.type.WhichOneof("Type")
    shape: tuple[int, ...] = ()
    if kind == "multiArrayType":
        shape = tuple(spec.type.multiArrayType.shape)
    elif kind == "imageType":
        shape = (spec.type.imageType.height, spec.type.imageType.width)
    return Feature(spec.name, kind.removesuffix("Type"), shape)


def _operation(spec: Any, values: Values) -> Operation:
    name = values.read(spec.attributes["name"]) if "name" in spec.attributes else "unnamed"
    if spec.blocks:
        raise Unsupported(f"operation {spec.type} ({name}): nested blocks")
    parameters = {
        key: [
            (bound.name, None)
            if bound.WhichOneof("binding") == "name"
            else (None, values.read(bound.value))
            for bound in argument.arguments
        ]
        for key, argument in spec.inputs.items()
    }
    for key, value in spec.attributes.items():  # iOS 16 keeps compressed constants here
        if key != "name":
            parameters[key] = [(None, values.read(value))]
    outputs = tuple(
        (out.name, None if spec.type == "classify" else tensor_type(out.type))
        for out in spec.outputs
    )
    return Operation(spec.type, name, parameters, outputs)


def _fits(shape: tuple[int, ...] | torch.Size, declared: tuple[int | None, ...]) -> bool:
    return len(shape) == len(declared) and all(
        expected in (None, size) for size, expected in zip(shape, declared, strict=True)
    )
