"""One forward of a model as a graph: every operation on tensors, who made and who reads each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

SAME = 1e-9  # of the largest output; float64 products in another order differ by about 1e-15


class Call(NamedTuple):
    function: Callable[..., Any]
    inputs: list[Tensor]  # also weights
    outputs: list[Tensor]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    scope: str = ""  # the path of the module that called; where a recording asks for it


class _Recorder(TorchFunctionMode):
    def __init__(self, scopes: list[str]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._scopes = scopes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inputs = tensors((args, kwargs))
        out = func(*args, **(kwargs or {}))
        outputs = tensors(out)
        if inputs and outputs:
            scope = self._scopes[-1] if self._scopes else ""
            self.calls.append(Call(func, inputs, outputs, args, kwargs or {}, scope))
        return out


class Recording:
    """One forward, with every tensor it made kept alive: identities stay unique."""

    def __init__(self, model: nn.Module, x: Tensor, scopes: list[str] | None = None) -> None:
        """scopes: the paths of the modules that are being called, the innermost last; kept by hooks."""
        x = x.clone()
        with _Recorder([] if scopes is None else scopes) as recorder:
            result = model(x)
        self.x, self.result = x, result
        self.calls = recorder.calls
        self.nodes = len(recorder.calls)
        self.outputs = tensors(result)
        self.returned = {id(t) for t in self.outputs}
        self.readers: dict[int, list[Call]] = {}
        self.makers: dict[int, Call] = {}
        for call in self.calls:
            for key in {id(t) for t in call.inputs}:
                self.readers.setdefault(key, []).append(call)
            for t in call.outputs:
                self.makers[id(t)] = call

    def read_by(self, t: Tensor) -> list[Call]:
        return self.readers.get(id(t), [])


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def same_outputs(got: Recording, expected: Recording) -> bool:
    return len(got.outputs) == len(expected.outputs) and all(
        a.shape == b.shape
        and (a.numel() == 0 or bool((a - b).abs().max() <= SAME * (1 + b.abs().max())))
        for a, b in zip(got.outputs, expected.outputs, strict=True)
    )
