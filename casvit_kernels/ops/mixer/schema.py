"""The operators of `torch.ops.casvit_kernels` for the mixer: definitions, fake kernels, autocast.

The CPU kernels register themselves from `csrc/` when the native library loads; `mix_training` and
`mix_backward` are implemented in `autograd.py`, once for all backends, `triton_infer` in `triton/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import native
from .weights import COUNT, SCHEMA, MixerWeights, flatten

_WEIGHTS = f"{SCHEMA}, float eps_q, float eps_k"

library = torch.library.Library("casvit_kernels", "DEF")
# packed: what pack() made of the same weights; None makes it anew in this call.
# dtype: that of the output and of the qkv product's operands, by default x's (autocast sets it).
library.define(
    f"project_and_mix(Tensor x, {_WEIGHTS}, Tensor? packed=None, ScalarType? dtype=None) -> Tensor"
)
library.define(f"pack({_WEIGHTS}, ScalarType dtype) -> Tensor")
# batch: whether the gate's BatchNorm uses batch statistics. group: the name of the process group
# that these are reduced over, "" for none. number: of the values behind each of them.
_TRAINING = f"{_WEIGHTS}, bool batch_q, bool batch_k, ScalarType? dtype, str backend, str group"
library.define(
    f"mix_training(Tensor x, {_TRAINING}) -> (Tensor out, "
    "Tensor statistics, Tensor number, Tensor spatial, Tensor pooled, Tensor channel)"
)
# needed: of x and each weight. Returns the gradients of those alone, in that order.
library.define(
    f"mix_backward(Tensor grad, Tensor x, {_TRAINING}, Tensor statistics, Tensor number, "
    "Tensor spatial, Tensor pooled, Tensor channel, bool[] needed) -> Tensor[]"
)
# project_and_mix without gradients, of weights that have not moved since cpu_remember noted in `packed`
# where they are (their memory is read again): so many arguments take the dispatcher longer than the rest
# of the call. These and the phases on the CPU are reached by way of cpu.py alone.
library.define(f"cpu_remember(Tensor(a!) packed, {_WEIGHTS}) -> ()")
library.define("cpu_infer(Tensor x, Tensor packed) -> Tensor")
# The phases. qkv, grad_sum and grad_qkv are in layouts of their own; shape is (B, C, H, W).
for _phase in (
    "cpu_project(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, ScalarType dtype, Tensor(a!) qkv)"
    " -> ()",
    f"cpu_statistics(Tensor qkv, int[] shape, {_WEIGHTS}) -> Tensor",
    f"cpu_mix(Tensor x, Tensor qkv, {_WEIGHTS}, Tensor statistics, ScalarType dtype)"
    " -> (Tensor out, Tensor spatial, Tensor pooled, Tensor channel)",
    f"cpu_backward_combine(Tensor grad, Tensor qkv, {_WEIGHTS}, Tensor spatial, Tensor channel,"
    " Tensor(a!) grad_qkv, Tensor(b!) grad_sum) -> (Tensor pixel, Tensor channel_sum,"
    " Tensor dwc_weight, Tensor dwc_bias, Tensor proj_weight, Tensor proj_bias)",
    f"cpu_backward_gate(Tensor qkv, int[] shape, {_WEIGHTS}, Tensor statistics, Tensor spatial,"
    " Tensor pixel, Tensor shift) -> (Tensor logit, Tensor spatial_weight, Tensor sums)",
    f"cpu_backward_depthwise(Tensor qkv, int[] shape, {_WEIGHTS}, Tensor statistics,"
    " Tensor spatial, Tensor channel, Tensor shift, Tensor logit, Tensor coefficients,"
    " Tensor grad_sum, Tensor(a!) grad_qkv) -> (Tensor depthwise_weight, Tensor depthwise_bias)",
    # The phases together. needed: bit i stands for x and the weights, in order; the gradients of
    # those are returned.
    f"cpu_forward(Tensor x, {_WEIGHTS}, bool batch_q, bool batch_k, ScalarType dtype,"
    " Tensor(a!) qkv)"
    " -> (Tensor out, Tensor statistics, Tensor spatial, Tensor pooled, Tensor channel)",
    f"cpu_backward(Tensor grad, Tensor x, {_WEIGHTS}, bool batch_q, bool batch_k, ScalarType dtype,"
    " Tensor statistics, Tensor spatial, Tensor pooled, Tensor channel, int needed,"
    " Tensor(a!) qkv, Tensor(b!) grad_qkv, Tensor(c!) grad_sum) -> Tensor[]",
    "cpu_project_backward(Tensor grad_qkv, Tensor x, Tensor qkv_weight, ScalarType dtype,"
    " bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
):
    library.define(_phase)
# On CUDA: qkv has channels innermost, each of q, k and v filled up with zeros to a multiple of 4.
# packed: what cuda_pack made, with statistics folded in, or without any for cuda_statistics. Reached by
# way of cuda.py alone.
for _operator in (
    f"cuda_pack({_WEIGHTS}, Tensor? statistics, ScalarType dtype) -> Tensor",
    "cuda_statistics(Tensor qkv, Tensor packed, int[] shape) -> Tensor",
    "cuda_mix(Tensor qkv, Tensor packed, int[] shape, bool channels_last)"
    " -> (Tensor out, Tensor spatial, Tensor pooled, Tensor channel)",
    "cuda_infer(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor packed) -> Tensor",
    # The backward. like: a tensor on the device.
    "cuda_backward_fits(Tensor like, int[] shape) -> bool",
    f"cuda_pack_backward({_WEIGHTS}, Tensor? statistics, ScalarType dtype) -> Tensor",
    "cuda_backward_combine(Tensor qkv, Tensor packed, Tensor spatial, Tensor channel, Tensor grad,"
    " int[] shape) -> (Tensor grad_qkv, Tensor grad_sum, Tensor pixel, Tensor channel_sums,"
    " Tensor weights)",
    "cuda_backward_gate(Tensor qkv, Tensor packed, Tensor spatial, Tensor pixel, Tensor shift,"
    " int[] shape) -> (Tensor logit, Tensor sums)",
    "cuda_backward_depthwise(Tensor qkv, Tensor packed, Tensor spatial, Tensor logit, Tensor channel,"
    " Tensor shift, Tensor coefficients, Tensor grad_sum, Tensor(a!) grad_qkv, int[] shape)"
    " -> Tensor weights",
):
    library.define(_operator)
# Triton's inference as a compiler sees it. The packed weights come as tensors, packed in the graph: that
# is the compiler's to fuse, and to fold where it is told that weights are constants. A graph that kept
# packed weights could not tell when they are stale.
library.define(
    "triton_infer(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor vectors, Tensor statistics,"
    " float eps_q, float eps_k, ScalarType dtype) -> Tensor"
)
native.load()


class Settings(NamedTuple):
    """What `mix_training` and `mix_backward` take beside tensors."""

    eps_q: float
    eps_k: float
    batch_q: bool  # whether the q gate's BatchNorm uses batch statistics
    batch_k: bool
    dtype: torch.dtype | None  # of out and of the qkv product's operands; None: that of x
    backend: str
    group: str  # name of the process group that reduces the statistics, "" for none


class Saved(NamedTuple):
    """What the backward needs beside x and the weights."""

    statistics: Tensor  # (2, 2, C) float32: of q and k, the mean and biased variance that were used
    number: Tensor  # () float64: how many values of each channel batch statistics are taken over
    spatial: Tensor  # (B, 2, H, W) float32, gates
    pooled: Tensor  # (2, B, C) float32
    channel: Tensor  # (2, B, C) float32, gates


def project_and_mix(
    x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: Tensor | None = None
) -> Tensor:
    """The whole mixer from x to out with running statistics; differentiable."""
    out: Tensor = torch.ops.casvit_kernels.project_and_mix(x, *flatten(w), *eps, packed)
    return out


def pack(w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """The weights, BatchNorm folded, in the layout the CPU kernel reads; opaque bytes."""
    out: Tensor = torch.ops.casvit_kernels.pack(*flatten(w), *eps, dtype)
    return out


def output_memory_format(x: Tensor) -> torch.memory_format:
    """Channels last when channels are innermost in memory, else contiguous: the input's layout."""
    if not x.is_contiguous() and x.stride(1) == 1:
        return torch.channels_last
    return torch.contiguous_format


def empty_output(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Memory for the mixer's output (or for a gradient at x), in the layout of x."""
    return torch.empty(
        x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=output_memory_format(x)
    )


def empty_gradients(x: Tensor, weights: Sequence[Any], needed: Sequence[bool]) -> list[Tensor]:
    """Memory for what `mix_backward` returns. needed: of x and each of the flat weights.

    A weight's gradient has its strides, of dimensions of size 1 too: DistributedDataParallel compares.
    """
    of_x, *of_weights = needed
    return ([empty_output(x, None)] if of_x else []) + [
        torch.empty_like(t) for t, n in zip(weights, of_weights, strict=True) if n
    ]


# Fake kernels: shapes, dtypes and layouts for torch.compile.


@torch.library.register_fake("casvit_kernels::project_and_mix", lib=library)
def _project_and_mix_fake(
    x: Tensor, *rest: Any, packed: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    if len(rest) == COUNT + 4:  # passed by position
        dtype = rest[-1]
    return empty_output(x, dtype)


@torch.library.register_fake("casvit_kernels::pack", lib=library)
def _pack_fake(qkv_weight: Tensor, *rest: object) -> Tensor:
    # The size depends on the instruction set; nobody computes with it.
    size = torch.library.get_ctx().new_dynamic_size()
    return qkv_weight.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("casvit_kernels::mix_training", lib=library)
def _mix_training_fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    b, c, h, w = x.shape

    def small(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    return (
        empty_output(x, Settings(*rest[COUNT:]).dtype),
        small(2, 2, c),
        small(dtype=torch.float64),
        small(b, 2, h, w),
        small(2, b, c),
        small(2, b, c),
    )


@torch.library.register_fake("casvit_kernels::mix_backward", lib=library)
def _mix_backward_fake(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return empty_gradients(x, rest[:COUNT], rest[-1])


@torch.library.register_fake("casvit_kernels::triton_infer", lib=library)
def _triton_infer_fake(x: Tensor, *rest: Any) -> Tensor:
    return empty_output(x, rest[-1])


# Autocast: x and the weights stay as they are, the kernels read any dtype.


def _autocast(device_type: str, key: str) -> None:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def project_and_mix(x: Tensor, *rest: Any, **named: Any) -> Any:
        if x.dtype is not torch.float64:
            named.setdefault("dtype", torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.casvit_kernels.project_and_mix(x, *rest, **named)

    def mix_training(x: Tensor, *rest: Any) -> Any:
        settings = Settings(*rest[COUNT:])
        if settings.dtype is None and x.dtype is not torch.float64:
            settings = settings._replace(dtype=torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.casvit_kernels.mix_training(x, *rest[:COUNT], *settings)

    def mix_backward(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.casvit_kernels.mix_backward(*arguments)

    for kernel in (project_and_mix, mix_training, mix_backward):
        library.impl(kernel.__name__, kernel, key)


_autocast("cpu", "AutocastCPU")
_autocast("cuda", "AutocastCUDA")
