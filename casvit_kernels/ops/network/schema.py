"""The operators of a whole network: definitions, and the one that a compiler sees.

The CPU's kernels register themselves from `csrc/` when the native library loads.
"""

from __future__ import annotations

import secrets
from typing import Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from ...backends import native
from ..mixer.schema import output_memory_format
from .plan import Plan

library = torch.library.Library("casvit_kernels", "FRAGMENT")
# weights: float32, in the order of fold.flat. plan: Plan.to_ints(). precision: 0 float32, 1 bfloat16.
library.define("network_pack(Tensor weights, int[] plan, int precision) -> Tensor")
library.define(
    "network_infer(Tensor x, Tensor packed, int[] plan, int precision, int threads,"
    " Tensor(a!) scratch, Tensor(b!)[] outs) -> ()"
)
# A call of the network of a handle, for compilers; all that a call asks is asked inside.
library.define("network(Tensor x, int handle) -> Tensor[]")
native.load()


class Live(Protocol):
    """A network that can be called by its handle."""

    def compute(self, x: Tensor) -> list[Tensor]:
        """The outputs in the order of the plan, without gradient."""
        ...

    def current_plan(self) -> Plan:
        """What it is now."""
        ...


_live: WeakValueDictionary[int, Live] = WeakValueDictionary()
# What compilers were told last of a network's outputs.
_compiled: WeakKeyDictionary[Live, list[tuple[int, int]]] = WeakKeyDictionary()


def enter(network: Live) -> int:
    """A handle for a network, as long as it lives.

    At random: compiled code, which holds the number, may be kept on disk and be found again by a process
    whose network is another one.
    """
    handle = secrets.randbits(62)
    _live[handle] = network
    return handle


def _find(handle: int) -> Live:
    network = _live.get(handle)
    if network is None:
        raise RuntimeError(
            "the fused network of this compiled function was deleted: keep a reference to it, or call "
            "torch.compiler.reset() and compile the function again with another one"
        )
    return network


def outputs_like(x: Tensor, plan: Plan) -> list[Tensor]:
    """Empty float32 outputs; maps in the memory format of x, as PyTorch's convolutions give them."""
    b, _, height, width = x.shape
    layout = output_memory_format(x)
    outs = []
    for shape in plan.output_shapes(b, height, width):
        of = layout if len(shape) == 4 else torch.contiguous_format
        outs.append(torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=of))
    return outs


def _run(x: Tensor, handle: int) -> list[Tensor]:
    network = _find(handle)
    outs = network.compute(x)
    expected = _compiled.get(network)
    if expected is not None and _signature(outs) != expected:
        raise RuntimeError(
            f"a fused network returns other outputs than when this function was compiled, "
            f"{[tuple(t.shape) for t in outs]}: call torch.compiler.reset() and compile it again"
        )
    layout = output_memory_format(x)
    return [t.contiguous(memory_format=layout) if t.dim() == 4 else t.contiguous() for t in outs]


def _fake(x: Tensor, handle: int) -> list[Tensor]:
    network = _find(handle)
    outs = outputs_like(x, network.current_plan())
    _compiled[network] = _signature(outs)
    return outs


def _signature(outs: list[Tensor]) -> list[tuple[int, int]]:
    """What of the outputs depends on the network, not on the input."""
    return [(t.dim(), int(t.shape[1])) for t in outs]


library.impl("network", _run, "CompositeExplicitAutograd")
torch.library.register_fake("casvit_kernels::network", _fake, lib=library)
