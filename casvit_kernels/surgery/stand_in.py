"""A module that shares everything with another one but its forward, and stands for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# The very dictionaries: what is added to or removed from one of the two holds for both.
_SHARED = (
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_OF_MODULES = frozenset((*vars(nn.Module()), "_model"))


class StandIn(nn.Module):
    """Shares the children, parameters and attributes of ``original()``, which `unfuse` gives back.

    Forward and backward hooks are its own: they run when it is called. What subclasses keep for
    themselves they name in ``OWN``; any other attribute that is set goes to the original, whose methods
    read it.
    """

    OWN: frozenset[str] = frozenset()
    _model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        # Not nn.Module's: it would set the training mode, which is the model's.
        vars(self).update({key: vars(nn.Module())[key] for key in hooks_of_its_own()})
        self._stand_for(model)

    def _stand_for(self, model: nn.Module) -> None:
        vars(self).update({name: vars(model)[name] for name in _SHARED}, _model=model)

    def original(self) -> nn.Module:
        """The other one, the very object."""
        return self._model

    def why_original(self) -> str | None:
        """Why `casvit_kernels.unfuse` leaves it where it is in a larger model, or None."""
        return None

    @property
    def training(self) -> bool:
        """The original's."""
        return self._model.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._model.training = mode

    def train(self, mode: bool = True) -> StandIn:
        """As `nn.Module.train`."""
        self._model.train(mode)  # not chained: overridden in published code, it returns None
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's."""
        return self._model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._model._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StandIn:
        self._model._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        model = vars(self).get("_model")
        if model is None:  # while it is being unpickled
            raise AttributeError(name)
        return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._keeps(name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        if self._keeps(name):
            object.__delattr__(self, name)
        else:
            delattr(self._model, name)

    def _keeps(self, name: str) -> bool:
        """Whether an attribute is of this module, and none of the original's."""
        return name in self.OWN or name in _OF_MODULES or hasattr(type(self), name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._model)})


@functools.cache
def hooks_of_its_own() -> tuple[str, ...]:
    """The attributes of every module that are not the original's."""
    return tuple(name for name in vars(nn.Module()) if name not in (*_SHARED, "training"))
