"""Whether the modules of a network are those that were read: asked in every call, so in C throughout.

May import: torch.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_BASE = frozenset(vars(nn.Module()))
_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
    type,
)
_SIMPLE = (bool, int, float, str, type(None), *_FUNCTIONS)
# What the forward of these reads beside tensors; of any other class every plain attribute counts.
_READ: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps",),
    nn.SyncBatchNorm: ("eps",),
    nn.GELU: ("approximate",),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Linear: (),
    nn.ReLU: (),
    nn.Sigmoid: (),
    nn.Dropout: (),
    nn.Identity: (),
    nn.Sequential: (),
    nn.ModuleList: (),
}
# Their forward is the same in training and in eval mode.
_WITHOUT_MODE = frozenset(_READ) - {nn.BatchNorm2d, nn.SyncBatchNorm, nn.Dropout}
# Nothing in their forward asks for children: there is no need to look whether they got some.
_LEAVES = frozenset(_READ) - {nn.Sequential, nn.ModuleList}
_training = operator.itemgetter("training")


class Watch:
    """Remembers a model's modules as they were read.

    Args:
        model: read just now.
        caching: classes that keep results of their own among their attributes.
    """

    def __init__(self, model: nn.Module, caching: tuple[type[nn.Module], ...]) -> None:
        modules = list(model.modules())
        self._modules = modules
        self._types = list(map(type, modules))
        caches = [isinstance(m, caching) for m in modules]
        plain = [vars(m) for m, own in zip(modules, caches, strict=True) if not own]
        self._dicts = plain
        self._lengths = list(map(len, plain))  # a method replaced on the instance adds one
        self._caching = [vars(m) for m, own in zip(modules, caches, strict=True) if own]
        self._children = [m._modules for m in modules if m._modules or type(m) not in _LEAVES]
        self._contents = [dict(c) for c in self._children]
        self._were_replaced = self._replaced()
        self._settings = _settings(modules, caches)
        self._moded = [vars(m) for m in modules if _has_mode(m)]
        self._names: list[str] = [name for name, _ in model.named_modules()]
        self._hooks_until = -1  # number of the last handle when there were no hooks
        # The dictionaries that hold tensors, and of each tensor of the model where it is.
        self.registered: list[dict[str, Tensor | None]] = [
            d  # type: ignore[misc]
            for m in modules
            for d in (m._parameters, m._buffers)
            if d or type(m) not in _READ  # a forward may ask for a tensor that comes later
        ]
        self._signature = self._described()
        self._places: dict[str, tuple[dict[str, Tensor | None], str]] = {
            f"{name}.{key}" if name else key: (d, key)
            for name, module in model.named_modules(remove_duplicate=False)
            for d in (module._parameters, module._buffers)
            for key in d
        }

    def unchanged(self) -> bool:
        """Whether children, types, settings and methods are those that were read."""
        if not (
            self._children == self._contents
            and list(map(len, self._dicts)) == self._lengths
            and list(map(type, self._modules)) == self._types
        ):
            return False
        try:
            for read, dicts, values in self._settings:
                if list(map(read, dicts)) != values:
                    return False
        except Exception:  # it is gone, or a value that `==` cannot say of (a tensor)
            return False
        return not self._caching or self._replaced() == self._were_replaced

    def training(self) -> bool:
        """Whether a module whose mode matters is in training mode."""
        return any(map(_training, self._moded))

    def hooked(self) -> bool:
        """Whether somebody waits for the call of a module.

        Every hook that is registered takes a number from one counter: where that stands still since
        there were none, there are none. (To look at all of them takes as long as to look for changes.)
        """
        until = RemovableHandle.next_id
        if until == self._hooks_until:
            return False
        if any(vars(m)[key] for m in self._modules for key in _HOOKS):
            return True
        self._hooks_until = until
        return False

    def hooked_module(self) -> str:
        """The path of the first module with hooks, "" for the model itself."""
        for name, module in zip(self._names, self._modules, strict=True):
            if any(vars(module)[key] for key in _HOOKS):
                return name
        return ""

    def same_tensors(self) -> bool:
        """Whether the registered tensors are as many, of the same names and shapes as when read.

        And whether those that were one tensor under several names still are: it was read by one name.
        """
        return self._described() == self._signature

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as it is now."""
        d, key = self._places[name]
        t = d[key]
        assert t is not None, "same_tensors"
        return t

    def place(self, name: str) -> tuple[dict[str, Tensor | None], str]:
        """The dictionary that holds a tensor, and the key."""
        return self._places[name]

    def _replaced(self) -> list[Any]:
        """Of the modules whose attributes come and go what would change their forward."""
        return [("forward" in d, d.get("_altered")) for d in self._caching]

    def _described(self) -> list[Any]:
        first: dict[int, int] = {}
        return [
            [
                (key, None if t is None else (t.shape, first.setdefault(id(t), len(first))))
                for key, t in d.items()
            ]
            for d in self.registered
        ]


def in_training(model: nn.Module) -> str | None:
    """The path of the first module in training mode whose mode matters, "" for the model itself."""
    return next((n for n, m in model.named_modules() if m.training and _has_mode(m)), None)


def _has_mode(module: nn.Module) -> bool:
    return type(module) not in _WITHOUT_MODE


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_Read = tuple[Callable[[dict[str, Any]], Any], list[dict[str, Any]], list[Any]]


def _settings(modules: list[nn.Module], caches: list[bool]) -> list[_Read]:
    """By the attributes that count: how to read them, of which modules, and what they are now."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for module, own in zip(modules, caches, strict=True):
        if own:
            continue
        attributes = vars(module)
        keys = _READ.get(type(module))
        if keys is None or not attributes.keys() >= set(keys):
            keys = tuple(k for k, v in attributes.items() if k not in _BASE and _is_simple(v))
        if keys:
            groups.setdefault(keys, []).append(attributes)
    found: list[_Read] = []
    for keys, dicts in groups.items():
        read = operator.itemgetter(*keys)
        found.append((read, dicts, [_kept(read(d)) for d in dicts]))
    return found


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_simple, value))
    if type(value) is dict:
        return all(map(_is_simple, value.values()))
    return isinstance(value, _SIMPLE)


def _kept(value: Any) -> Any:
    """A value that does not change when somebody writes into a list or dictionary."""
    if type(value) is tuple:
        return tuple(map(_kept, value))
    if type(value) is dict:
        return {key: _kept(each) for key, each in value.items()}
    return list(map(_kept, value)) if isinstance(value, list) else value
