"""A recorded forward as expressions: of each tensor the operation that made it, and of what.

Operations that change nothing, as a dropout in eval mode, are left out; of those that this file does
not know a node says the name. Nothing here knows a network. May import: recording.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recording import Call, Recording

_ADD = ("add", "add_", "__add__", "__radd__", "__iadd__")
_MUL = ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")
_DIV = ("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__")
_RELU = ("relu", "relu_")
_SAME = (
    *("dropout", "dropout2d", "feature_dropout", "alpha_dropout", "contiguous", "to", "type_as"),
    *("detach", "clone", "float", "double", "cpu", "requires_grad_", "alias"),
)
_PARTS = ("chunk", "split", "split_with_sizes", "tensor_split", "__getitem__", "narrow")
_SHAPES = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "__getitem__", "view_as")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class Node:
    """One value. ``kind`` says what ``inputs`` and ``facts`` are:

    input; tensor (name); conv2d, linear (weight, bias, and of conv2d the settings); batch_norm
    (mean, var, weight, bias, eps); relu, gelu, sigmoid; add, mul (two inputs); scale (factor);
    part (index, of: equal parts of the channels); flat (a map with its pixels in one dimension);
    mean (over the pixels of a map); other.
    """

    def __init__(
        self,
        kind: str,
        call: Call | None,
        shape: Sequence[int],
        inputs: Sequence[Node],
        **facts: Any,
    ) -> None:
        self.kind, self.shape, self.inputs, self.facts = kind, tuple(shape), tuple(inputs), facts
        self.scope = "" if call is None else call.scope
        self.label = kind if call is None else getattr(call.function, "__name__", "?").strip("_")
        self.order = 0  # of creation: inputs come first

    def settings(self) -> dict[str, Any]:
        """Of a convolution stride, padding and dilation as pairs."""
        return {key: _pair(self.facts[key]) for key in ("stride", "padding", "dilation")}


class Graph:
    """The nodes of a recording; ``outputs`` in the order of `Recording.outputs`."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self._nodes: dict[int, Node] = {}
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        for name, t in named:
            if id(t) not in self._nodes:
                self._nodes[id(t)] = Node("tensor", None, t.shape, (), name=name)
        self.input = Node("input", None, recording.x.shape, ())
        self._nodes[id(recording.x)] = self.input
        order = 0
        for call in recording.calls:
            for t, node in self._read(call):
                order += 1
                if node.order == 0:
                    node.order = order
                self._nodes[id(t)] = node  # written in place it is another value from here on
        self.outputs = [self.of(t) for t in recording.outputs]

    def of(self, t: Any) -> Node:
        """The node of a tensor; of one that nothing recorded has made, a constant."""
        node = self._nodes.get(id(t))
        return Node("constant", None, t.shape, ()) if node is None else node

    def _read(self, call: Call) -> list[tuple[Tensor, Node]]:
        name = getattr(call.function, "__name__", "?")
        if name in _PARTS:
            parts = self._parts(call)
            if parts is not None:
                return parts
        if len(call.outputs) != 1:
            return [(t, self._other(call, t)) for t in call.outputs]
        (out,) = call.outputs
        node = self._node(name, call, out)
        return [(out, self._other(call, out) if node is None else node)]

    def _other(self, call: Call, out: Tensor) -> Node:
        return Node("other", call, out.shape, [self.of(t) for t in call.inputs])

    def _node(self, name: str, call: Call, out: Tensor) -> Node | None:
        args, kwargs = call.args, call.kwargs
        if not args or not isinstance(args[0], Tensor):
            first = kwargs.get("input")
            if not isinstance(first, Tensor):
                return self._arithmetic(name, call, out)
        else:
            first = args[0]
        x = self.of(first)
        if name == "conv2d":
            f = _bound(_CONV, args, kwargs, bias=None, stride=1, padding=0, dilation=1, groups=1)
            facts = {key: f[key] for key in ("stride", "padding", "dilation", "groups")}
            return self._layer("conv2d", call, out, x, f, **facts)
        if name == "linear":
            f = _bound(_CONV[:3], args, kwargs, bias=None)
            return self._layer("linear", call, out, x, f)
        if call.function is F.batch_norm:
            f = _bound(
                _NORM, args, kwargs, weight=None, bias=None, training=False, momentum=0, eps=1e-5
            )
            keys = ("running_mean", "running_var", "weight", "bias")
            tensors = {key: None if f[key] is None else self.of(f[key]) for key in keys}
            return Node(
                "batch_norm", call, out.shape, [x], **tensors, training=f["training"], eps=f["eps"]
            )
        if name in _RELU:
            return Node("relu", call, out.shape, [x])
        if name == "gelu":
            exact = kwargs.get("approximate", "none") == "none" and len(args) < 2
            if exact:
                return Node("gelu", call, out.shape, [x])
            approximate = self._other(call, out)
            approximate.label = "gelu, approximated"
            return approximate
        if name == "sigmoid":
            return Node("sigmoid", call, out.shape, [x])
        if name in _SAME:
            same = out.dtype == first.dtype and out.shape == first.shape
            return x if same and torch.equal(out, first) else None
        if name in _SHAPES and _squeezed(out.shape) == _squeezed(first.shape):
            return x
        if name in _SHAPES and tuple(out.shape) == (*first.shape[:2], first.shape[2:].numel()):
            return Node("flat", call, out.shape, [x])
        if _takes_mean(name, args, kwargs, first, out, x.kind == "flat"):
            return Node("mean", call, out.shape, x.inputs if x.kind == "flat" else [x])
        return self._arithmetic(name, call, out)

    def _layer(
        self, kind: str, call: Call, out: Tensor, x: Node, f: Mapping[str, Any], **facts: Any
    ) -> Node:
        bias = None if f["bias"] is None else self.of(f["bias"])
        return Node(kind, call, out.shape, [x], weight=self.of(f["weight"]), bias=bias, **facts)

    def _arithmetic(self, name: str, call: Call, out: Tensor) -> Node | None:
        args = call.args
        if len(args) != 2 or call.kwargs:
            return None
        both = [self.of(t) for t in args if isinstance(t, Tensor)]
        if len(both) == 2 and name in (*_ADD, *_MUL):
            return Node("add" if name in _ADD else "mul", call, out.shape, both)
        if len(both) == 1:
            factor = args[1] if isinstance(args[0], Tensor) else args[0]
            if isinstance(factor, int | float) and name in _MUL:
                return Node("scale", call, out.shape, both, factor=float(factor))
            if isinstance(factor, int | float) and name in _DIV and isinstance(args[0], Tensor):
                return Node("scale", call, out.shape, both, factor=1 / factor)
        return None

    def _parts(self, call: Call) -> list[tuple[Tensor, Node]] | None:
        """Equal parts of the channels, recognised by where they are in the memory of the whole."""
        whole = call.args[0] if call.args else None
        if not isinstance(whole, Tensor) or whole.dim() != 4:
            return None
        found = []
        for t in call.outputs:
            channels = t.shape[1] if t.dim() == 4 else 0
            if (
                channels in (0, whole.shape[1])
                or whole.shape[1] % channels
                or t.stride() != whole.stride()
                or (t.shape[0], *t.shape[2:]) != (whole.shape[0], *whole.shape[2:])
            ):
                return None
            offset = int(t.storage_offset()) - int(whole.storage_offset())
            index, rest = divmod(offset, channels * t.stride(1))
            if rest:
                return None
            of = whole.shape[1] // channels
            found.append((t, Node("part", call, t.shape, [self.of(whole)], index=index, of=of)))
        return found


def _bound(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], **defaults: Any
) -> dict[str, Any]:
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _takes_mean(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, out: Tensor, flat: bool
) -> bool:
    """Whether this is the mean over all pixels, at this size of the map."""
    if name in ("adaptive_avg_pool2d", "avg_pool2d"):
        return x.dim() == 4 and tuple(out.shape[2:]) == (1, 1)
    if name != "mean":
        return False
    dims = kwargs.get("dim", args[1] if len(args) > 1 else ())
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    dims = tuple(sorted(d % x.dim() for d in dims))
    return dims == (2, 3) if x.dim() == 4 else flat and dims == (2,)


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = list(shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _pair(value: Any) -> Any:
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * 2 if len(values) == 1 else values
