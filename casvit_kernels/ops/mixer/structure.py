"""The modules of one mixer by role, and whether they are still what the kernels compute.

`examine` reads a mixer's children; a `Structure` remembers what it read and notices cheaply, in each
call, when a child was exchanged, wrapped, reconfigured or hooked. A compiler follows `examine` itself.
May import: torch, weights.py, reference.py.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .norms import NORMS, is_frozen
from .reference import ChannelOperation, SpatialOperation
from .weights import BUFFERS, COUNT, ENTRIES, MixerWeights, unflatten


class Roles(NamedTuple):
    """The names of a mixer's children; those of the published mixer unless `fuse` found others."""

    qkv: str = "qkv"
    q: str = "oper_q"
    k: str = "oper_k"
    dwc: str = "dwc"
    proj: str = "proj"
    drop: str = "proj_drop"


NORM = 1  # index of the norm among a gate's owners
_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode")
_settings = operator.itemgetter(*_SETTINGS)
_output_size = operator.itemgetter("output_size")
_children = operator.itemgetter("_modules")
_parameters = operator.attrgetter("_parameters")
_buffers = operator.attrgetter("_buffers")
_forward_hooks = operator.itemgetter("_forward_hooks")
_forward_pre_hooks = operator.itemgetter("_forward_pre_hooks")
_backward_hooks = operator.itemgetter("_backward_hooks")
_backward_pre_hooks = operator.itemgetter("_backward_pre_hooks")


# The containers in the published gates.
PUBLISHED_INNER: dict[str, type[nn.Module]] = {
    f"{gate}{path}": kind
    for gate in ("oper_q", "oper_k")
    for path, kind in (
        ("", nn.Sequential),
        (".0", SpatialOperation),
        (".0.block", nn.Sequential),
        (".1", ChannelOperation),
        (".1.block", nn.Sequential),
    )
}


class Structure:
    """What `examine` found in one mixer.

    difference: the child that kernels cannot compute and why, or None.
    owners: the modules that own weights, in the order of `weights.OWNERS`; empty with a difference.
    dropout: the last child.
    norms: those of the q gate and of the k gate: a BatchNorm, a frozen one (whose weights are buffers),
        or an Identity, where it was folded into the convolution before it.
    """

    def __init__(self, mixer: nn.Module, roles: Roles, inner: dict[str, type[nn.Module]]) -> None:
        self.difference, self.owners, self.dropout = examine(mixer, roles, inner)
        self.norms = norms_of(self.owners)
        self._neutral: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
        modules = list(mixer.modules())
        inside = [vars(m) for m in modules[1:]]
        self._root = mixer._modules
        # Below, what each call compares: attributes of modules, read from their dictionaries in C.
        self._inside = inside
        self._lengths = list(map(len, inside))  # a method replaced on the instance adds one
        self._containers = [vars(m) for m in modules if m._modules]
        self._contents = [dict(c) for c in map(_children, self._containers)]
        self._convolutions = [vars(m) for m in modules if isinstance(m, nn.Conv2d)]
        self._set = list(map(_settings, self._convolutions))
        self._types = list(map(type, modules[1:]))
        self._modules = modules[1:]
        self._pools = [vars(m) for m in modules if isinstance(m, nn.AdaptiveAvgPool2d)]
        self._sizes = list(map(_output_size, self._pools))
        self._biases = self._has_bias()

    def unchanged(self, mixer: nn.Module) -> bool:
        """Whether children, their types and settings are those that were examined."""
        return (
            mixer._modules is self._root
            and list(map(_children, self._containers)) == self._contents
            and list(map(len, self._inside)) == self._lengths
            and list(map(_settings, self._convolutions)) == self._set
            and list(map(type, self._modules)) == self._types
            and list(map(_output_size, self._pools)) == self._sizes
        )

    def same_biases(self) -> bool:
        """Whether the owners have those biases that they had.

        Asked where weights are gathered; the fast path sees it by the registered tensors.
        """
        return self._has_bias() == self._biases

    def _has_bias(self) -> list[bool]:
        return [get(m, "bias") is not None for m in self.owners if isinstance(m, nn.Conv2d)]

    def hooked(self) -> bool:
        """Whether somebody waits for the call of a child, or of every module there is."""
        inside = self._inside
        if any(map(_forward_hooks, inside)) or any(map(_forward_pre_hooks, inside)):
            return True
        if torch.is_grad_enabled() and (
            any(map(_backward_hooks, inside)) or any(map(_backward_pre_hooks, inside))
        ):
            return True
        return watched_globally()

    def hooked_child(self) -> str:
        """The first child with hooks, by its path; "" where only global hooks are there."""
        for name, d in zip(self._names(), self._inside, strict=True):
            if (
                _forward_hooks(d)
                or _forward_pre_hooks(d)
                or _backward_hooks(d)
                or _backward_pre_hooks(d)
            ):
                return name
        return ""

    def _names(self) -> list[str]:
        root = nn.Module()
        root._modules = self._root
        return [name for name, _ in root.named_modules()][1:]

    def weights(self) -> MixerWeights:
        """The tensors as they are now."""
        return weights_of(self.owners, self._of_identity)

    def registered(self) -> list[dict[str, Tensor | None]]:
        """The dictionaries in which the owners keep their tensors."""
        return [*map(_parameters, self.owners), *map(_buffers, self.norms)]

    def neutral(self) -> list[Tensor]:
        """The statistics that stand for an Identity so far."""
        return [t for pair in self._neutral.values() for t in pair]

    def _of_identity(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (like.dtype, like.device)
        if key not in self._neutral:  # the same tensors in each call: packed weights stay valid
            with torch.inference_mode(False), torch.no_grad():
                self._neutral[key] = _neutral(like)
        return self._neutral[key]


def examine(
    mixer: nn.Module, roles: Roles, inner: dict[str, type[nn.Module]]
) -> tuple[str | None, tuple[Any, ...], Any]:
    """What kernels cannot compute of ``mixer``, the owners of its weights, and its dropout.

    Args:
        roles: the names of its children.
        inner: of each container inside a gate the class it had when the mixer was matched; another one
            may have another forward.
    """
    children = mixer._modules
    for name in roles:
        if children.get(name) is None:
            return f"{name}: expected a module, got none", (), None
    qkv: Any = children[roles.qkv]
    reason = _not_plain(roles.qkv, qkv, nn.Conv2d)
    if reason is not None:
        return reason, (), None
    dim = qkv.in_channels
    reason = _another_conv(roles.qkv, qkv, dim, 3 * dim, False)
    q_reason, q = _gate(roles.q, children[roles.q], dim, inner)
    k_reason, k = _gate(roles.k, children[roles.k], dim, inner)
    reason = reason or q_reason or k_reason
    for name in (roles.dwc, roles.proj):
        reason = reason or _not_plain(name, children[name], nn.Conv2d)
        reason = reason or _another_conv(name, children[name], dim, dim, True)
    dropout: Any = children[roles.drop]
    reason = reason or _not_plain(roles.drop, dropout, nn.Dropout, nn.Identity)
    if reason is not None:
        return reason, (), None
    return None, (qkv, *q, *k, children[roles.dwc], children[roles.proj]), dropout


def _gate(
    name: str, gate: Any, dim: int, inner: dict[str, type[nn.Module]]
) -> tuple[str | None, tuple[Any, ...]]:
    """Why this is no gate, or None and its owners of weights."""
    layers: list[tuple[str, Any]] = []
    reason = _collect(name, gate, inner, layers)
    if reason is not None:
        return reason, ()
    if len(layers) != len(GATE_LAYERS):
        got = ", ".join([type(m).__name__ for _, m in layers])
        return f"{name}: expected the layers {', '.join(GATE_LAYERS)}, got {got or 'none'}", ()
    conv, norm, relu, spatial, sigmoid, pool, channel, last = layers
    for layer, kind in ((relu, nn.ReLU), (sigmoid, nn.Sigmoid), (last, nn.Sigmoid)):
        reason = reason or _not_plain(layer[0], layer[1], kind)
    for layer in (conv, spatial, channel):
        reason = reason or _not_plain(layer[0], layer[1], nn.Conv2d)
    reason = reason or _not_plain(pool[0], pool[1], nn.AdaptiveAvgPool2d)
    if reason is not None:
        return reason, ()
    size = pool[1].output_size
    if size not in (1, (1, 1), [1, 1]):
        reason = f"{pool[0]}: expected output_size 1, got {size}"
    reason = reason or _another_conv(conv[0], conv[1], dim, dim, True)
    reason = reason or _another_conv(spatial[0], spatial[1], dim, 1, False)
    reason = reason or _another_conv(channel[0], channel[1], dim, dim, False)
    reason = reason or _another_norm(norm[0], norm[1])
    return reason, (conv[1], norm[1], spatial[1], channel[1])


GATE_LAYERS = (
    "Conv2d",
    "BatchNorm2d",
    "ReLU",
    "Conv2d",
    "Sigmoid",
    "AdaptiveAvgPool2d",
    "Conv2d",
    "Sigmoid",
)


def _collect(
    name: str, module: Any, inner: dict[str, type[nn.Module]], layers: list[tuple[str, Any]]
) -> str | None:
    """Enter the layers below a container, in order; the reason where one is not what it was."""
    if inner.get(name) is not type(module):
        was = f"the container {inner[name].__name__}" if name in inner else "a layer of torch.nn"
        return f"{name}: expected {was}, got {described(module)}"
    reason = _replaced(name, module)
    if reason is not None:
        return reason
    for key, child in module._modules.items():
        path = f"{name}.{key}"
        if child is None:
            continue
        if path in inner or (child._modules and not is_parametrized(child)):
            reason = _collect(path, child, inner, layers)
            if reason is not None:
                return reason
        else:
            layers.append((path, child))
    return None


def is_parametrized(module: Any) -> bool:
    """As `torch.nn.utils.parametrize` leaves a layer: its weights are computed by attributes."""
    return "parametrizations" in module._modules and len(module._modules) == 1


def _not_plain(name: str, module: Any, *types: type[nn.Module]) -> str | None:
    kind = type(module)
    if kind not in types and not (is_parametrized(module) and kind.__mro__[1] in types):
        names = " or ".join([t.__name__ for t in types])
        return f"{name}: expected a plain {names}, got {described(module)}"
    return _replaced(name, module)


def _replaced(name: str, module: Any) -> str | None:
    """A method that an attribute of the instance hides, `forward` or one that it calls."""
    attributes = module.__dict__
    if "forward" in attributes or "_conv_forward" in attributes:
        return f"{name}: its forward is replaced on the instance"
    if torch.compiler.is_compiling():
        return None
    for key in attributes:
        if callable(getattr(type(module), key, None)):
            return f"{name}: its {key} is replaced on the instance"
    return None


def _another_conv(
    name: str, conv: Any, channels_in: int, channels_out: int, depthwise: bool
) -> str | None:
    """In what a convolution differs from the 1x1, or depthwise 3x3 with bias, that the kernels know."""
    side = 3 if depthwise else 1
    for setting, wanted, got in (
        ("in_channels", channels_in, conv.in_channels),
        ("out_channels", channels_out, conv.out_channels),
        ("kernel_size", (side, side), conv.kernel_size),
        ("stride", (1, 1), conv.stride),
        ("padding", (side // 2, side // 2), conv.padding),
        ("dilation", (1, 1), conv.dilation),
        ("groups", channels_in if depthwise else 1, conv.groups),
        ("padding_mode", "zeros", conv.padding_mode),
    ):
        if got != wanted:
            return f"{name}: expected {setting} {wanted}, got {got}"
    if channels_out == 3 * channels_in:  # qkv, with or without
        return None
    has_bias = get(conv, "bias") is not None
    if has_bias != depthwise:
        return f"{name}: expected {'a' if depthwise else 'no'} bias"
    return None


def _another_norm(name: str, norm: Any) -> str | None:
    kind = type(norm)
    if kind in NORMS or (is_parametrized(norm) and kind.__mro__[1] in NORMS):
        return _replaced(name, norm)
    if kind is nn.Identity or is_frozen(norm):
        return _replaced(name, norm)
    return (
        f"{name}: expected a plain BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d or Identity, "
        f"got {described(norm)}"
    )


def norms_of(owners: tuple[Any, ...]) -> tuple[Any, ...]:
    """The norm of the q gate and that of the k gate."""
    return (owners[2], owners[6]) if owners else ()


def weights_of(owners: tuple[Any, ...], neutral: Any = None) -> MixerWeights:
    """The tensors of `owners`; of an Identity the statistics that change nothing."""
    flat: list[Any] = []
    for i, name in ENTRIES:
        owner = owners[i]
        if type(owner) is nn.Identity:
            if name in BUFFERS:
                bias = get(owners[i - NORM], "bias")
                statistics = _neutral(bias) if neutral is None else neutral(bias)
                flat.append(statistics[BUFFERS.index(name)])
            else:
                flat.append(None)
        elif name in BUFFERS and owner.training and not getattr(owner, "track_running_stats", True):
            flat.append(None)
        else:
            flat.append(get(owner, name))
    assert len(flat) == COUNT
    return unflatten(flat)


def _neutral(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(like), torch.ones_like(like)


def get(module: Any, name: str) -> Any:
    """A tensor of a module; parametrized or pruned, it is a property or a plain attribute."""
    if name in module._parameters:
        return module._parameters[name]
    if name in module._buffers:
        return module._buffers[name]
    return getattr(module, name)


def described(module: object) -> str:
    """The class of a module, for a message."""
    if module is None:
        return "none"
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def hooked_below(name: str, module: Any) -> str | None:
    """For a compiler: the first child with hooks, itself included, or None."""
    if module._forward_pre_hooks or module._forward_hooks:
        return name
    # Only with gradients hooks of the backward can run.
    if torch.is_grad_enabled() and (module._backward_hooks or module._backward_pre_hooks):
        return name
    for key, child in module._modules.items():
        if child is not None:
            found = hooked_below(f"{name}.{key}", child)
            if found is not None:
                return found
    return None


def watched_globally() -> bool:
    """Whether hooks on all modules are registered, by `torch.utils.flop_counter` for example."""
    m = torch.nn.modules.module
    return bool(
        m._global_forward_hooks
        or m._global_forward_pre_hooks
        or m._global_backward_hooks
        or m._global_backward_pre_hooks
    )
