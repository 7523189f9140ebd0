"""Keeps a mixer's packed weights between calls, knows when they are stale, and finds the fast path.

The fast path is the most frequent call: all of it is the CPU's operator, with weights packed earlier.
"""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...backends import first_choice
from ..tracing import capturing, transformed
from .kernels import MixerKernels
from .norms import eps_of
from .structure import Structure
from .weights import MixerWeights, autocasts, check_alike, flatten

_Key = tuple[str, tuple[float, float], torch.dtype, int]  # backend, eps, dtype, CUDA stream

_MOST = 3  # kept at a time: float32, and what autocast makes of it, bfloat16 and float16
# Set once a CUDA graph holds a training step of any mixer: its replays write weights, those of an
# average kept in the graph among them, and no version counter moves.
_unseen_writes = threading.Event()

_STALE_OFFSET = 48  # bytes; the kernel sets this int64 of the packed header, see csrc/cpu/pack.h


class PackedWeights:
    """One mixer's packed weights for each dtype it computes in, made anew when their sources changed.

    A write through autograd's eyes shows in the version counter, a move or replacement in the object
    or its address. A write through `.data` shows in neither: the kernel then finds that a fingerprint
    differs, packs for that call alone, and sets the stale flag read here (that of the CPU does so). Once
    a CUDA graph holds a training step, the other backends pack in each call.
    """

    def __init__(self) -> None:
        self._entries: dict[_Key, Entry] = {}

    def get(
        self, kernels: MixerKernels, w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype
    ) -> Any:
        """The packed weights for one call, or None where the backend shall work without.

        Raises:
            TypeError, ValueError: the weights differ in dtype or device, see `weights.check_alike`.
        """
        if torch.compiler.is_compiling() or kernels.name == "reference":
            check_alike(w)
            return None
        captured = capturing(w.qkv_weight)
        if captured and torch.is_grad_enabled():
            _unseen_writes.set()  # training with frozen norms
        # A graph reads the weights as they are when it is replayed.
        if captured or (_unseen_writes.is_set() and kernels.name != "cpu"):
            check_alike(w)
            return None
        stream = 0
        if w.qkv_weight.is_cuda:
            # What one stream packs, another might read too early, or free too early.
            stream = torch.cuda.current_stream(w.qkv_weight.device).cuda_stream
        sources = flatten(w)
        key = (kernels.name, eps, dtype, stream)
        entry = self._entries.get(key)
        if entry is not None and entry.is_current(sources) and (entry.alike or autocasts(w)):
            return entry.packed
        alike = check_alike(w)
        if any(t is not None and t.grad_fn is not None for t in sources):
            return None  # computed for this call: to keep them would keep their graph
        entry = Entry(sources, alike)  # first: what is written meanwhile makes it out of date
        with torch.no_grad():
            packed = kernels.pack(w, eps, dtype)
        if packed is not None:
            entry.keep(packed)
            others = {k: e for k, e in self._entries.items() if k != key and e.is_current(sources)}
            kept = list(others.items())[1 - _MOST :]
            # One assignment: safe between threads.
            self._entries = {**dict(kept), key: entry}
        return packed

    def at_hand(
        self, structure: Structure, eps: tuple[float, float], dtype: torch.dtype
    ) -> Entry | None:
        """The entry that `get` would return for the CPU backend outside autocast, or None."""
        entry = self._entries.get(("cpu", eps, dtype, 0))
        if entry is not None and entry.alike and entry.holds(structure):
            return entry
        return None


def watch_capture(x: Tensor) -> None:
    """Note whether a CUDA graph captures this training step of a mixer."""
    if capturing(x):
        _unseen_writes.set()


class Entry:
    """Packed weights; the weights that they were made of live as long."""

    packed: Any
    _registered: list[dict[str, Tensor | None]] | None = None  # as they were, see `holds`

    def __init__(self, sources: tuple[Tensor | None, ...], alike: bool) -> None:
        self.alike = alike  # False: such weights are fine under autocast only
        self._sources = sources
        self._present = [t for t in sources if t is not None]
        # Inference tensors have no version counter; the fingerprint watches over those.
        self._counted = [t for t in self._present if not t.is_inference()]
        self._matrices = [t for t in self._present if t.dim() > 1 and t.shape[1] > 1]
        self._state = self._current_state()

    def keep(self, packed: Any) -> None:
        self.packed = packed
        self._stale = (
            ctypes.c_int64.from_address(packed.data_ptr() + _STALE_OFFSET)
            if isinstance(packed, Tensor)
            else ctypes.c_int64(0)
        )

    def is_current(self, sources: Iterable[Tensor | None]) -> bool:
        """Whether these are the tensors that were packed, and nobody has written to them."""
        return all(map(operator.is_, sources, self._sources)) and self._is_fresh()

    def holds(self, structure: Structure) -> bool:
        """As `is_current`, of the tensors registered in a mixer's modules."""
        registered = structure.registered()
        try:
            # Compares identities, in C. Where a tensor was exchanged, `==` compares values: of one
            # element an equal value is as good as the same tensor; of more it raises.
            same = registered == self._registered
        except Exception:
            same = False
        if not same:
            if not structure.same_biases():
                return False
            if not all(map(operator.is_, flatten(structure.weights()), self._sources)):
                return False
            # What is not registered, or computed, may be exchanged unseen.
            seen = [*map(id, structure.neutral()), *(id(t) for d in registered for t in d.values())]
            if not set(map(id, self._present)) <= set(seen):
                return False
            self._registered = [dict(d) for d in registered]
        return self._is_fresh()

    def _is_fresh(self) -> bool:
        return not self._stale.value and self._current_state() == self._state

    def _current_state(self) -> list[Any]:
        # In C throughout: every call of the mixer runs this over some twenty tensors.
        return [
            *map(_version, self._counted),
            *map(Tensor.data_ptr, self._present),
            *map(Tensor.stride, self._matrices),
        ]


_version = operator.attrgetter("_version")


def fast_path(
    x: Any,
    backend: str | None,
    structure: Structure,
    packed: PackedWeights,
) -> Entry | None:
    """The packed weights with which `cpu.infer` is the whole call, else None.

    `FusedCATM.forward` asks the same questions one by one for calls of every kind, which takes as long
    as the smallest of these take to compute. Here they are asked at once, in C where possible, each
    anew in each call, and nothing is refused: where an answer is not the plain one, the call goes on.

    The caller keeps the entry alive until the kernel returns: the kernel reads the weights themselves,
    too, and another thread may replace them meanwhile.

    Args:
        x, backend: as for `casvit_kernels.catm`; not checked yet.
        structure: of the mixer, unchanged and without hooks.
        packed: what the mixer has packed.
    """
    if (
        torch.is_grad_enabled()
        # Modes that record or change operations; before x is looked at, so that they do not see it.
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or transformed()
        or not (type(x) is Tensor and x.is_cpu and x.dim() == 4 and x.numel())
        or first_choice(backend) != "cpu"
    ):
        return None
    norm_q, norm_k = structure.norms
    if norm_q.training or norm_k.training or structure.dropout.training:
        return None
    entry = packed.at_hand(structure, (eps_of(norm_q), eps_of(norm_k)), x.dtype)
    if entry is None:
        return None
    weight, channels = structure.owners[0]._parameters["weight"], x.shape[1]
    fits = weight.dtype is x.dtype and weight.shape == (3 * channels, channels, 1, 1)
    return entry if fits else None
