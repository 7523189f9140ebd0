"""A CAS-ViT network found in the expressions of a recorded forward, whatever its classes and names.

May import: graph.py, ops/network.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from ..ops.network.fold import Block, Gate, Layer, Norm, Sources, StageSources
from ..ops.network.packed import Found
from ..ops.network.plan import LOGITS, MAP, MAPS, POOLED, Plan, Stage
from .graph import Graph, Node

_CALLED = {
    "conv2d": "a Conv2d",
    "linear": "a Linear layer",
    "batch_norm": "a BatchNorm",
    "relu": "a ReLU",
    "gelu": "an exact GELU",
    "sigmoid": "a Sigmoid",
    "add": "a sum",
    "mul": "a product",
    "mean": "the mean over pixels",
    "part": "a third of the channels of qkv",
    "input": "the input",
    "tensor": "a parameter",
    "constant": "a constant",
}


class NetworkUnsupported(ValueError):
    """A model is no CAS-ViT network that `fuse_network` takes.

    Attributes:
        layer: path of the module in the model, "" for the model itself.
        reason: in what it differs.
    """

    def __init__(self, layer: str, reason: str) -> None:
        self.layer, self.reason = layer, reason
        super().__init__(
            f"model: expected a CAS-ViT network, got one where {layer or 'the model'}: {reason}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.layer, self.reason)


class _Output(NamedTuple):
    """One tensor that the model returns: of the map of a stage what the head makes."""

    kind: int  # MAP, POOLED or LOGITS
    trunk: Node
    norm: Norm | None
    heads: tuple[tuple[Layer, float], ...]
    classes: int


def read(graph: Graph, bare: bool) -> Found:
    """The network of a graph.

    Args:
        bare: whether the model returns a tensor, not a list or tuple of some.

    Raises:
        NetworkUnsupported: with the layer and the reason.
    """
    outputs = [_output(node) for node in graph.outputs]
    if not outputs:
        _refuse(None, "it returns no tensor")
    ends, stem, stages = _trunk(max((o.trunk for o in outputs), key=lambda n: n.order), graph.input)
    maps: dict[int, _Output] = {}
    head: _Output | None = None
    for node, output in zip(graph.outputs, outputs, strict=True):
        if not any(output.trunk is end for end in ends):
            _refuse(output.trunk, "the model returns what is made of a map inside a stage")
        index = next(i for i, end in enumerate(ends) if end is output.trunk)
        if output.kind == MAP and not bare and maps.get(index, output) == output:
            maps[index] = output
        elif index == len(ends) - 1 and (head is None or head == output):
            head = output
        else:
            _refuse(
                node, "the model returns more of a stage than its map, or of an early one a mean"
            )
    planned, found = [], []
    for index, (channels, embedding, blocks) in enumerate(stages):
        hidden = tuple(hidden for _, hidden in blocks)
        planned.append(Stage(channels, hidden, index in maps))
        norm = maps[index].norm if index in maps else None
        found.append(StageSources(embedding, tuple(block for block, _ in blocks), norm))
    (first, in_chans, mid), (second, _, _) = stem
    plan = Plan(
        in_chans,
        mid,
        False,
        tuple(planned),
        MAPS if head is None else head.kind,
        0 if head is None else head.classes,
    )
    sources = Sources(
        (first, second),
        tuple(found),
        None if head is None else head.norm,
        () if head is None else head.heads,
    )
    places = sorted(maps)
    order = tuple(
        places.index(next(i for i, end in enumerate(ends) if end is o.trunk))
        if o.kind == MAP and o != head
        else len(places)
        for o in outputs
    )
    return Found(plan, sources, order, bare)


def _refuse(node: Node | None, reason: str) -> NoReturn:
    raise NetworkUnsupported("" if node is None else node.scope, reason)


def _expect(node: Node, kind: str, what: str) -> Node:
    if node.kind != kind:
        _refuse(node, f"expected {_CALLED[kind]} ({what}), got {_called(node)}")
    return node


def _called(node: Node) -> str:
    return _CALLED.get(node.kind, f"the operation {node.label}")


# The head ----------------------------------------------------------------------------------------


def _output(node: Node) -> _Output:
    terms = _terms(node, 1.0)
    if len({id(term) for term, _ in terms}) == 1 and sum(share for _, share in terms) == 1:
        node = terms[0][0]  # an average of two heads that were left out
        terms = terms[:1]
    if all(map(_is_classifier, (term for term, _ in terms))):
        return _classifier(node, terms)
    if _is_pooled(node):
        pooled, norm = _pooled(node)
        return _Output(POOLED, pooled, norm, (), 0)
    if node.kind == "batch_norm" and node.inputs[0].kind != "conv2d":
        return _Output(MAP, node.inputs[0], _norm(node), (), 0)
    return _Output(MAP, node, None, (), 0)


def _classifier(node: Node, terms: list[tuple[Node, float]]) -> _Output:
    layers, bases = [], []
    for head, share in terms:
        if head.kind == "conv2d":
            _check_conv(head, 1, 1, False, "the classifier")
        pooled, norm = _pooled(head.inputs[0])
        layers.append((_layer(head, norm), share))
        bases.append(pooled)
    if any(base is not bases[0] for base in bases):
        _refuse(terms[1][0], "expected classifiers of the same features")
    classes = {head.facts["weight"].shape[0] for head, _ in terms}
    if len(classes) > 1:
        _refuse(node, f"expected classifiers of one size, got {sorted(classes)}")
    return _Output(LOGITS, bases[0], None, tuple(layers), classes.pop())


def _terms(node: Node, share: float) -> list[tuple[Node, float]]:
    """Of a weighted sum of vectors its terms, and what each counts; of anything else itself."""
    if node.shape[2:].count(1) == len(node.shape[2:]):
        if node.kind == "scale":
            return _terms(node.inputs[0], share * node.facts["factor"])
        if node.kind == "add":
            return [term for each in node.inputs for term in _terms(each, share)]
    return [(node, share)]


def _is_classifier(node: Node) -> bool:
    return node.kind == "linear" or (node.kind == "conv2d" and _is_pooled(node.inputs[0]))


def _is_pooled(node: Node) -> bool:
    return node.kind == "mean" or (node.kind == "batch_norm" and node.inputs[0].kind == "mean")


def _pooled(node: Node) -> tuple[Node, Norm | None]:
    """The map below a spatial mean, and the norm before or behind it."""
    norm = None
    if node.kind == "batch_norm":
        norm, node = _norm(node), node.inputs[0]
    _expect(node, "mean", "of the last map")
    node = node.inputs[0]
    if norm is None and node.kind == "batch_norm" and node.inputs[0].kind != "conv2d":
        norm, node = _norm(node), node.inputs[0]
    return node, norm


# The trunk ---------------------------------------------------------------------------------------

_Blocks = list[tuple[Block, int]]


def _trunk(node: Node, x: Node) -> tuple[list[Node], Any, list[tuple[int, Layer | None, _Blocks]]]:
    """Back from a map to the input: the maps behind the stages, the stem, and the stages."""
    ends = [node]
    stages: list[tuple[int, Layer | None, _Blocks]] = []
    blocks: _Blocks = []
    while True:
        if node.kind == "add":
            node, block, hidden = _block(node)
            blocks.insert(0, (block, hidden))
        elif node.kind == "relu":
            stem, channels = _stem(node, x)
            stages.insert(0, (channels, None, blocks))
            return ends, stem, stages
        else:
            if node.kind not in ("conv2d", "batch_norm"):
                what = "expected a block (three residual sums), an embedding or the stem"
                _refuse(node, f"{what}, got {_called(node)}")
            channels = node.shape[1]
            embedding, node = _conv(node, 3, 2, False, "an embedding between stages")
            stages.insert(0, (channels, embedding, blocks))
            ends.insert(0, node)
            blocks = []


def _stem(node: Node, x: Node) -> tuple[Any, int]:
    channels = node.shape[1]
    found: list[tuple[Layer, int, int]] = []
    for place in ("second", "first"):
        _expect(node, "relu", f"behind the {place} convolution of the stem")
        inner = node.inputs[0]
        layer, node = _conv(inner, 3, 2, False, f"the {place} convolution of the stem")
        found.insert(0, (layer, node.shape[1], inner.shape[1]))
    if node is not x:
        _refuse(node, f"expected the input of the model before the stem, got {_called(node)}")
    return found, channels


def _block(node: Node) -> tuple[Node, Block, int]:
    trunk, branch = _residual(node, "of a block's Mlp")
    fc2, inner = _conv(branch, 1, 1, False, "fc2 of the Mlp")
    inner = _expect(inner, "gelu", "between fc1 and fc2 of the Mlp").inputs[0]
    hidden = inner.shape[1]
    fc1, start = _conv(inner, 1, 1, False, "fc1 of the Mlp", trunk)
    _same(start, trunk, branch, "the Mlp")

    trunk, branch = _residual(trunk, "of a block's token mixer")
    qkv, q, k, dwc, proj, start = _mixer(branch, trunk)
    _same(start, trunk, branch, "the token mixer")

    trunk, branch = _residual(trunk, "of a block's local integration")
    third, inner = _conv(branch, 1, 1, False, "the last convolution of the local integration")
    inner = _expect(inner, "gelu", "in the local integration").inputs[0]
    second, inner = _conv(inner, 3, 1, True, "the depthwise convolution of the local integration")
    first, start = _conv(
        inner, 1, 1, False, "the first convolution of the local integration", trunk
    )
    _same(start, trunk, branch, "the local integration")
    return trunk, Block((first, second, third), qkv, q, k, dwc, proj, fc1, fc2), hidden


def _residual(node: Node, what: str) -> tuple[Node, Node]:
    """What the sum adds to, and what it adds: the trunk is made before the branch."""
    _expect(node, "add", f"the residual {what}")
    trunk, branch = sorted(node.inputs, key=lambda n: n.order)
    if trunk.shape != branch.shape:
        _refuse(node, f"expected a residual sum of equal shapes {what}")
    return trunk, branch


def _same(start: Node, trunk: Node, branch: Node, what: str) -> None:
    if start is not trunk:
        _refuse(start if start.scope else branch, f"{what} does not read what it is added to")


def _mixer(node: Node, trunk: Node) -> tuple[Layer, Gate, Gate, Layer, Layer, Node]:
    proj, inner = _conv(node, 3, 1, True, "proj of the token mixer")
    _expect(inner, "mul", "of the context with v in the token mixer")
    context, v = sorted(inner.inputs, key=lambda n: n.kind == "part")
    _expect(v, "part", "v")
    dwc, both = _conv(context, 3, 1, True, "dwc of the token mixer")
    _expect(both, "add", "of the two gates' outputs")
    gates = []
    for each in both.inputs:
        gate, z = _gate(each)
        _expect(z, "part", "the input of a gate")
        gates.append((z, gate))
    (q_part, q), (k_part, k) = sorted(gates, key=lambda pair: pair[0].facts["index"])
    for index, part in enumerate((q_part, k_part, v)):
        if (part.facts["index"], part.facts["of"]) != (index, 3):
            _refuse(part, "expected q, k and v, in this order, in thirds of the channels of qkv")
        if part.inputs[0] is not v.inputs[0]:
            _refuse(part, "expected q, k and v of the same convolution")
    qkv, start = _conv(v.inputs[0], 1, 1, False, "qkv of the token mixer", trunk)
    return qkv, q, k, dwc, proj, start


def _gate(node: Node) -> tuple[Gate, Node]:
    channel, z = _weighed(node, "the channel gate")
    logit, inner = _conv(channel, 1, 1, False, "of the channel gate", bias=False)
    _expect(inner, "mean", "of the channel gate")
    if inner.inputs[0] is not z:
        _refuse(inner, "expected the mean of what the channel gate weighs")
    spatial, start = _weighed(z, "the spatial gate")
    one, hidden = _conv(spatial, 1, 1, False, "of the spatial gate", bias=False)
    if spatial.shape[1] != 1:
        _refuse(spatial, f"expected a spatial gate of 1 channel, got {spatial.shape[1]}")
    hidden = _expect(hidden, "relu", "of the spatial gate").inputs[0]
    depthwise, read = _conv(hidden, 3, 1, True, "the depthwise convolution of the spatial gate")
    if read is not start:
        _refuse(hidden, "expected a spatial gate made of what it weighs")
    return Gate(depthwise, one, logit), start


def _weighed(node: Node, what: str) -> tuple[Node, Node]:
    """Of ``z * sigmoid(logit)`` the logit and z."""
    _expect(node, "mul", what)
    z, weight = sorted(node.inputs, key=lambda n: n.kind == "sigmoid")
    return _expect(weight, "sigmoid", what).inputs[0], z


# Layers ------------------------------------------------------------------------------------------


def _conv(
    node: Node,
    side: int,
    stride: int,
    depthwise: bool,
    what: str,
    trunk: Node | None = None,
    bias: bool = True,
) -> tuple[Layer, Node]:
    """A convolution with a norm behind it or, where a trunk is given, before it; and its input.

    Args:
        what: its part in the network, for messages.
        trunk: what the branch is added to, which no norm before the convolution can be.
        bias: whether it may have one, or a norm that makes one.
    """
    after = None
    if node.kind == "batch_norm" and bias:
        after, node = _norm(node), node.inputs[0]
    _expect(node, "conv2d", what)
    _check_conv(node, side, stride, depthwise, what)
    if not bias and node.facts["bias"] is not None:
        _refuse(node, f"expected no bias ({what})")
    start, norm = node.inputs[0], None
    if trunk is not None and start.kind == "batch_norm" and start is not trunk:
        norm, start = _norm(start), start.inputs[0]
    return _layer(node, norm, after), start


def _check_conv(node: Node, side: int, stride: int, depthwise: bool, what: str) -> None:
    weight = node.facts["weight"].shape
    channels = node.inputs[0].shape[1]
    padding: Any = (side // 2, side // 2)
    settings = node.settings()
    if settings["padding"] == ("valid" if side == 1 else "same"):
        settings["padding"] = padding
    wanted = {"stride": (stride, stride), "padding": padding, "dilation": (1, 1)}
    if side == 1:
        del wanted["dilation"]
    got = {key: settings[key] for key in wanted}
    got |= {"kernel_size": tuple(weight[2:]), "groups": node.facts["groups"]}
    wanted |= {"kernel_size": (side, side), "groups": channels if depthwise else 1}
    if depthwise and weight[0] != channels:
        _refuse(node, f"expected {channels} channels of the output, got {weight[0]} ({what})")
    for key, expected in wanted.items():
        if got[key] != expected:
            _refuse(node, f"expected {key} {expected}, got {got[key]} ({what})")


def _layer(node: Node, before: Norm | None, after: Norm | None = None) -> Layer:
    weight = _name(node, "weight")
    assert weight is not None
    return Layer(weight, _name(node, "bias"), before, after)


def _norm(node: Node) -> Norm:
    if node.facts["training"] or node.facts["running_mean"] is None:
        _refuse(node, "normalises by statistics of the batch: it needs running statistics")
    mean, var = _name(node, "running_mean"), _name(node, "running_var")
    assert mean is not None
    assert var is not None
    return Norm(mean, var, _name(node, "weight"), _name(node, "bias"), float(node.facts["eps"]))


def _name(node: Node, key: str) -> str | None:
    """The name of a tensor that a layer reads, where it is a parameter or buffer as it is."""
    tensor: Node | None = node.facts[key]
    if tensor is None:
        return None
    if tensor.kind != "tensor":
        _refuse(node, f"its {key} is computed in the forward: fold what computes it first")
    name: str = tensor.facts["name"]
    return name
