"""Whether a module's own forward computes the CATM: outputs, statistics and gradients, in float64.

Runs a copy with random weights and without hooks beside the formulas. May import: torch, structure.py,
norms.py, reference.py.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from . import reference
from .norms import NORMS, is_frozen
from .structure import Roles, described, norms_of, weights_of


class Refused(Exception):
    """Why a module is not taken for the published CATM."""


def expect(condition: bool, reason: str) -> None:
    if not condition:
        raise Refused(reason)


_TOLERANCE = 1e-9  # of the largest value; float64 sums in another order differ by about 1e-15


class _MarkedDropout(nn.Dropout):
    """Stands for a dropout in the check: deterministic, and its place in the forward is visible."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + 0.1 * x if self.training else x


def check_forward(mixer: nn.Module, roles: Roles, owner_names: list[str]) -> None:
    """Raise Refused, with the difference, unless the forward is the CATM of its children.

    Args:
        mixer: has the structure of a mixer already.
        roles: which child plays which part.
        owner_names: paths of the modules that own weights, in the order of `weights.OWNERS`.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
    ):
        probe = _randomised_copy(mixer, generator)
        truth = copy.deepcopy(probe)
        dim: int = mixer.get_submodule(roles.qkv).in_channels  # type: ignore[assignment]
        # Odd sides, more than one image; another size in eval mode.
        for mode, shape in (("training", (2, dim, 5, 3)), ("eval", (3, dim, 4, 5))):
            probe.train(mode == "training")
            truth.train(mode == "training")
            x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            _compare(mode, probe, truth, roles.drop, owner_names, x, generator)


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
        raise Refused(f"its forward raises {type(error).__name__}: {error}") from error
    expect(isinstance(got, Tensor), f"its forward returns {described(got)}, expected a tensor")
    expect(
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
            raise Refused(f"its forward cannot be differentiated: {error}") from error
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
    expect(difference <= bound, f"its forward {what}: max difference {difference:.3g}")


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
        raise Refused(
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
