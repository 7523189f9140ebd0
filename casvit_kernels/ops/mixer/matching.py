"""Decides whether a module computes the published CATM: by its structure, then by its own forward.

May import: torch, reference.py, weights.py. The class of the module and of its gates does not matter.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import reference
from .weights import BUFFERS, PATHS, MixerWeights, unflatten

_M = TypeVar("_M", bound=nn.Module)
_CHILDREN = ("qkv", "oper_q", "oper_k", "dwc", "proj", "proj_drop")


def difference(mixer: nn.Module) -> str | None:
    """In what ``mixer`` differs from the published CATM, or None; see `module.refusal`."""
    try:
        _check_structure(mixer)
        _check_forward(mixer)
    except _Refused as refused:
        return str(refused)
    return None


# Structure ---------------------------------------------------------------------------------------


class _Refused(Exception):
    pass


def _expect(condition: bool, reason: str) -> None:
    if not condition:
        raise _Refused(reason)


def _check_structure(mixer: nn.Module) -> None:
    _check_methods(type(mixer))
    _expect("forward" not in vars(mixer), "its forward is replaced on the instance")
    _check_tensors("", mixer, (), ())
    _check_children("", mixer, _CHILDREN, ordered=False)

    modules = mixer._modules
    qkv = modules["qkv"]
    dim = _check_plain("qkv", qkv, nn.Conv2d).in_channels
    _check_conv("qkv", qkv, dim, 3 * dim, bias=None)
    for name in ("oper_q", "oper_k"):
        _check_gate(name, modules[name], dim)
    for name in ("dwc", "proj"):
        _check_conv(name, modules[name], dim, dim, depthwise=True, bias=True)
    _check_plain("proj_drop", modules["proj_drop"], nn.Dropout, nn.Identity)

    tensors = [*mixer.parameters(), *mixer.buffers()]
    _expect(
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
            _expect(same, f"its class overrides {name}()")


def _check_gate(name: str, gate: nn.Module | None, dim: int) -> None:
    _check_sequential(name, gate, 2)
    assert gate is not None
    spatial, channel = (_block(f"{name}.{i}", gate._modules[str(i)]) for i in (0, 1))

    at = f"{name}.0.block"
    _check_sequential(at, spatial, 5)
    m = spatial._modules
    _check_conv(f"{at}.0", m["0"], dim, dim, depthwise=True, bias=True)
    _check_norm(f"{at}.1", m["1"], dim)
    _check_plain(f"{at}.2", m["2"], nn.ReLU)
    _check_conv(f"{at}.3", m["3"], dim, 1, bias=False)
    _check_plain(f"{at}.4", m["4"], nn.Sigmoid)

    at = f"{name}.1.block"
    _check_sequential(at, channel, 3)
    m = channel._modules
    size = _check_plain(f"{at}.0", m["0"], nn.AdaptiveAvgPool2d).output_size
    _expect(size in (1, (1, 1), [1, 1]), f"{at}.0: expected output_size 1, got {size}")
    _check_conv(f"{at}.1", m["1"], dim, dim, bias=False)
    _check_plain(f"{at}.2", m["2"], nn.Sigmoid)


def _block(name: str, operation: nn.Module | None) -> nn.Module:
    """The only child of a gate's operation, whose class is its author's own."""
    assert operation is not None
    _check_tensors(name, operation, (), ())
    _check_children(name, operation, ("block",))
    _check_untouched(name, operation)
    block = operation._modules["block"]
    assert block is not None
    return block


def _check_sequential(name: str, module: nn.Module | None, length: int) -> None:
    _expect(
        type(module) is nn.Sequential,
        f"{name}: expected a plain Sequential, got {_type(module)}",
    )
    assert module is not None
    _check_tensors(name, module, (), ())
    _check_children(name, module, tuple(str(i) for i in range(length)))
    _check_untouched(name, module)


def _check_conv(
    name: str,
    module: nn.Module | None,
    channels_in: int,
    channels_out: int,
    *,
    bias: bool | None,  # None: optional
    depthwise: bool = False,
) -> None:
    conv = _check_plain(name, module, nn.Conv2d)
    side = 3 if depthwise else 1
    groups = channels_in if depthwise else 1
    wanted = {
        "in_channels": channels_in,
        "out_channels": channels_out,
        "kernel_size": (side, side),
        "stride": (1, 1),
        "padding": (side // 2, side // 2),
        "dilation": (1, 1),
        "groups": groups,
        "padding_mode": "zeros",
    }
    for setting, value in wanted.items():
        got = getattr(conv, setting)
        _expect(got == value, f"{name}: expected {setting} {value}, got {got}")
    has_bias = conv.bias is not None
    _expect(bias in (None, has_bias), f"{name}: expected {'a' if bias else 'no'} bias")
    shape = (channels_out, channels_in // groups, side, side)
    _check_shapes(name, conv, {"weight": shape, "bias": (channels_out,)})


def _check_norm(name: str, module: nn.Module | None, dim: int) -> None:
    norm: nn.Module = _check_plain(name, module, nn.BatchNorm2d, nn.SyncBatchNorm)
    tensors = ("weight", "bias", "running_mean", "running_var")
    for tensor in tensors:
        _expect(getattr(norm, tensor) is not None, f"{name}: expected a {tensor}, got None")
    _check_shapes(name, norm, dict.fromkeys(tensors, (dim,)))


_TENSORS: dict[type[nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {
    nn.Conv2d: (("weight", "bias"), ()),
    nn.BatchNorm2d: (("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")),
}
_TENSORS[nn.SyncBatchNorm] = _TENSORS[nn.BatchNorm2d]


def _check_plain(name: str, module: nn.Module | None, *types: type[_M]) -> _M:
    """``module``, which is one of the plain types of torch.nn without anything attached to it."""
    _expect(
        module is None or not parametrize.is_parametrized(module),
        f"{name}: expected plain parameters, got parametrized ones",
    )
    _expect(
        type(module) in types,
        f"{name}: expected a plain {' or '.join(t.__name__ for t in types)}, got {_type(module)}",
    )
    assert module is not None
    _check_tensors(name, module, *_TENSORS.get(type(module), ((), ())))
    _check_children(name, module, ())
    _check_untouched(name, module)
    return cast(_M, module)


def _check_untouched(name: str, module: nn.Module) -> None:
    """A module inside the mixer is no longer called, so nobody may be waiting for its call."""
    _expect("forward" not in vars(module), f"{name}: its forward is replaced on the instance")
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        kind = hooks.strip("_").replace("_", " ")
        _expect(not vars(module)[hooks], f"{name}: has {kind}, which would no longer be called")


def _check_children(
    name: str, module: nn.Module, wanted: tuple[str, ...], ordered: bool = True
) -> None:
    got = tuple(key for key, child in module._modules.items() if child is not None)
    same = got == wanted if ordered else set(got) == set(wanted)
    _expect(same, f"{_prefix(name)}expected the children {_names(wanted)}, got {_names(got)}")


def _check_tensors(
    name: str, module: nn.Module, parameters: tuple[str, ...], buffers: tuple[str, ...]
) -> None:
    for key, parameter in module._parameters.items():
        _expect(parameter is None or key in parameters, f"{_prefix(name)}has a parameter {key}")
        _expect(
            parameter is None
            or (type(parameter) is nn.Parameter and parameter.is_floating_point()),
            f"{_prefix(name)}expected a plain floating-point parameter {key}, "
            f"got {_type(parameter)}",
        )
    for key, buffer in module._buffers.items():
        _expect(buffer is None or key in buffers, f"{_prefix(name)}has a buffer {key}")
        _expect(
            buffer is None or type(buffer) is Tensor,
            f"{_prefix(name)}expected a plain tensor {key}, got {_type(buffer)}",
        )
    for key in parameters:
        _expect(key in module._parameters, f"{_prefix(name)}has no parameter {key}")


def _check_shapes(name: str, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    for key, shape in shapes.items():
        tensor = getattr(module, key)
        if tensor is not None:
            got = tuple(tensor.shape)
            _expect(got == shape, f"{name}.{key}: expected shape {shape}, got {got}")


def _prefix(name: str) -> str:
    return f"{name}: " if name else "it: "


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def _type(value: object) -> str:
    if value is None:
        return "none"
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


# Forward -----------------------------------------------------------------------------------------

_TOLERANCE = 1e-9  # of the largest value; float64 sums in another order differ by about 1e-15


class _MarkedDropout(nn.Dropout):
    """Stands for a dropout in the check: deterministic, and its place in the forward is visible."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + 0.1 * x if self.training else x


def _check_forward(mixer: nn.Module) -> None:
    generator = torch.Generator(device="cpu").manual_seed(0)
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
    ):
        probe = _randomised_copy(mixer, generator)
        truth = copy.deepcopy(probe)
        dim: int = mixer.qkv.in_channels  # type: ignore[assignment, union-attr]
        # Odd sides, more than one image; another size in eval mode.
        for mode, shape in (("training", (2, dim, 5, 3)), ("eval", (3, dim, 4, 5))):
            probe.train(mode == "training")
            truth.train(mode == "training")
            x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            _compare(mode, probe, truth, x, generator)


def _compare(
    mode: str, probe: nn.Module, truth: nn.Module, x: Tensor, generator: torch.Generator
) -> None:
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    expected = truth.get_submodule("proj_drop")(
        reference.catm(
            mine,
            _weights(truth),
            truth.get_submodule("oper_q.0.block.1"),
            truth.get_submodule("oper_k.0.block.1"),
        )
    )
    try:
        got = probe.forward(theirs)  # not probe(...): no hook shall see it
    except Exception as error:
        raise _Refused(f"its forward raises {type(error).__name__}: {error}") from error
    _expect(isinstance(got, Tensor), f"its forward returns {_type(got)}, expected a tensor")
    _expect(
        got.shape == expected.shape and got.dtype == expected.dtype,
        f"its forward returns {tuple(got.shape)} {got.dtype}, "
        f"expected {tuple(expected.shape)} {expected.dtype}",
    )
    _check_same(f"computes something else in {mode} mode", got, expected)
    _check_same("writes into its input", theirs, x)
    for (key, a), b in zip(probe.named_buffers(), truth.buffers(), strict=True):
        _check_same(f"updates {key} differently in {mode} mode", a, b)
    if mode == "training":  # half of the time goes into the gradients, once is enough
        _compare_gradients((got, theirs, probe), (expected, mine, truth), generator)


def _compare_gradients(
    probed: tuple[Tensor, Tensor, nn.Module],
    true: tuple[Tensor, Tensor, nn.Module],
    generator: torch.Generator,
) -> None:
    """Each argument: the output, the input and the module between them."""
    weight = torch.randn(true[0].shape, generator=generator, dtype=torch.float64, device="cpu")
    gradients = []
    for out, x, module in (probed, true):
        inputs = [x, *module.parameters()]
        try:
            gradients.append(torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True))
        except RuntimeError as error:
            raise _Refused(f"its forward cannot be differentiated: {error}") from error
    names = ["x", *(name for name, _ in probed[2].named_parameters())]
    for key, got, expected in zip(names, *gradients, strict=True):
        assert expected is not None
        got = torch.zeros_like(expected) if got is None else got
        _check_same(f"has another gradient of {key}", got, expected)


def _check_same(what: str, got: Tensor, expected: Tensor) -> None:
    got, expected = got.detach().double(), expected.detach().double()
    difference = float((got - expected).abs().max())
    bound = _TOLERANCE * (1.0 + float(expected.abs().max()))
    # Also False for NaN.
    _expect(difference <= bound, f"its forward {what}: max difference {difference:.3g}")


def _randomised_copy(mixer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A float64 copy on the CPU with random weights and statistics, without the mixer's hooks."""
    # What deepcopy shall find instead: new leaves, so that no weight is copied, and no hooks.
    memo: dict[int, object] = {}
    for module in mixer.modules():
        if not module._modules:
            memo[id(module)] = _randomised_leaf(module, generator)
        for name, value in vars(module).items():
            if name.endswith("_hooks") and value:
                memo[id(value)] = type(value)()
    try:
        return copy.deepcopy(mixer, memo)
    except Exception as error:
        raise _Refused(
            f"it cannot be copied to check its forward: {type(error).__name__}: {error}"
        ) from error


def _randomised_leaf(module: nn.Module, generator: torch.Generator) -> nn.Module:
    def normal(shape: torch.Size, scale: float, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return values.mul_(scale).add_(shift)

    if isinstance(module, nn.Dropout) and module.p > 0:
        return _MarkedDropout(module.p)
    leaf = copy.copy(module)
    if isinstance(module, nn.Conv2d):
        fan_in = math.prod(module.weight.shape[1:])
        leaf._parameters = {
            "weight": nn.Parameter(normal(module.weight.shape, fan_in**-0.5)),
            "bias": None if module.bias is None else nn.Parameter(normal(module.bias.shape, 0.5)),
        }
    elif isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        shape = torch.Size([module.num_features])
        # A SyncBatchNorm refuses CPU tensors in training; on one process it is a BatchNorm2d.
        norm = nn.BatchNorm2d(
            module.num_features, module.eps, module.momentum, device="cpu", dtype=torch.float64
        )
        norm._parameters = {
            "weight": nn.Parameter(normal(shape, 0.3, 1.0)),
            "bias": nn.Parameter(normal(shape, 0.5)),
        }
        norm._buffers = {
            "running_mean": normal(shape, 0.5),
            "running_var": normal(shape, 0.3).abs_().add_(0.5),
            "num_batches_tracked": torch.tensor(3, device="cpu"),
        }
        return norm
    return leaf


def _weights(mixer: nn.Module) -> MixerWeights:
    """The mixer's parameters; its norms are called as modules, so their statistics are left out."""
    at = dict(mixer.named_parameters(remove_duplicate=False))
    return unflatten([None if path.endswith(BUFFERS) else at.get(path) for path in PATHS])
