"""Decides whether a module computes the published CATM: by its structure, then by its own forward.

Neither its class nor the names of its children matter: which child is q's gate and which depthwise
convolution comes first is found by trying. May import: torch, structure.py, reference.py.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import reference
from .norms import NORMS, is_frozen
from .structure import (
    Roles,
    described,
    examine,
    is_parametrized,
    norms_of,
    weights_of,
)
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
    except _Refused as refused:
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


class _Refused(Exception):
    pass


def _expect(condition: bool, reason: str) -> None:
    if not condition:
        raise _Refused(reason)


def _match(mixer: nn.Module) -> Match:
    _check_methods(type(mixer))
    _expect("forward" not in vars(mixer), "its forward is replaced on the instance")
    _check_tensors("", mixer, (), ())
    refusals = []
    for roles in _candidates(mixer):
        found = Match(roles, _containers(mixer, roles))
        _check_structure(mixer, found)
        try:
            _check_forward(mixer, found)
        except _Refused as refused:
            refusals.append(refused)
            continue
        return found
    raise refusals[0]


def _candidates(mixer: nn.Module) -> list[Roles]:
    """Which child may play which part, the likeliest first."""
    children = tuple(name for name, child in mixer._modules.items() if child is not None)
    if set(children) & {_PUBLISHED.q, _PUBLISHED.k} or not resembles(mixer):
        same = set(children) == set(_PUBLISHED)
        _expect(same, f"it: expected the children {_names(_PUBLISHED)}, got {_names(children)}")
        return [_PUBLISHED]
    kinds = _by_kind(mixer)
    counts = {"qkv": 1, "gate": 2, "depthwise": 2, "drop": 1, "other": 0}
    for kind, count in counts.items():
        got = kinds[kind]
        _expect(
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
    _expect(difference is None, str(difference))
    for name, module in mixer.named_modules():
        if module is mixer:
            continue
        _expect(
            not is_parametrized(module), f"{name}: expected plain parameters, got parametrized ones"
        )
        frozen = is_frozen(module)
        names = _TENSORS.get(type(module), ((), _FROZEN if frozen else ()))
        _check_tensors(name, module, *names)
        _check_untouched(name, module)
    _check_shapes(mixer, owners)
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
        _expect(not vars(module)[hooks], f"{name}: has {kind}, which would no longer be called")


def _check_tensors(
    name: str, module: nn.Module, parameters: tuple[str, ...], buffers: tuple[str, ...]
) -> None:
    for key, parameter in module._parameters.items():
        _expect(parameter is None or key in parameters, f"{_prefix(name)}has a parameter {key}")
        _expect(
            parameter is None
            or (type(parameter) is nn.Parameter and parameter.is_floating_point()),
            f"{_prefix(name)}expected a plain floating-point parameter {key}, "
            f"got {described(parameter)}",
        )
    for key, buffer in module._buffers.items():
        _expect(buffer is None or key in buffers, f"{_prefix(name)}has a buffer {key}")
        _expect(
            buffer is None or type(buffer) is Tensor,
            f"{_prefix(name)}expected a plain tensor {key}, got {described(buffer)}",
        )
    for key in parameters:
        _expect(key in module._parameters, f"{_prefix(name)}has no parameter {key}")


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
                _expect(
                    got == shape, f"{names[id(owner)]}.{key}: expected shape {shape}, got {got}"
                )


def _prefix(name: str) -> str:
    return f"{name}: " if name else "it: "


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


# Forward -----------------------------------------------------------------------------------------

_TOLERANCE = 1e-9  # of the largest value; float64 sums in another order differ by about 1e-15


class _MarkedDropout(nn.Dropout):
    """Stands for a dropout in the check: deterministic, and its place in the forward is visible."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + 0.1 * x if self.training else x


def _check_forward(mixer: nn.Module, found: Match) -> None:
    owner_names = found.owners(mixer)
    generator = torch.Generator(device="cpu").manual_seed(0)
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
    ):
        probe = _randomised_copy(mixer, generator)
        truth = copy.deepcopy(probe)
        dim: int = mixer.get_submodule(found.roles.qkv).in_channels  # type: ignore[assignment]
        # Odd sides, more than one image; another size in eval mode.
        for mode, shape in (("training", (2, dim, 5, 3)), ("eval", (3, dim, 4, 5))):
            probe.train(mode == "training")
            truth.train(mode == "training")
            x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            _compare(mode, probe, truth, found.roles.drop, owner_names, x, generator)


def _compare(
    mode: str,
    probe: nn.Module,
    truth: nn.Module,
    drop: str,
    owner_names: list[str],
    x: Tensor,
    generator: torch.Generator,
) -> None:
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    owners = tuple(truth.get_submodule(name) for name in owner_names)
    dropout = truth.get_submodule(drop)
    expected = dropout(reference.catm(mine, weights_of(owners), *norms_of(owners)))
    try:
        got = probe.forward(theirs)  # not probe(...): no hook shall see it
    except Exception as error:
        raise _Refused(f"its forward raises {type(error).__name__}: {error}") from error
    _expect(isinstance(got, Tensor), f"its forward returns {described(got)}, expected a tensor")
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
    elif isinstance(module, NORMS):
        shape = torch.Size([module.num_features])
        # A SyncBatchNorm refuses CPU tensors in training; on one process it is a BatchNorm2d.
        norm = nn.BatchNorm2d(
            module.num_features,
            module.eps,
            module.momentum,
            module.weight is not None,
            module.running_mean is not None,
            device="cpu",
            dtype=torch.float64,
        )
        norm.track_running_stats = module.track_running_stats
        if module.weight is not None:
            norm.weight = nn.Parameter(normal(shape, 0.3, 1.0))
        norm._parameters["bias"] = None if module.bias is None else nn.Parameter(normal(shape, 0.5))
        if module.running_mean is not None:
            norm._buffers = {
                "running_mean": normal(shape, 0.5),
                "running_var": normal(shape, 0.3).abs_().add_(0.5),
                "num_batches_tracked": torch.tensor(3, device="cpu"),
            }
        return norm
    elif is_frozen(module):
        shape = module.get_buffer("weight").shape
        leaf._buffers = {
            "weight": normal(shape, 0.3, 1.0),
            "bias": normal(shape, 0.5),
            "running_mean": normal(shape, 0.5),
            "running_var": normal(shape, 0.3).abs_().add_(0.5),
        }
    return leaf
