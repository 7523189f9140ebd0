"""Keeps what was read of a model, its packed weights and scratch memory, and knows when they are stale.

May import: torch, structure.py, fold.py, plan.py, kernels.py.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .fold import Normalize, Sources, flat
from .kernels import PRECISIONS, NetworkKernels
from .plan import Plan
from .structure import Watch

_MOST = 64  # sizes of scratch memory remembered
_version = operator.attrgetter("_version")
_requires_grad = operator.attrgetter("requires_grad")


class _FusedSteps:
    """Counts the steps of optimizers with ``fused=True``: their kernels count no versions."""

    def __init__(self) -> None:
        self.count = 0
        self._watching = False

    def watch(self) -> None:
        """Count from now on, if not already."""
        if not self._watching:
            self._watching = True
            register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(group.get("fused") for group in optimizer.param_groups):
            self.count += 1


_fused_steps = _FusedSteps()


class Found(NamedTuple):
    """A network that was read in a model; what `surgery/find.py` gives.

    order: for each tensor that the model returns its place among the outputs of the plan.
    bare: whether it returns a tensor; else spec says how they are handed out, by `torch.utils._pytree`.
    """

    plan: Plan
    sources: Sources
    order: tuple[int, ...]
    bare: bool
    spec: Any = None


class Memory(NamedTuple):
    """Bytes that a fused network holds beside the parameters of its model."""

    packed: int  #: weights as kernels read them
    scratch: int  #: kept between calls, one piece for each that ran at the same time


class Reading:
    """What was read of a model. One of `found` and `refusal` is None."""

    def __init__(self, watch: Watch, found: Found | None, refusal: str | None) -> None:
        self.watch, self.found, self.refusal = watch, found, refusal
        self.ints = [] if found is None else found.plan.to_ints()
        self.entry: Entry | None = None
        self.sizes: dict[
            tuple[int, int, int, int], int
        ] = {}  # of scratch memory, by (B, H, W, threads)


class Entry:
    """Packed weights, and the tensors that they were made of.

    obstacle: why kernels cannot take these weights (their dtype or device), or None.
    """

    packed: Tensor | None = None

    def __init__(self, watch: Watch, sources: Sources) -> None:
        names = sources.names()
        self._watch = watch
        self._fused_steps = _fused_steps.count
        self._copies = [dict(d) for d in watch.registered]
        self.tensors = [watch.tensor(name) for name in names]
        self.obstacle = next(
            (f"{name}: {reason}" for name in names if (reason := _obstacle(watch.tensor(name)))),
            None,
        )
        # `==` of dictionaries compares identities first, and values where they differ: of one element
        # an equal value is not enough.
        single = [name for name, t in zip(names, self.tensors, strict=True) if t.numel() == 1]
        self._single = [(*watch.place(name), watch.tensor(name)) for name in single]
        # A norm in training mode writes its statistics without counting a version; its number of
        # batches has one.
        batches = [
            (d, "num_batches_tracked", t)
            for d in watch.registered
            if (t := d.get("num_batches_tracked")) is not None
        ]
        self._single += batches
        # Inference tensors have no version counter: writes to them are not seen.
        every = [*self.tensors, *(t for _, _, t in batches)]
        self._counted = [t for t in every if not t.is_inference()]
        self._versions = list(map(_version, self._counted))
        self._addresses = [] if self.obstacle else list(map(Tensor.data_ptr, self.tensors))
        # An address may be that of another tensor by now: whose memory was given back says so here.
        self._gone: list[Any] = []
        self._storages = [
            weakref.ref(t.untyped_storage(), self._gone.append)
            for t in self.tensors
            if self.obstacle is None
        ]

    def fresh(self) -> bool:
        """Whether the model has these very tensors, and nobody has written to them."""
        try:
            if self._watch.registered != self._copies:
                return False
        except Exception:  # tensors of more than one element that are not the same
            return False
        if self.obstacle is not None:  # any other dtype or device is worth another look
            return _obstacle(self.tensors[0]) is not None
        for d, key, t in self._single:
            if d[key] is not t:
                return False
        if self._gone or self._fused_steps != _fused_steps.count:
            return False
        return (
            list(map(_version, self._counted)) == self._versions
            and list(map(Tensor.data_ptr, self.tensors)) == self._addresses
        )

    def needs_grad(self) -> bool:
        return any(map(_requires_grad, self.tensors))


def _obstacle(t: Tensor) -> str | None:
    if type(t) not in (Tensor, nn.Parameter):
        return f"is a {type(t).__name__}"
    if t.device.type != "cpu" or t.dtype != torch.float32 or t.layout != torch.strided:
        return f"is {t.dtype} on {t.device}, not torch.float32 on the CPU"
    return None


class PackedNetwork:
    """Of one model what the kernels read, made anew when modules or tensors changed.

    Args:
        find: reads a model; raises ValueError where it is no network.
        caching: classes of modules that keep results among their attributes.
    """

    def __init__(
        self,
        model: nn.Module,
        find: Callable[[nn.Module], Found],
        caching: tuple[type[nn.Module], ...],
        precision: str,
        normalize: Normalize | None,
    ) -> None:
        self._model, self._find, self._caching = model, find, caching
        self._precision = PRECISIONS.index(precision)
        self._normalize = normalize
        self._lock = threading.RLock()
        self._reading: Reading | None = None
        self._known: Found | None = None
        self._scratch: list[Tensor] = []
        _fused_steps.watch()

    def read(self) -> Reading:
        """Of the model as it is.

        Raises:
            ValueError: it is no network; `look` keeps the reason instead.
        """
        watch = Watch(self._model, self._caching)  # first: what changes meanwhile is seen later
        found = self._find(self._model)
        if self._normalize is not None:
            channels, got = found.plan.in_chans, len(self._normalize[0])
            if got != channels:
                raise ValueError(
                    f"normalize: expected {channels} means and deviations, one for each channel of the "
                    f"model, got {got}"
                )
            found = found._replace(plan=found.plan._replace(normalized=True))
        self._known = found
        reading = self._reading = Reading(watch, found, None)
        return reading

    @property
    def known(self) -> Found:
        """The network that was read last, whatever became of the model."""
        if self._known is None:
            self.look()
        if self._known is None:
            self.read()  # raises with the reason
        assert self._known is not None
        return self._known

    def look(self) -> Reading:
        """What the model is now; in C where nothing changed."""
        reading = self._reading
        if reading is None or not reading.watch.unchanged():
            with self._lock:
                reading = self._reading
                if reading is None or not reading.watch.unchanged():
                    watch = Watch(self._model, self._caching)
                    try:
                        reading = self.read()
                    except ValueError as error:
                        reading = self._reading = Reading(watch, None, str(error))
        return reading

    def entry(self, reading: Reading, kernels: NetworkKernels) -> Entry | None:
        """The packed weights of a reading, or None where its tensors are not those that were read."""
        entry = reading.entry
        if entry is not None and entry.fresh():
            return entry
        with self._lock, torch.inference_mode(False), torch.no_grad():
            entry = reading.entry
            if entry is not None and entry.fresh():
                return entry
            if not reading.watch.same_tensors():
                self._reading = None
                return None
            assert reading.found is not None
            plan, sources = reading.found.plan, reading.found.sources
            entry = Entry(reading.watch, sources)  # first: a write from now on makes it stale
            if entry.obstacle is None:
                weights = flat(sources, plan, reading.watch.tensor, self._normalize)
                weights = weights.to(torch.float32)
                entry.packed = kernels.pack(weights, reading.ints, self._precision)
            reading.entry = entry
            return entry

    def infer(
        self,
        kernels: NetworkKernels,
        x: Tensor,
        reading: Reading,
        packed: Tensor,
        threads: int,
        outs: list[Tensor],
    ) -> None:
        """Compute the outputs with scratch memory that no other call has at this time."""
        b, _, height, width = x.shape
        key = (b, height, width, threads)
        size = reading.sizes.get(key)
        if size is None:
            size = kernels.scratch(reading.ints, (b, height, width), self._precision, threads)
            kept = reading.sizes if len(reading.sizes) < _MOST else {}
            reading.sizes = {**kept, key: size}  # one assignment: safe between threads
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = None
        if scratch is None or scratch.numel() < size:
            del scratch  # first: both at a time may be too much
            with torch.inference_mode(False):
                scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
        kernels.infer(x, packed, reading.ints, self._precision, threads, scratch, outs)
        self._scratch.append(scratch)

    def forget(self) -> None:
        """Fold and pack anew in the next call."""
        reading = self._reading
        if reading is not None:
            reading.entry = None

    def memory(self) -> Memory:
        reading = self._reading
        entry = None if reading is None else reading.entry
        packed = 0 if entry is None or entry.packed is None else entry.packed.nbytes
        return Memory(packed, sum(t.nbytes for t in list(self._scratch)))
