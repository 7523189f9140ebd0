"""`fold_for_inference`: a copy of a model with its BatchNorms multiplied into their neighbours.

Which neighbours is not read off names or classes: a probe runs through a float64 copy of the model and
every operation is recorded. A norm is folded where the recorded graph allows it, and the copy must then
compute the same as before.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..module import FusedCATM, has_own_forward, unfused
from .fuse import unfuse
from .recording import SAME, Call, Recording, same_outputs
from .stand_in import StandIn

__all__ = ["Fold", "FoldReport", "Unfolded", "fold_for_inference"]

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_PROBE = (2, 64, 64)  # images, height, width: more than one value even after five strides of 2


class Fold(NamedTuple):
    """A BatchNorm that was folded; names are paths in the model."""

    norm: str
    into: tuple[str, ...]
    forwards: bool  #: into layers behind it; else into the convolution before it


class Unfolded(NamedTuple):
    """A normalisation layer that was left as it is."""

    norm: str
    reason: str


class FoldReport(NamedTuple):
    """What `fold_for_inference` did; pairs are before and after. Printed, it says so."""

    folded: tuple[Fold, ...]
    left: tuple[Unfolded, ...]
    parameters: tuple[int, int]  #: values in parameters and running statistics
    nodes: tuple[int, int]  #: operations on tensors in one forward, mixers unfused

    def __str__(self) -> str:
        lines = [
            f"{len(self.folded)} norms folded",
            f"parameters and statistics: {_saving(*self.parameters)}",
            f"operations: {_saving(*self.nodes)}",
        ]
        if self.left:
            lines.append(f"{len(self.left)} left as they are")
            lines += [f"  {name}: {reason}" for name, reason in self.left]
        return "\n".join(lines)


def fold_for_inference(model: nn.Module, example_input: Tensor | None = None) -> nn.Module:
    """A copy of ``model`` in eval mode with every BatchNorm folded that can be.

    Into the convolution before it, where nothing else reads that convolution's output; else into the
    1x1 convolutions without padding that alone read the norm's output (``norm1`` into ``qkv``,
    ``norm2`` into ``fc1``); else into the linear layers that alone read the spatial mean of its
    output (the head's). A norm before a padded convolution cannot be folded forwards, nor one whose
    output the model returns (``norm0`` to ``norm6`` of a dense backbone): those are left and reported.

    Works for any module that takes one tensor, whatever its classes: what is folded follows from a
    recorded forward. Fused mixers stay fused, with an Identity in the place of a folded norm; `fuse` may
    be called before this function or after it.

    Args:
        model: left untouched; parameters of any floating dtype, on any device.
        example_input: a floating tensor the model takes, for models that cannot compute two images
            of 64x64 pixels with as many channels as their first Conv2d has.

    Returns:
        The copy, equal to ``model.eval()`` within rounding (weights are multiplied in float64). Its
        plain attribute ``fold_report`` is a `FoldReport`.

    Raises:
        TypeError: ``model`` is no module, ``example_input`` no floating tensor.
        ValueError: the model has no values (meta device) or cannot compute the example.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError("model: expected parameters with values, got some on the meta device")
    x = _example(model) if example_input is None else example_input
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"example_input: expected a floating tensor, got {x!r:.60}")
    x = x.detach().to("cpu", torch.float64)

    folded = copy.deepcopy(model)
    folded.eval()  # not chained: overridden in published code, it returns None
    probe = plain_copy(folded)
    probe.double()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            before = Recording(probe, x)
        except Exception as error:
            raise ValueError(
                f"example_input: the model cannot compute an input of shape {tuple(x.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        folds, left = _plan(probe, before)
        tried = _applied(copy.deepcopy(probe), folds)
        after = Recording(tried, x)
        if not same_outputs(after, before):  # something that a recording cannot see
            harmless = []
            for fold in folds:
                if same_outputs(Recording(_applied(copy.deepcopy(probe), [fold]), x), before):
                    harmless.append(fold)
                else:
                    left.append(Unfolded(fold.norm, "the model computes something else without it"))
            folds = harmless
            after = Recording(_applied(copy.deepcopy(probe), folds), x)
            if not same_outputs(after, before):
                left += [Unfolded(f.norm, "folding it with others is not exact") for f in folds]
                folds, after = [], before
        overflowing = [fold for fold in folds if not _fits(folded, fold)]
        folds = [fold for fold in folds if fold not in overflowing]
        left += [Unfolded(f.norm, "its folded weights overflow their dtype") for f in overflowing]
        if overflowing:
            after = Recording(_applied(copy.deepcopy(probe), folds), x)
        parameters = _values(folded)
        _applied(folded, folds)
    report = FoldReport(
        tuple(folds), tuple(left), (parameters, _values(folded)), (before.nodes, after.nodes)
    )
    vars(folded)["fold_report"] = report
    return folded


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose mixers are the unfused ones; module names stay."""
    copied = copy.deepcopy(model)
    copied.cpu()
    for mixer in copied.modules():
        if isinstance(mixer, FusedCATM):
            mixer.backend = "reference"  # for those of a subclass, which stay; any dtype
    if isinstance(copied, FusedCATM):
        return copied if has_own_forward(copied) else unfused(copied)
    unfuse(copied.original() if isinstance(copied, StandIn) else copied)
    return copied


def _example(model: nn.Module) -> Tensor:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError("model: expected a Conv2d, got none: pass example_input")
    images, *size = _PROBE
    generator = torch.Generator().manual_seed(0)
    return torch.randn((images, first.in_channels, *size), generator=generator)


def _saving(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({before - after:,} fewer)"


def _values(model: nn.Module) -> int:
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())


# What may be folded ------------------------------------------------------------------------------


class _No(Exception):
    """Why a norm, or a way to fold it, is not possible."""


class _Layers:
    """The layers of a model by the weights that a recorded call reads."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.recording = recording
        self.names: dict[nn.Module, str] = {m: name for name, m in model.named_modules()}
        self.uses = Counter(id(t) for call in recording.calls for t in {*call.inputs})
        self.owners: dict[int, list[nn.Module]] = {}
        for m in self.names:
            for t in (*m._parameters.values(), *m._buffers.values()):
                if t is not None:
                    self.owners.setdefault(id(t), []).append(m)

    def called(self, call: Call, function: Any, kind: type[nn.Module]) -> Any:
        """The plain layer whose weights this call alone reads, or _No."""
        if call.function is not function:
            operation = getattr(call.function, "__name__", call.function)
            raise _No(f"its neighbour is the operation {operation}, no {kind.__name__}")
        weight = call.inputs[1]
        owners = self.owners.get(id(weight), [])
        layer = owners[0] if len(owners) == 1 else None
        if type(layer) is not kind or layer._parameters.get("weight") is not weight:
            raise _No(f"the weight of a {kind.__name__} is computed or shared")
        name = self.names[layer]
        if self.uses[id(weight)] != 1:
            raise _No(f"{name} is called more than once")
        bias = layer._parameters["bias"]
        if bias is not None and (len(self.owners[id(bias)]) != 1 or self.uses[id(bias)] != 1):
            raise _No(f"the bias of {name} is shared")
        if _watched(layer):
            raise _No(f"the layer {name} has hooks")
        return layer


def _plan(model: nn.Module, recording: Recording) -> tuple[list[Fold], list[Unfolded]]:
    layers = _Layers(model, recording)
    folds: list[Fold] = []
    left: list[Unfolded] = []
    for name, norm in model.named_modules():
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        try:
            forwards, into = _neighbours(norm, layers)
        except _No as reason:
            left.append(Unfolded(name, str(reason)))
            continue
        folds.append(Fold(name, tuple(layers.names[layer] for layer in into), forwards))
    return folds, left


def _neighbours(norm: nn.Module, layers: _Layers) -> tuple[bool, list[nn.Module]]:
    """Whether they come behind the norm, and the layers that can take it."""
    if type(norm) not in _NORMS:
        raise _No(f"expected a plain BatchNorm2d, got {type(norm).__name__}")
    mean = norm._buffers["running_mean"]
    if mean is None or norm._buffers["running_var"] is None:
        raise _No("it has no running statistics")
    if _watched(norm):
        raise _No("it has hooks")
    calls = layers.recording.read_by(mean)
    if len(calls) != 1 or calls[0].function is not F.batch_norm:
        raise _No(f"it is called {len(calls)} times")
    if len(layers.owners[id(mean)]) != 1:
        raise _No("its statistics are shared")
    (call,) = calls
    reasons: dict[str, None] = {}  # in order, each once
    for way in (_before, _after, _behind_mean):
        try:
            return way is not _before, way(call, layers)
        except _No as reason:
            reasons[str(reason)] = None
    raise _No("; ".join(reasons))


def _before(call: Call, layers: _Layers) -> list[nn.Module]:
    x, recording = call.inputs[0], layers.recording
    maker = recording.makers.get(id(x))
    if maker is None:
        raise _No("nothing comes before it")
    layer = layers.called(maker, F.conv2d, nn.Conv2d)
    if len(recording.read_by(x)) != 1 or id(x) in recording.returned:
        raise _No(f"the output of {layers.names[layer]} is used elsewhere")
    return [layer]


def _after(call: Call, layers: _Layers) -> list[nn.Module]:
    found = []
    for reader in _readers(call.outputs[0], layers):
        layer = layers.called(reader, F.conv2d, nn.Conv2d)
        if reader.inputs[0] is not call.outputs[0]:
            raise _No("its output is a weight")
        if layer.kernel_size != (1, 1) or layer.padding not in ((0, 0), "valid"):
            raise _No(f"{layers.names[layer]} behind it is no 1x1 convolution without padding")
        found.append(layer)
    return found


def _behind_mean(call: Call, layers: _Layers) -> list[nn.Module]:
    out = call.outputs[0]
    mean = out.mean((2, 3))
    found = []
    unread = [out]
    while unread:
        t = unread.pop()
        for reader in _readers(t, layers):
            if reader.function is not F.linear:
                if len(reader.outputs) != 1 or reader.outputs[0] is t:
                    raise _No("its output is no input of linear layers")
                unread += reader.outputs
                continue
            layer = layers.called(reader, F.linear, nn.Linear)
            if t.shape != mean.shape or not torch.allclose(t, mean, rtol=SAME, atol=SAME):
                raise _No(f"{layers.names[layer]} does not read the spatial mean of its output")
            found.append(layer)
    return found


def _readers(t: Tensor, layers: _Layers) -> list[Call]:
    readers = layers.recording.read_by(t)
    if id(t) in layers.recording.returned:
        raise _No("its output is returned by the model")
    if not readers:
        raise _No("nothing reads its output")
    return readers


def _watched(module: nn.Module) -> bool:
    return "forward" in vars(module) or any(
        vars(module)[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks")
    )


# Folding -----------------------------------------------------------------------------------------


def _applied(model: nn.Module, folds: Iterable[Fold]) -> nn.Module:
    """``model`` itself, with these norms folded."""
    for fold in folds:
        norm = model.get_submodule(fold.norm)
        for layer, weight, bias in _products(model, fold):
            layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
            layer.bias = nn.Parameter(bias, layer.weight.requires_grad)
        put = nn.Identity().train(norm.training)
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is norm:
                    parent._modules[key] = put
    return model


def _products(model: nn.Module, fold: Fold) -> list[tuple[Any, Tensor, Tensor]]:
    """Each layer with its new weight and bias, of its dtype."""
    norm: Any = model.get_submodule(fold.norm)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    products = []
    for name in fold.into:
        layer: Any = model.get_submodule(name)
        weight = layer.weight.detach().double()
        bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.double()
        if fold.forwards:
            groups = getattr(layer, "groups", 1)
            each = [t.view(groups, 1, -1) for t in (scale, shift)]  # of a group's input channels
            rows = weight.view(groups, weight.shape[0] // groups, -1)
            bias = bias + (rows * each[1]).sum(2).flatten()
            weight = (rows * each[0]).view_as(weight)
        else:
            weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
            bias = bias * scale + shift
        dtype = layer.weight.dtype
        products.append((layer, weight.to(dtype), bias.to(dtype)))
    return products


def _fits(model: nn.Module, fold: Fold) -> bool:
    return all(
        bool(t.isfinite().all()) or not bool(layer.weight.isfinite().all())
        for layer, *made in _products(model, fold)
        for t in made
    )
