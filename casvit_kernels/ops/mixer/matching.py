"""Decides whether a module computes the published CATM: by its structure, then by its own forward.

Neither its class nor the names of its children matter: which child is q's gate and which depthwise
convolution comes first is found by trying. May import: torch, structure.py, trial.py.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor, nn

from .norms import is_frozen
from .structure import (
    Roles,
    described,
    examine,
    is_parametrized,
)
from .trial import Refused, check_forward, expect
from .weights import BUFFERS

LOOKED_FOR = (
    "a 1x1 convolution from C to 3C channels (qkv), two gates of the layers depthwise 3x3, BatchNorm, "
    "ReLU, 1x1 to one channel, Sigmoid, mean over pixels, 1x1, Sigmoid (oper_q, oper_k), two depthwise "
    "3x3 convolutions (dwc, proj) and a dropout or identity (proj_drop), below one module"
)
_PUBLISHED = Roles()


class Match(NamedTuple):
    """How the children of a mixer are called; see `structure.examine`."""

    roles: Roles
    inner: dict[str, type[nn.Module]]

    def owners(self, mixer: nn.Module) -> list[str]:
        """The paths of the modules that own weights, in the order of `weights.OWNERS`."""
        _, owners, _ = examine(mixer, *self)
        names = {id(m): name for name, m in mixer.named_modules()}
        return [names[id(m)] for m in owners]


def match(mixer: nn.Module) -> Match | str:
    """The children of the published CATM in ``mixer``, or in what it differs; see `module.refusal`."""
    try:
        return _match(mixer)
    except Refused as refused:
        return str(refused)


def resembles(module: nn.Module) -> bool:
    """Whether the module is worth a verdict: by the published names, or by the kinds of its children."""
    # Not hasattr: a wrapper such as a compiled module hands on the attributes of what it wraps.
    if all(
        name in module._modules or name in vars(module) or hasattr(type(module), name)
        for name in _PUBLISHED[:5]
    ):
        return True
    kinds = _by_kind(module)
    return len(kinds["qkv"]) == 1 and len(kinds["depthwise"]) == 2 and len(kinds["gate"]) >= 2


# Structure ---------------------------------------------------------------------------------------


def _match(mixer: nn.Module) -> Match:
    _check_methods(type(mixer))
    expect("forward" not in vars(mixer), "its forward is replaced on the instance")
    _check_tensors("", mixer, (), ())
    refusals = []
    for roles in _candidates(mixer):
        found = Match(roles, _containers(mixer, roles))
        _check_structure(mixer, found)
        try:
            check_forward(mixer, roles, found.owners(mixer))
        except Refused as refused:
            refusals.append(refused)
            continue
        return found
    raise refusals[0]


def _candidates(mixer: nn.Module) -> list[Roles]:
    """Which child may play which part, the likeliest first."""
    children = tuple(name for name, child in mixer._modules.items() if child is not None)
    if set(children) & {_PUBLISHED.q, _PUBLISHED.k} or not resembles(mixer):
        same = set(children) == set(_PUBLISHED)
        expect(same, f"it: expected the children {_names(_PUBLISHED)}, got {_names(children)}")
        return [_PUBLISHED]
    kinds = _by_kind(mixer)
    counts = {"qkv": 1, "gate": 2, "depthwise": 2, "drop": 1, "other": 0}
    for kind, count in counts.items():
        got = kinds[kind]
        expect(
            len(got) == count,
            f"it: expected {count} {_KINDS[kind]}, got {len(got)} ({_names(tuple(got))})",
        )
    (qkv,), (drop,) = kinds["qkv"], kinds["drop"]
    return [
        Roles(qkv, q, k, dwc, proj, drop)
        for (q, k), (dwc, proj) in itertools.product(
            itertools.permutations(kinds["gate"]), itertools.permutations(kinds["depthwise"])
        )
    ]


_KINDS = {
    "qkv": "1x1 convolution from C to 3C channels",
    "gate": "gates",
    "depthwise": "depthwise 3x3 convolutions",
    "drop": "dropout or identity",
    "other": "other children",
}


def _by_kind(module: nn.Module) -> dict[str, list[str]]:
    """The names of the children, in order, by what they may be."""
    found: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    for name, child in module._modules.items():
        if isinstance(child, nn.Conv2d):
            in_channels, out_channels = child.in_channels, child.out_channels
            if child.kernel_size == (1, 1) and out_channels == 3 * in_channels:
                kind = "qkv"
            else:
                depthwise = child.groups == in_channels == out_channels
                kind = "depthwise" if depthwise and child.kernel_size == (3, 3) else "other"
        elif isinstance(child, nn.Dropout | nn.Identity):
            kind = "drop"
        elif child is not None:
            kind = "gate" if child._modules else "other"
        else:
            continue
        found[kind].append(name)
    return found


def _containers(mixer: nn.Module, roles: Roles) -> dict[str, type[nn.Module]]:
    """Of each module in the gates that has children its class, by path; they hold no tensors."""
    found: dict[str, type[nn.Module]] = {}
    for gate in (roles.q, roles.k):
        for name, module in mixer.get_submodule(gate).named_modules(prefix=gate):
            if (module._modules or name == gate) and not is_parametrized(module):
                found[name] = type(module)
    return found


def _check_structure(mixer: nn.Module, found: Match) -> None:
    difference, owners, _ = examine(mixer, *found)
    expect(difference is None, str(difference))
    for name, module in mixer.named_modules():
        if module is mixer:
            continue
        expect(
            not is_parametrized(module), f"{name}: expected plain parameters, got parametrized ones"
        )
        frozen = is_frozen(module)
        names = _TENSORS.get(type(module), ((), _FROZEN if frozen else ()))
        _check_tensors(name, module, *names)
        _check_untouched(name, module)
    _check_shapes(mixer, owners)
    tensors = [*mixer.parameters(), *mixer.buffers()]
    expect(
        not any(t.is_meta for t in tensors),
        "its parameters are on the meta device: its forward can be checked once they are loaded",
    )


def _check_methods(cls: type[nn.Module]) -> None:
    """Overriding train(), state-dict or move methods is behaviour that a swap would lose."""
    for name, method in vars(nn.Module).items():
        if name == "__call__" or (
            callable(method)
            and not name.startswith("__")
            and name not in ("forward", "extra_repr", "_get_name")
        ):
            same = getattr(cls, name) is getattr(nn.Module, name)
            expect(same, f"its class overrides {name}()")


_FROZEN = ("weight", "bias", *BUFFERS, "num_batches_tracked")
_TENSORS: dict[type[nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {
    nn.Conv2d: (("weight", "bias"), ()),
    nn.BatchNorm2d: (("weight", "bias"), (*BUFFERS, "num_batches_tracked")),
}
_TENSORS[nn.SyncBatchNorm] = _TENSORS[nn.BatchNorm2d]


def _check_untouched(name: str, module: nn.Module) -> None:
    """A module inside the mixer is no longer called, so nobody may be waiting for its call."""
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        kind = hooks.strip("_").replace("_", " ")
        expect(not vars(module)[hooks], f"{name}: has {kind}, which would no longer be called")


def _check_tensors(
    name: str, module: nn.Module, parameters: tuple[str, ...], buffers: tuple[str, ...]
) -> None:
    for key, parameter in module._parameters.items():
        expect(parameter is None or key in parameters, f"{_prefix(name)}has a parameter {key}")
        expect(
            parameter is None
            or (type(parameter) is nn.Parameter and parameter.is_floating_point()),
            f"{_prefix(name)}expected a plain floating-point parameter {key}, "
            f"got {described(parameter)}",
        )
    for key, buffer in module._buffers.items():
        expect(buffer is None or key in buffers, f"{_prefix(name)}has a buffer {key}")
        expect(
            buffer is None or type(buffer) is Tensor,
            f"{_prefix(name)}expected a plain tensor {key}, got {described(buffer)}",
        )
    for key in parameters:
        expect(key in module._parameters, f"{_prefix(name)}has no parameter {key}")


def _check_shapes(mixer: nn.Module, owners: tuple[nn.Module, ...]) -> None:
    names = {id(m): name for name, m in mixer.named_modules()}
    dim = owners[0].in_channels
    for owner in owners:
        shapes: dict[str, tuple[object, ...]] = dict.fromkeys(("weight", "bias", *BUFFERS), (dim,))
        if isinstance(owner, nn.Conv2d):
            inputs = owner.in_channels // owner.groups
            shapes["weight"] = (owner.out_channels, inputs, *owner.kernel_size)
            shapes["bias"] = (owner.out_channels,)
        for key, shape in shapes.items():
            tensor = getattr(owner, key, None)
            if tensor is not None:
                got = tuple(tensor.shape)
                expect(got == shape, f"{names[id(owner)]}.{key}: expected shape {shape}, got {got}")


def _prefix(name: str) -> str:
    return f"{name}: " if name else "it: "


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
