"""Finds the network in a model: records a forward of a copy, reads it, and proves what was read.

May import: fold.py, recording.py, graph.py, reading.py, ops/network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..ops.mixer.norms import eps_of, is_frozen
from ..ops.mixer.structure import is_parametrized
from ..ops.network import reference
from ..ops.network.fold import flat
from ..ops.network.packed import Found
from .fold import plain_copy
from .graph import Graph
from .reading import NetworkUnsupported, read
from .recording import SAME, Recording
from .stand_in import StandIn

_PROBE = (2, 64, 96)  # images, height, width
_MORE = (13, 5)  # rows and columns of the second input: nothing shall fit by chance


def find(model: nn.Module, shape: tuple[int, ...] | None = None) -> Found:
    """The network that ``model`` computes in eval mode.

    Neither the model nor a random number generator is touched.

    Args:
        model: on any device, of any floating dtype.
        shape: of an input the model takes, who shall take larger ones, too; None: two images of
            64x96 with as many channels as the first Conv2d has.

    Raises:
        NetworkUnsupported: it is no network that kernels compute, with the layer and the reason.
    """
    check_plain(model)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            probe = plain_copy(model)
        except Exception as error:
            raise NetworkUnsupported(
                "", f"it cannot be copied to see what it computes: {type(error).__name__}: {error}"
            ) from error
        scopes = _prepare(probe)
        if shape is None:
            shape = (_PROBE[0], _channels(probe), *_PROBE[1:])
        images, channels, height, width = shape
        images = min(images, 2)
        generator = torch.Generator(device="cpu").manual_seed(0)
        _randomise(probe, generator)
        first = _record(probe, (images, channels, height, width), scopes, generator)
        leaves, spec = _pytree.tree_flatten(first.result)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise NetworkUnsupported("", "it returns something else than tensors")
        found = read(Graph(probe, first), isinstance(first.result, Tensor))
        tensors: dict[str, Tensor] = {
            **dict(probe.named_parameters(remove_duplicate=False)),
            **dict(probe.named_buffers(remove_duplicate=False)),
        }
        weights = flat(found.sources, found.plan, tensors.__getitem__, None)
        _prove(found, weights, first)
        second = (3 - images, channels, height + _MORE[0], width + _MORE[1])
        _prove(found, weights, _record(probe, second, scopes, generator))
    return found._replace(spec=spec)


def check_plain(model: nn.Module) -> None:
    """Raise NetworkUnsupported where a recording could not see what a module computes."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise NetworkUnsupported(name, "is TorchScript: use the module that it was made of")
        if isinstance(module, StandIn):
            raise NetworkUnsupported(name, "is a fused network: use its original()")
        if "_orig_mod" in module._modules:  # torch.compile's
            raise NetworkUnsupported(
                name, "is compiled: use the module below it, and compile the fused network"
            )
        if is_parametrized(module) or "parametrizations" in module._modules:
            raise NetworkUnsupported(
                name,
                "has parametrized weights: remove them first, as "
                "torch.nn.utils.parametrize.remove_parametrizations does",
            )
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                raise NetworkUnsupported(
                    name,
                    f"its {key} is a tensor that is no parameter or buffer, as weight_norm and "
                    "pruning compute it: fold it into the weights first (remove_weight_norm, "
                    "prune.remove)",
                )
        if "forward" in vars(module) or "_conv_forward" in vars(module):
            raise NetworkUnsupported(name, "its forward is replaced on the instance")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_meta:
            raise NetworkUnsupported(name, "is on the meta device: load its values first")
        if t.is_complex() or t.is_quantized:
            raise NetworkUnsupported(name, f"expected a floating dtype, got {t.dtype}")


def _prepare(probe: nn.Module) -> list[str]:
    """Eval mode, float64, nobody's hooks but those that keep the list of paths returned."""
    probe.eval()  # not chained: overridden in published code, it returns None
    probe.double()
    probe.requires_grad_(False)
    for parent in list(probe.modules()):
        for key, child in parent._modules.items():
            if child is not None and is_frozen(child):
                parent._modules[key] = _thawed(child)
    scopes: list[str] = []
    for name, module in probe.named_modules():
        for key, hooks in vars(module).items():
            if key.endswith("_hooks") and hooks:
                vars(module)[key] = type(hooks)()

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            scopes.append(name)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            scopes.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    return scopes


def _thawed(frozen: nn.Module) -> nn.Module:
    """A BatchNorm with the tensors of a frozen one, under the same names."""
    norm = nn.BatchNorm2d(1, eps_of(frozen), dtype=torch.float64).eval()
    norm._buffers = {**frozen._buffers}
    norm._parameters = {}
    return norm


def _channels(model: nn.Module) -> int:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise NetworkUnsupported("", "it has no Conv2d")
    return first.in_channels


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Values that hide nothing: no zeros, no ones, nothing that explodes behind many layers."""

    def normal(t: Tensor, scale: float, shift: float = 0.0) -> None:
        values = torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu")
        t.copy_(values.mul_(scale).add_(shift))

    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, t in named.items():
        if not t.is_floating_point():
            continue
        if t.dim() > 1:
            normal(t, 0.6 * t[0].numel() ** -0.5)  # the mixer is quadratic: it must not grow
        elif name.endswith("var"):
            normal(t, 0.3)
            t.abs_().add_(0.8)
        else:
            normal(t, 0.1, 0.8 if name.endswith("weight") else 0.0)


def _record(
    probe: nn.Module, shape: tuple[int, ...], scopes: list[str], generator: torch.Generator
) -> Recording:
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    scopes.clear()
    try:
        return Recording(probe, x, scopes)
    except Exception as error:
        raise NetworkUnsupported(
            scopes[-1] if scopes else "",
            f"it cannot compute an input of shape {shape} (an example_input gives another): "
            f"{type(error).__name__}: {error}",
        ) from error


def _prove(found: Found, weights: Tensor, recording: Recording) -> None:
    expected = reference.compute(recording.x, weights, found.plan)
    for t, place in zip(recording.outputs, found.order, strict=True):
        shape = tuple(recording.x.shape)
        if t.shape != expected[place].shape or not bool(
            (t - expected[place]).abs().max() <= SAME * (1 + t.abs().max())
        ):
            raise NetworkUnsupported(
                "",
                f"its own output for an input of shape {shape} is not that of the layers found in it",
            )
    if len(recording.outputs) != len(found.order):
        raise NetworkUnsupported("", "it returns another number of tensors at another size")
