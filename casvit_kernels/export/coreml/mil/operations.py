"""What each MIL operation computes, one function each, in PyTorch.

Floating tensors come as float32, whatever they are held as: sums inside an operation are float32, and
`Program` rounds the result to the type that the program declares, once. Core ML does not say how its
compute units sum inside an operation; the Neural Engine may well round sums to fp16.
Source: the operators' reference in the documentation of coremltools (MIL Ops, iOS 15 to iOS 18).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import TORCH_DTYPES, Unsupported, Value, bit_fields

Function = Callable[["Arguments"], Any]  # gives a tensor, or a tuple of values
FUNCTIONS: dict[str, Function] = {}
CONSTANT = "constexpr_"  # the operations whose results are constants start so


class Arguments:
    """The parameters of one operation; the ones that its function never reads are unsupported."""

    def __init__(self, values: dict[str, Value]) -> None:
        self._values = values
        self.unread = set(values)

    def value(self, name: str) -> Value:
        self.unread.discard(name)
        if name not in self._values:
            raise Unsupported(f"parameter {name} is missing")
        return self._values[name]

    def tensor(self, name: str) -> Tensor:
        value: Tensor = self.value(name)
        return value.float() if value.is_floating_point() else value

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self._values else None

    def integers(self, name: str, default: list[int] | None = None) -> list[int]:
        if name not in self._values and default is not None:
            return default
        numbers: list[int] = self.value(name).reshape(-1).tolist()
        return numbers

    def integer(self, name: str, default: int | None = None) -> int:
        if name not in self._values and default is not None:
            return default
        return int(self.value(name))

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.value(name)) if name in self._values else default

    def choice(self, name: str, default: str, *known: str) -> str:
        """A string, one of ``default`` and ``known``."""
        text: str = self.value(name) if name in self._values else default
        if text not in (default, *known):
            raise Unsupported(f"parameter {name} = {text!r}")
        return text


def operation(function: Function) -> Function:
    FUNCTIONS[function.__name__.rstrip("_")] = function
    return function


# Elementwise


@operation
def add(a: Arguments) -> Tensor:
    return a.tensor("x") + a.tensor("y")


@operation
def sub(a: Arguments) -> Tensor:
    return a.tensor("x") - a.tensor("y")


@operation
def mul(a: Arguments) -> Tensor:
    return a.tensor("x") * a.tensor("y")


@operation
def real_div(a: Arguments) -> Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise Unsupported("integers")
    return x / y


@operation
def relu(a: Arguments) -> Tensor:
    return F.relu(a.tensor("x"))


@operation
def sigmoid(a: Arguments) -> Tensor:
    return torch.sigmoid(a.tensor("x"))


@operation
def gelu(a: Arguments) -> Tensor:
    x = a.tensor("x")
    mode = a.choice("mode", "EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


@operation
def softmax(a: Arguments) -> Tensor:
    return torch.softmax(a.tensor("x"), a.integer("axis"))


@operation
def cast(a: Arguments) -> Tensor:
    dtype = a.choice("dtype", "fp32", "fp16")
    return a.tensor("x").to(torch.float16 if dtype == "fp16" else torch.float32)


@operation
def identity(a: Arguments) -> Tensor:
    return a.tensor("x")


# Layers


@operation
def conv(a: Arguments) -> Tensor:
    x, weight = a.tensor("x"), a.tensor("weight")
    if x.dim() != 4:
        raise Unsupported(f"{x.dim() - 2} spatial dimensions, expected 2")
    if a.choice("pad_type", "valid", "custom") == "custom":
        top, bottom, left, right = a.integers("pad")
        x = F.pad(x, (left, right, top, bottom))
    else:
        a.unread.discard("pad")  # without effect
    return F.conv2d(
        x,
        weight,
        a.optional("bias"),
        stride=a.integers("strides", [1, 1]),
        dilation=a.integers("dilations", [1, 1]),
        groups=a.integer("groups", 1),
    )


@operation
def linear(a: Arguments) -> Tensor:
    return F.linear(a.tensor("x"), a.tensor("weight"), a.optional("bias"))


@operation
def matmul(a: Arguments) -> Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    x = x.mT if a.flag("transpose_x", False) else x
    return x @ (y.mT if a.flag("transpose_y", False) else y)


@operation
def batch_norm(a: Arguments) -> Tensor:
    return F.batch_norm(
        a.tensor("x"),
        a.tensor("mean"),
        a.tensor("variance"),
        a.optional("gamma"),
        a.optional("beta"),
        eps=float(a.tensor("epsilon")),
    )


# Smaller and larger maps


@operation
def max_pool(a: Arguments) -> Tensor:
    x = a.tensor("x")
    if a.choice("pad_type", "valid", "custom") == "custom":
        top, bottom, left, right = a.integers("pad")
        x = F.pad(x, (left, right, top, bottom), value=float("-inf"))
    else:
        a.unread.discard("pad")  # without effect
    kernel = a.integers("kernel_sizes")
    strides = a.integers("strides", [1] * len(kernel))
    return F.max_pool2d(x, kernel, strides, ceil_mode=a.flag("ceil_mode", False))


def _scales(a: Arguments) -> tuple[float, float]:
    """The factors of height and width."""
    height, width = (a.tensor(f"scale_factor_{side}") for side in ("height", "width"))
    return float(height), float(width)


@operation
def upsample_nearest_neighbor(a: Arguments) -> Tensor:
    height, width = _scales(a)
    if height != int(height) or width != int(width):  # which neighbour is nearest is not documented
        raise Unsupported(f"parameter scale_factor_height = {height:g}, width = {width:g}")
    x = a.tensor("x").repeat_interleave(int(height), -2)
    return x.repeat_interleave(int(width), -1)


@operation
def upsample_bilinear(a: Arguments) -> Tensor:
    x, scales = a.tensor("x"), _scales(a)
    corners = a.flag("align_corners", True)
    if a.flag("half_pixel_centers", not corners) == corners:
        raise Unsupported(
            f"parameter align_corners = {corners} with half_pixel_centers = {corners}"
        )
    size = [int(scale * old) for scale, old in zip(scales, x.shape[-2:], strict=True)]
    return F.interpolate(x, size, mode="bilinear", align_corners=corners)


@operation
def resize_bilinear(a: Arguments) -> Tensor:
    mode = a.choice("sampling_mode", "DEFAULT", "STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS")
    if mode == "DEFAULT":
        raise Unsupported("parameter sampling_mode = 'DEFAULT'")
    size = [a.integer("target_size_height", 1), a.integer("target_size_width", 1)]
    corners = mode == "STRICT_ALIGN_CORNERS"
    return F.interpolate(a.tensor("x"), size, mode="bilinear", align_corners=corners)


# Shapes and reductions


@operation
def reduce_mean(a: Arguments) -> Tensor:
    return a.tensor("x").mean(a.integers("axes"), keepdim=a.flag("keep_dims", False))


@operation
def split(a: Arguments) -> tuple[Tensor, ...]:
    x, axis = a.tensor("x"), a.integer("axis")
    if "split_sizes" in a.unread:
        return tuple(x.split(a.integers("split_sizes"), axis))
    count = a.integer("num_splits")
    if x.shape[axis] % count:
        raise Unsupported(f"parameter num_splits = {count} of size {x.shape[axis]}")
    return tuple(x.chunk(count, axis))


@operation
def concat(a: Arguments) -> Tensor:
    if a.flag("interleave", False):
        raise Unsupported("parameter interleave = True")
    values = a.value("values")
    values = [values] if isinstance(values, Tensor) else values
    return torch.cat([v.float() if v.is_floating_point() else v for v in values], a.integer("axis"))


@operation
def reshape(a: Arguments) -> Tensor:
    x, shape = a.tensor("x"), a.integers("shape")
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


@operation
def slice_by_index(a: Arguments) -> Tensor:
    x = a.tensor("x")
    rank = x.dim()
    begin, end = a.integers("begin"), a.integers("end")
    if a.integers("stride", [1] * rank) != [1] * rank:
        raise Unsupported(f"parameter stride = {a.integers('stride')}")
    if any(a.integers("squeeze_mask", [0] * rank)):
        raise Unsupported("parameter squeeze_mask")
    from_start = a.integers("begin_mask", [0] * rank)
    to_end = a.integers("end_mask", [0] * rank)
    return x[
        tuple(
            slice(None if from_start[i] else begin[i], None if to_end[i] else end[i])
            for i in range(rank)
        )
    ]


@operation
def expand_dims(a: Arguments) -> Tensor:
    x = a.tensor("x")
    rank = x.dim() + len(a.integers("axes"))
    for axis in sorted(axis % rank for axis in a.integers("axes")):
        x = x.unsqueeze(axis)
    return x


@operation
def squeeze(a: Arguments) -> Tensor:
    return a.tensor("x").squeeze(tuple(a.integers("axes")))


@operation
def transpose(a: Arguments) -> Tensor:
    return a.tensor("x").permute(a.integers("perm"))


# Quantised activations


@operation
def quantize(a: Arguments) -> Tensor:
    x = a.tensor("input")
    scale, zero = _along_axis(a, x)
    dtype = TORCH_DTYPES[a.choice("output_dtype", "int8", "uint8").upper()]
    limits = torch.iinfo(dtype)
    return (torch.round(x / scale) + zero).clamp(limits.min, limits.max).to(dtype)


@operation
def dequantize(a: Arguments) -> Tensor:
    x = a.tensor("input")
    scale, zero = _along_axis(a, x)
    return (x.float() - zero) * scale


def _along_axis(a: Arguments, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, scalars or vectors along ``axis``, in the shape of ``x``'s dimensions."""
    scale, zero = a.tensor("scale"), a.optional("zero_point")
    zero = torch.zeros(()) if zero is None else zero.float()
    if scale.dim() == 0 and zero.dim() == 0:
        a.unread.discard("axis")  # without effect
        return scale, zero
    shape = [1] * x.dim()
    shape[a.integer("axis")] = -1
    return scale.reshape(shape), zero.reshape(shape)


# Compressed constants


@operation
def constexpr_affine_dequantize(a: Arguments) -> Tensor:
    data = a.tensor("quantized_data")
    scale, zero = _along_axis(a, data)
    return (data.float() - zero) * scale


@operation
def constexpr_blockwise_shift_scale(a: Arguments) -> Tensor:
    data, scale, offset = a.tensor("data").float(), a.tensor("scale"), a.optional("offset")
    if offset is not None:
        data = data - _repeated(offset.float(), data.shape)
    return data * _repeated(scale, data.shape)


@operation
def constexpr_lut_to_dense(a: Arguments) -> Tensor:
    """Of iOS 16: one table and packed indices. Of iOS 18: a table for each block of ``indices``."""
    table, indices = a.tensor("lut"), a.tensor("indices")
    if table.dim() == 1:
        shape = a.integers("shape")
        count = int(torch.tensor(shape).prod())
        bits = (len(table) - 1).bit_length()
        return table[bit_fields(indices, bits, count)].reshape(shape)
    if table.shape[-1] != 1:
        raise Unsupported(f"parameter lut with vectors of {table.shape[-1]} values")
    a.unread.discard("vector_axis")  # without effect on single values
    palettes = table.shape[-2]
    tables = _repeated(table[..., 0], (*indices.shape, palettes))
    return tables.gather(-1, indices.long().unsqueeze(-1)).squeeze(-1)


@operation
def constexpr_cast(a: Arguments) -> Tensor:
    a.choice("output_dtype", "fp32")
    return a.tensor("source_val")


def _repeated(blocks: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Each number repeated over its block of a tensor of ``shape``."""
    for axis, size in enumerate(shape):
        if blocks.shape[axis] != size:
            blocks = blocks.repeat_interleave(size // blocks.shape[axis], axis)
    return blocks


# Classifiers


@operation
def classify(a: Arguments) -> tuple[Value, dict[Value, float]]:
    """The label with the largest probability, and all labels with theirs; one image."""
    probabilities = a.tensor("probabilities").reshape(-1)
    labels = a.value("classes")
    labels = labels.tolist() if isinstance(labels, Tensor) else labels
    if len(labels) != len(probabilities):
        raise Unsupported(f"{len(labels)} classes for {len(probabilities)} probabilities")
    ranked = dict(zip(labels, probabilities.tolist(), strict=True))
    return labels[int(probabilities.argmax())], ranked
