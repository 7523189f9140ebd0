"""Who follows a call beside its caller: exporters, compilers, transforms, forward-mode AD, CUDA graphs.

May import: torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def exporting() -> bool:
    """Whether a tracer that writes a portable graph is running: exports get the plain formulas.

    The exporters to ONNX trace by one of these two; asking for them as well costs a microsecond a call.
    """
    return bool(
        torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch.compiler.is_exporting()
    )


def transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def formulas_only(x: Tensor, weight: Tensor) -> bool:
    """Whether something follows each operation that cannot look into a fused one.

    Beside `exporting`: `torch.func` transforms, forward-mode AD, tensors without values, the FLOP
    counter. A compiler is not among them: it takes the operator as a whole.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        transformed()
        or x.is_meta
        or isinstance(x, FakeTensor)
        or isinstance(weight, FakeTensor)
        or counting_flops()
    )


def counting_flops() -> bool:
    """Whether a `torch.utils.flop_counter.FlopCounterMode` is active.

    Formulas for our operators would have to be registered before it is made, and importing the registry
    takes 0.3 s: so it sees the operations of plain PyTorch, which it counts as everybody expects.
    """
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        type(mode).__module__ == "torch.utils.flop_counter"
        for mode in _get_current_dispatch_mode_stack()
    )


def capturing(t: Tensor) -> bool:
    """Whether a CUDA graph is being captured of what runs on the device of `t`."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def is_opaque() -> bool:
    """Whether a compiler or a dispatch mode records operators, so that one must be called.

    Otherwise a kernel is called directly: the dispatcher of an operator in Python costs 0.3 ms a step.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
