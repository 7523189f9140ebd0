"""A CUDA graph made of a tape: what a call runs is noted, and run again on the same tensors.

Its Python runs once, and what a capture forbids is an error. Calls of the emulated CUDA kernels are
noted as operators are. What it cannot show: streams, memory pools, what a device does at one time.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from casvit_kernels.ops.mixer import autograd, cpu, cuda, packed

aten = torch.ops.aten
# They wait for a value, or for how many there are, or copy from the host's memory.
REFUSED = {
    aten._local_scalar_dense,
    aten._pin_memory,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.lift_fresh,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_}
# On CPU tensors no operator shows of these.
METHODS = ("cpu", "numpy", "tolist", "to")  # the last with "cpu" as its argument


class NotCapturable(AssertionError):
    """A call did what no capture allows."""


class Tape(TorchDispatchMode):
    """What ran within it, to be run again by `replay`."""

    current: Tape | None = None

    def __init__(self):
        super().__init__()
        self._nodes = []
        self._own = set()  # storages made within it
        self._given = {}  # the others, with what was in them

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in INDEXING and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        repeats = func is aten.repeat_interleave.Tensor
        if func.overloadpacket in REFUSED or by_mask or repeats:
            raise NotCapturable(f"{func} in a captured call")
        return self.run(func, args, kwargs or {})

    def run(self, call, args, kwargs):
        for storage in _storages((args, kwargs)):
            if storage.data_ptr() not in self._own | self._given.keys():
                self._given[storage.data_ptr()] = (storage, storage.clone())
        out = call(*args, **kwargs)
        self._nodes.append((call, args, kwargs, out))
        self._own |= {s.data_ptr() for s in _storages(out)} - self._given.keys()
        return out

    def undo(self):
        """A capture computes nothing: write back what was there."""
        for storage, before in self._given.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        for call, args, kwargs, out in self._nodes:
            # No version counter moves when a graph is replayed.
            with torch.autograd._unsafe_preserve_version_counter(_tensors((args, kwargs, out))):
                again = call(*args, **kwargs)
                for a, b in zip(_tensors(again), _tensors(out), strict=True):
                    if a.data_ptr() != b.data_ptr():
                        b.copy_(a)


def _tensors(tree):
    return tuple(t for t in tree_leaves(tree) if isinstance(t, torch.Tensor))


def _storages(tree):
    return [t.untyped_storage() for t in _tensors(tree)]


def _refusing(name):
    method = getattr(torch.Tensor, name)

    def call(self, *args, **kwargs):
        if name != "to" or "cpu" in (*args[:1], kwargs.get("device")):
            raise NotCapturable(f"Tensor.{name} in a captured call")
        return method(self, *args, **kwargs)

    return call


def capture(call):
    """Stands for `torch.cuda.graph`; what it returns replays the call."""
    tape = Tape()
    Tape.current = tape
    methods = {name: _refusing(name) for name in METHODS}
    try:
        with mock.patch.multiple(torch.Tensor, **methods), tape:
            call()
    finally:
        Tape.current = None
    tape.undo()
    return tape.replay


class Taped:
    """`cuda.Operators` whose calls a tape notes: they are none of PyTorch's."""

    def __init__(self, operators):
        self._operators = operators

    def __getattr__(self, name):
        method = getattr(self._operators, name)

        def call(*args):
            if Tape.current is None:
                return method(*args)
            with _disable_current_modes():
                return Tape.current.run(method, args, {})

        return call


@contextlib.contextmanager
def set_up(patch):
    """Within it the library takes a call of `capture` for the capture of a CUDA graph.

    patch: pytest's monkeypatch.
    """
    patch.setattr(packed, "capturing", lambda t: Tape.current is not None)
    for module in (autograd, cpu, cuda):  # a capture is no dispatch mode
        patch.setattr(module, "is_opaque", torch.compiler.is_compiling)
    before = packed._unseen_writes.is_set()
    yield
    if not before:
        packed._unseen_writes.clear()
