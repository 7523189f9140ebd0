"""Types and constants of a MIL program: protobuf and weights file to tensors.

Source: the message definitions of Apple's Core ML model format (``MIL.proto``), as coremltools
ships them compiled.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...._optional import need

Value = Any  # Tensor, str, or a list of these


class Unsupported(ValueError):
    """A MIL program uses something that is not evaluated; the message names it."""


class TensorType(NamedTuple):
    """Element type by MIL's name, and a shape with None for sizes that are not fixed."""

    dtype: str
    shape: tuple[int | None, ...]


# How the elements lie in memory, in the weights file as in immediate bytes.
_STORED = {
    "FLOAT16": torch.float16,
    "FLOAT32": torch.float32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT16": torch.int16,
    "UINT16": torch.uint16,
    "INT32": torch.int32,
    "UINT32": torch.uint32,
}
_BITS = {"UINT1": 1, "UINT2": 2, "UINT3": 3, "UINT4": 4, "UINT6": 6, "INT4": 4}  # packed
_READERS = {"FLOAT32": "read_float_data"}  # the others are called after their type

# What tensors of a type are held as; integers that are only parameters have room enough in int64.
TORCH_DTYPES = {
    "FLOAT16": torch.float16,
    "FLOAT32": torch.float32,
    "BOOL": torch.bool,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    **dict.fromkeys(("INT16", "UINT16", "INT32", "UINT32"), torch.int64),
    **dict.fromkeys(("UINT1", "UINT2", "UINT3", "UINT4", "UINT6"), torch.uint8),
    "INT4": torch.int8,
}


def tensor_type(spec: Any) -> TensorType:
    """The type of a value that is a tensor of a known number of dimensions."""
    kind = spec.WhichOneof("type")
    if kind != "tensorType":
        raise Unsupported(f"a value of {kind} where a tensor is expected")
    tensor = spec.tensorType
    dtype = need("coremltools", "export").proto.MIL_pb2.DataType.Name(tensor.dataType)
    if dtype not in TORCH_DTYPES:
        raise Unsupported(f"tensors of {dtype}")
    if tensor.rank != len(tensor.dimensions):
        raise Unsupported("tensors with any number of dimensions")
    return TensorType(
        dtype,
        tuple(
            d.constant.size if d.WhichOneof("dimension") == "constant" else None
            for d in tensor.dimensions
        ),
    )


class Values:
    """Reads the constants of one program.

    Args:
        weights: the directory of the package that holds the weights file.
    """

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._files: dict[str, Any] = {}

    def read(self, spec: Any) -> Value:
        """The constant of a protobuf ``Value``: tensor, string or list.

        Raises:
            Unsupported: it is of another type.
        """
        if spec.WhichOneof("value") == "blobFileValue":
            return self._tensor(tensor_type(spec.type), self._from_file(spec))
        immediate = spec.immediateValue
        kind = immediate.WhichOneof("value")
        if kind == "list":
            return [self.read(value) for value in immediate.list.values]
        if kind != "tensor":
            raise Unsupported(f"a constant {kind}")
        field = immediate.tensor.WhichOneof("value")
        if field == "strings":
            return _one_or_all(list(immediate.tensor.strings.values), spec.type.tensorType)
        declared = tensor_type(spec.type)
        if field is None:  # an empty tensor
            return torch.empty(_fixed(declared), dtype=TORCH_DTYPES[declared.dtype])
        if field == "bytes":
            return self._tensor(declared, _unpacked(declared, immediate.tensor.bytes.values))
        return self._tensor(declared, torch.tensor(list(getattr(immediate.tensor, field).values)))

    def _from_file(self, spec: Any) -> Tensor:
        name = Path(spec.blobFileValue.fileName).name
        if name not in self._files:
            storage = need("coremltools.libmilstoragepython", "export")
            self._files[name] = storage._BlobStorageReader(str(self._weights / name))
        dtype = tensor_type(spec.type).dtype
        reader = _READERS.get(dtype, f"read_{dtype.lower().replace('float', 'fp')}_data")
        # A copy: the readers hand out memory of their own, and halves as 16-bit integers.
        data = torch.tensor(getattr(self._files[name], reader)(spec.blobFileValue.offset))
        return data.view(torch.float16) if dtype == "FLOAT16" else data

    @staticmethod
    def _tensor(declared: TensorType, data: Tensor) -> Tensor:
        return data.to(TORCH_DTYPES[declared.dtype]).reshape(_fixed(declared))


def _fixed(declared: TensorType) -> tuple[int, ...]:
    shape = tuple(size for size in declared.shape if size is not None)
    if len(shape) != len(declared.shape):
        raise Unsupported("a constant without a fixed shape")
    return shape


def _unpacked(declared: TensorType, data: bytes) -> Tensor:
    if declared.dtype not in _BITS:
        return torch.frombuffer(bytearray(data), dtype=_STORED[declared.dtype])
    count = math.prod(_fixed(declared))
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    values = bit_fields(packed, _BITS[declared.dtype], count)
    return (values ^ 8) - 8 if declared.dtype == "INT4" else values  # the sign


def bit_fields(data: Tensor, bits: int, count: int) -> Tensor:
    """``count`` unsigned numbers of ``bits`` bits, packed from the lowest bit of each byte up."""
    single = (data.long()[:, None] >> torch.arange(8)) & 1
    fields = single.flatten()[: bits * count].reshape(count, bits)
    return (fields << torch.arange(bits)).sum(1)


def _one_or_all(strings: list[str], declared: Any) -> Value:
    return strings if declared.rank else strings[0]
