"""Rewrites of an exported ONNX graph: same numbers, faster in ONNX Runtime, or another opset.

Each rewrite matches a pattern of operators, so the classes of the model do not matter. May touch: onnx,
numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..._optional import need
from ..report import ExportError

if TYPE_CHECKING:
    import numpy

_REDUCTIONS = ["Max", "Mean", "Min", "Prod", "Sum", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"]
AXES_BECAME_INPUT_IN_18 = {f"Reduce{name}" for name in _REDUCTIONS} - {"ReduceSum"}


class Graph:
    """A model's graph with the look-ups that rewriting needs."""

    def __init__(self, model: Any) -> None:
        self.onnx = need("onnx", "export")
        self.model = model
        self.graph = model.graph
        self.index()

    def index(self) -> None:
        self.consumers: dict[str, list[Any]] = {}
        self.producers = {out: node for node in self.graph.node for out in node.output}
        for node in self.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.returned = {out.name for out in self.graph.output}
        self.constants = {t.name: t for t in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self.constants[node.output[0]] = attribute.t

    def only_consumer(self, name: str) -> Any | None:
        """The single consumer of a tensor that is no output of the model, else None."""
        consumers = self.consumers.get(name, [])
        return consumers[0] if len(consumers) == 1 and name not in self.returned else None

    def value(self, name: str) -> numpy.ndarray[Any, Any] | None:
        """The value of a constant, None if it is none."""
        found = self.constants.get(name)
        return None if found is None else self.onnx.numpy_helper.to_array(found)

    def add_constant(self, name: str, value: numpy.ndarray[Any, Any]) -> str:
        tensor = self.onnx.numpy_helper.from_array(value.copy(order="C"), name)
        self.graph.initializer.append(tensor)
        return name

    def replace(self, old: list[Any], new: list[Any]) -> None:
        """New nodes in the place of the last of the old ones."""
        last = max(i for i, node in enumerate(self.graph.node) if node in old)
        for node in reversed(new):
            self.graph.node.insert(last + 1, node)
        for node in old:
            self.graph.node.remove(node)
        self.drop_unread()

    def drop_unread(self) -> None:
        """Remove initializers without a consumer."""
        read = {name for node in self.graph.node for name in node.input} | self.returned
        for tensor in [t for t in self.graph.initializer if t.name not in read]:
            self.graph.initializer.remove(tensor)
        self.index()


def simplify(model: Any) -> int:
    """Split qkv convolutions, merge the two heads, reorder GELUs; the number of rewrites made."""
    graph = Graph(model)
    changed = 0
    while any(rewrite(graph) for rewrite in (_split_convolution, _join_heads, _reorder_gelu)):
        changed += 1
    return changed


def _split_convolution(graph: Graph) -> bool:
    """One convolution and a Split of its channels become a convolution for each part.

    ONNX Runtime keeps convolutions in a blocked layout that Split does not know: qkv went back to
    plain layout, was copied in three parts, and two of them were blocked again.
    """
    for split in graph.graph.node:
        conv = graph.producers.get(split.input[0]) if split.op_type == "Split" else None
        if conv is None or conv.op_type != "Conv" or graph.only_consumer(conv.output[0]) is None:
            continue
        settings = _attributes(split)
        weight = graph.value(conv.input[1])
        bias = graph.value(conv.input[2]) if len(conv.input) > 2 else None
        if weight is None or (len(conv.input) > 2 and bias is None):
            continue
        if settings.get("axis", 0) != 1 or _attributes(conv).get("group", 1) != 1:
            continue
        sizes = graph.value(split.input[1]) if len(split.input) > 1 else None
        parts = len(split.output)
        if sizes is None and weight.shape[0] % parts:
            continue
        lengths = [weight.shape[0] // parts] * parts if sizes is None else sizes.tolist()
        ends = list(accumulate(lengths))
        spans = [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
        weights = [weight[span] for span in spans]
        biases = [None if bias is None else bias[span] for span in spans]
        made = []
        for i, (w, b, out) in enumerate(zip(weights, biases, split.output, strict=True)):
            node = _copy(conv)
            node.name = f"{conv.name}_part{i}"
            del node.input[1:]
            node.input.append(graph.add_constant(f"{conv.input[1]}_{conv.name}_part{i}", w))
            if b is not None:
                node.input.append(graph.add_constant(f"{conv.input[2]}_{conv.name}_part{i}", b))
            node.output[0] = out
            made.append(node)
        graph.replace([conv, split], made)
        return True
    return False


def _join_heads(graph: Graph) -> bool:
    """The mean of two linear layers of one input becomes one layer: ``(head + dist_head) / 2``."""
    for add in graph.graph.node:
        if add.op_type != "Add":
            continue
        one, other = (graph.producers.get(name) for name in add.input)
        divide = graph.only_consumer(add.output[0])
        if not (_is_linear(graph, one) and _is_linear(graph, other)) or divide is None:
            continue
        if divide.op_type not in ("Div", "Mul") or divide.input[0] != add.output[0]:
            continue
        assert one is not None
        assert other is not None
        if one is other or one.input[0] != other.input[0]:
            continue
        factor = graph.value(divide.input[1])
        first, second = _weights(graph, one), _weights(graph, other)
        if factor is None or factor.size != 1 or first is None or second is None:
            continue
        if first[0].shape != second[0].shape:
            continue
        scale = float(factor.reshape(()))
        if divide.op_type == "Div":
            scale = 1 / scale
        node = _copy(one)
        del node.input[1:]
        for kind, w, w2 in zip(("weight", "bias"), first, second, strict=True):
            joined = (w.astype("float64") + w2) * scale
            node.input.append(graph.add_constant(f"{one.name}_{kind}", joined.astype(w.dtype)))
        node.output[0] = divide.output[0]
        graph.replace([one, other, add, divide], [node])
        return True
    return False


def _reorder_gelu(graph: Graph) -> bool:
    """``x * (0.5 * (1 + erf))`` becomes ``(x * (1 + erf)) * 0.5``, which ONNX Runtime takes as one.

    The numbers are the same, bit by bit. Before opset 20 there is no Gelu operator.
    """
    for halve in graph.graph.node:
        if halve.op_type != "Mul" or graph.value(halve.input[0]) is None:
            continue
        factor = graph.value(halve.input[0])
        add = graph.producers.get(halve.input[1])
        times = graph.only_consumer(halve.output[0])
        if factor is None or factor.size != 1 or float(factor.reshape(())) != 0.5:
            continue
        if add is None or add.op_type != "Add" or times is None or times.op_type != "Mul":
            continue
        erf = [graph.producers.get(name) for name in add.input]
        if not any(node is not None and node.op_type == "Erf" for node in erf):
            continue
        x = next(name for name in times.input if name != halve.output[0])
        half = halve.input[0]
        halve.input[0] = x
        del times.input[:]
        times.input.extend([halve.output[0], half])
        graph.index()
        return True
    return False


def _weights(graph: Graph, node: Any) -> list[numpy.ndarray[Any, Any]] | None:
    """Constant weight and bias of a linear layer; exporters leave out a bias of zeros."""
    found = [graph.value(name) for name in node.input[1:]]
    if len(found) == 1 and found[0] is not None:
        found.append(need("numpy", "export").zeros_like(found[0], shape=found[0].shape[0]))
    arrays = [value for value in found if value is not None]
    return arrays if len(arrays) == 2 else None


def _is_linear(graph: Graph, node: Any) -> bool:
    """Whether it is ``x @ w.T + b`` and read once."""
    plain = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    return (
        node is not None
        and node.op_type == "Gemm"
        and {**plain, **_attributes(node)} == {**plain, "transB": 1}
        and graph.only_consumer(node.output[0]) is not None
    )


def _copy(node: Any) -> Any:
    made = type(node)()
    made.CopyFrom(node)
    return made


def _attributes(node: Any) -> dict[str, Any]:
    helper = need("onnx", "export").helper
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def convert(model: Any, opset: int) -> Any:
    """The model in another opset.

    Raises:
        ExportError: an operator is not known in it.
    """
    onnx = need("onnx", "export")
    if version(model) == opset:
        return model
    if opset >= version(model):
        try:
            return onnx.version_converter.convert_version(model, opset)
        except RuntimeError as error:
            raise ExportError(f"opset: cannot convert to {opset}: {error}") from error
    return _to_17(model)


def _to_17(model: Any) -> Any:
    """From 18. Two kinds of operators changed; any other that did is an error."""
    onnx = need("onnx", "export")
    graph = Graph(model)
    for node in graph.graph.node:
        if node.op_type == "Split":
            # 17 has no num_outputs: without sizes it makes equal parts.
            _drop_attributes(node, "num_outputs")
        elif node.op_type in AXES_BECAME_INPUT_IN_18:
            axes = graph.value(node.input[1]) if len(node.input) > 1 and node.input[1] else None
            if axes is None and len(node.input) > 1 and node.input[1]:
                raise ExportError(
                    f"opset: the axes of {node.name} are computed, 17 needs constants"
                )
            _drop_attributes(node, "noop_with_empty_axes")
            del node.input[1:]
            if axes is not None:
                node.attribute.append(onnx.helper.make_attribute("axes", axes.tolist()))
        elif _since(onnx, node.op_type, 17) != _since(onnx, node.op_type, 18):
            raise ExportError(f"opset: cannot write {node.op_type} ({node.name}) in opset 17")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = 17
    graph.drop_unread()
    return model


def _since(onnx: Any, operator: str, opset: int) -> int | None:
    try:
        return int(onnx.defs.get_schema(operator, opset).since_version)
    except onnx.defs.SchemaError:
        return None


def _drop_attributes(node: Any, name: str) -> None:
    for attribute in list(node.attribute):
        if attribute.name == name:
            node.attribute.remove(attribute)


def version(model: Any) -> int:
    """The opset of the standard operators."""
    return int(next(e.version for e in model.opset_import if e.domain in ("", "ai.onnx")))


def gates(model: Any) -> Iterator[str]:
    """Names of the nodes that compute gates: all their consumers lead to a Sigmoid."""
    graph = Graph(model)
    inside: set[str] = set()
    unread = [node for node in graph.graph.node if node.op_type == "Sigmoid"]
    while unread:
        node = unread.pop()
        if node.name in inside:
            continue
        inside.add(node.name)
        for name in node.input:
            producer = graph.producers.get(name)
            if producer is not None and graph.only_consumer(name) is not None:
                unread.append(producer)
    yield from sorted(inside)
