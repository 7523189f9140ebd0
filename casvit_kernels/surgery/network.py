"""`fuse_network`: a whole CAS-ViT in one call on the CPU, and the model itself for all else."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from ..module import FusedCATM, UnfusedWarning
from ..ops.network import dispatch, schema
from ..ops.network.fold import Normalize
from ..ops.network.kernels import (
    MOST_CHANNELS,
    MOST_HIDDEN,
    MOST_SIDE,
    MOST_STAGES,
    NetworkKernels,
)
from ..ops.network.packed import Entry, Found, Memory, PackedNetwork, Reading
from ..ops.network.plan import Plan
from ..ops.network.structure import in_training
from ..ops.tracing import exporting
from .find import check_plain, find
from .reading import NetworkUnsupported
from .stand_in import StandIn, hooks_of_its_own

__all__ = ["FusedNetwork", "NetworkUnsupported", "fuse_network"]

_LEAST = 32  # pixels of height and width
_KEPT = ("_model", "_precision", "_normalize", "_shape", "_channels")  # by copies and pickles
_HOOKED = "has hooks, which run only where it is called"


def fuse_network(
    model: nn.Module,
    *,
    precision: str = "fp32",
    example_input: Tensor | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> FusedNetwork:
    """The model as one call of the CPU's kernels for inference, and the model itself for all else.

    Takes a CAS-ViT whatever its classes and names: the networks of `casvit_kernels.models`, the
    published code, birder's; plain, fused by `fuse` or folded by `fold_for_inference`; with any number
    of input channels, classes, blocks and stages; classifier, features or dense backbone. What it
    computes is read from a recorded forward of a float64 copy and proved: the kernels' formula must
    give the copy's outputs at two sizes.

    Args:
        model: in eval mode. It stays as it is and shares its parameters; see `FusedNetwork`.
        precision: ``"fp32"``, or ``"bf16"``: operands of the matrix products in bfloat16, sums,
            activations' arithmetic and outputs in float32. Needs AVX-512 bf16 or AMX.
        example_input: ``(B, C, H, W)``, any values, for a model that cannot compute two images of
            64x96 pixels.
        normalize: mean and standard deviation of each channel of images in [0, 1], as torchvision's
            Normalize takes them. The network then takes float images in [0, 1], or uint8 of 0 to 255,
            and normalises them itself.

    Raises:
        TypeError: ``model`` is no module, ``example_input`` no floating tensor, ``normalize`` no pair.
        NetworkUnsupported: (a ValueError) the model computes something else; names layer and reason.
        ValueError: the model is in training mode, or an argument is out of range (named).
        BackendUnavailable: the CPU has no instructions for ``precision``; names those it has.
    """
    if isinstance(model, FusedNetwork):
        model = model.original()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    precision = dispatch.check_precision(precision)
    check_plain(model)
    shape = _example_shape(example_input)
    training = in_training(model)
    if training is not None:
        where = f" ({training} is in training mode)" if training else ""
        raise ValueError(
            f"model: expected a model in eval mode, got one in training{where}: call model.eval() first"
        )
    normalized = None if normalize is None else _checked(normalize)
    return FusedNetwork(model, precision, normalized, shape)


class FusedNetwork(StandIn):
    """A CAS-ViT network that runs in one call on the CPU; made by `fuse_network`.

    It stands for the model it was made of: same parameters, submodules and state-dict keys (they are
    the model's own, not copies), same attributes and methods; `train`, `to`, `load_state_dict` act on
    the model. `original`, or `casvit_kernels.unfuse`, gives the model back.

    Input: ``(B, C, H, W)`` of at least 32x32, float32 in any strides; with ``normalize`` float32 in
    [0, 1] or uint8; images of more than 16384 rows or columns are the model's. Output: what the model
    returns; maps in the layout of the input (contiguous or channels last). Served by the kernels are
    calls on the CPU in eval mode without gradient (under ``torch.no_grad`` or ``torch.inference_mode``,
    or with no input or parameter that requires one) and without autocast. Everything else the model
    computes as it was: training, gradients, other devices and dtypes, `torch.func`, exports, and calls
    while somebody hooks a module inside. `casvit_kernels.use_backend` chooses: ``"reference"`` is the
    model.

    **It computes what its model says.** Each call looks at the modules, their settings and tensors: a
    write to a parameter or to running statistics, a tensor or module put in the place of another, a
    move, all are seen, and weights are folded anew. Where the model has become something else than
    kernels compute, it runs itself and warns once with `UnfusedWarning`. A write through ``.data`` is
    invisible to PyTorch's version counters: call `refresh` after it.

    Under `torch.compile` it is one operator without graph breaks, where gradients are off while
    compiling; with them the compiler follows the model. Copies and pickles hold the model and leave
    packed weights and scratch memory out. Calls from several threads are safe.
    """

    OWN = frozenset(
        ("_precision", "_normalize", "_shape", "_channels", "_packed", "_handle", "_warned")
    )
    _precision: str
    _normalize: Normalize | None
    _channels: int
    _packed: PackedNetwork
    _handle: int
    _warned: frozenset[str]

    def __init__(
        self,
        model: nn.Module,
        precision: str,
        normalize: Normalize | None,
        shape: tuple[int, ...] | None,
    ) -> None:
        super().__init__(model)
        self._prepare(precision, normalize, shape)
        self._packed.read()
        self._channels = self._packed.known.plan.in_chans

    def _prepare(
        self, precision: str, normalize: Normalize | None, shape: tuple[int, ...] | None
    ) -> None:
        read = functools.partial(_find, shape=shape)
        self._precision, self._normalize, self._shape = precision, normalize, shape
        self._packed = PackedNetwork(self._model, read, (FusedCATM,), precision, normalize)
        self._warned = frozenset()
        self._handle = schema.enter(self)

    # Calls ---------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Any:
        """See the class.

        Raises:
            TypeError: ``x`` is no tensor, or of no floating dtype (uint8 only with ``normalize``).
            ValueError: ``x`` has not 4 dimensions, other channels than the model, or fewer than 32
                rows or columns.
            BackendUnavailable: the backend that was asked for has no kernels for networks, or the CPU,
                where the network was unpickled, none for its precision.
        """
        if isinstance(x, fx.Proxy) or exporting():
            return self._traced(x)
        if torch.compiler.is_compiling():
            return self._compiled(x)
        if self._model.training:
            return self._plain(x)
        self._check(x)
        served = self._served(x)
        return self._plain(x) if served is None else _handed_out(*served)

    def _served(self, x: Tensor) -> tuple[Found, list[Tensor]] | None:
        """The outputs in the order of the plan by kernels, or None where the model computes."""
        if x.dtype != torch.float32 and x.dtype != torch.uint8:
            return None
        if x.shape[2] > MOST_SIDE or x.shape[3] > MOST_SIDE:
            return None
        grad = torch.is_grad_enabled()
        if (grad and x.requires_grad) or not dispatch.plain_call(x):
            return None
        kernels = dispatch.chosen()
        if kernels is None:
            return None
        ready = self._ready(kernels)
        if ready is None:
            return None
        reading, found, entry = ready
        if entry.packed is None or (grad and entry.needs_grad()):
            return None
        outs = schema.outputs_like(x, found.plan)
        if x.shape[0]:
            threads = dispatch.thread_count()
            self._packed.infer(kernels, x, reading, entry.packed, threads, outs)
        return found, outs

    def _ready(self, kernels: NetworkKernels) -> tuple[Reading, Found, Entry] | None:
        """What the model is now and its packed weights, or None where it computes itself."""
        while True:
            reading = self._packed.look()
            found, watch = reading.found, reading.watch
            if found is None:
                self._warn_once(reading.refusal)
                return None
            if watch.training():
                return None
            if watch.hooked():
                self._warn_once(f"{watch.hooked_module() or 'the model'}: {_HOOKED}")
                return None
            if reading.entry is None:  # a pickle may come from a CPU that can
                dispatch.check_precision(self._precision)
            entry = self._packed.entry(reading, kernels)
            if entry is not None:
                return reading, found, entry

    def _plain(self, x: Tensor) -> Any:
        """The model itself."""
        return self._model(self._normalized(x))

    def _traced(self, x: Any) -> Any:
        """The model's operations in a graph that somebody records; it is no submodule to be named."""
        return self._model.forward(self._normalized(x))

    def _normalized(self, x: Any) -> Any:
        if self._normalize is None:
            return x
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            x = x.to(next(self._model.parameters()).dtype) / 255
        mean, std = (x.new_tensor(each).view(1, -1, 1, 1) for each in self._normalize)
        return (x - mean) / std

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"x: expected 4 dimensions (B, C, H, W), got shape {tuple(x.shape)}")
        if not x.dtype.is_floating_point and not (
            x.dtype == torch.uint8 and self._normalize is not None
        ):
            also = " or uint8" if self._normalize is not None else ""
            hint = (
                " (fuse_network(..., normalize=(mean, std)) makes it take images of uint8)"
                if x.dtype == torch.uint8
                else ""
            )
            raise TypeError(f"x: expected a floating dtype{also}, got {x.dtype}{hint}")
        if x.shape[1] != self._channels:
            found = self._packed.look().found  # it may take others by now
            self._channels = self._channels if found is None else found.plan.in_chans
        if x.shape[1] != self._channels:
            raise ValueError(
                f"x: expected {self._channels} channels (in_chans) in dimension 1, "
                f"got {x.shape[1]} in shape {tuple(x.shape)}"
            )
        if x.shape[2] < _LEAST or x.shape[3] < _LEAST:
            raise ValueError(
                f"x: expected H >= {_LEAST} and W >= {_LEAST}, got {x.shape[2]}x{x.shape[3]} "
                f"in shape {tuple(x.shape)}"
            )

    # Compilers -----------------------------------------------------------------------------------

    def _compiled(self, x: Tensor) -> Any:
        """One operator where no gradient can be asked for; else the compiler follows the model."""
        if (
            self._model.training
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or x.device.type != "cpu"
            or x.dtype not in (torch.float32, torch.uint8)
            or not _serves(self)
        ):
            return self._plain(x)
        self._check(x)
        outs = torch.ops.casvit_kernels.network(x, self._handle)
        return _handed_out(self._packed.known, outs)

    def compute(self, x: Tensor) -> list[Tensor]:
        """The outputs in the order of the plan: what the operator of compiled code calls.

        Raises:
            RuntimeError: the model returns another number of tensors than when it was compiled.
        """
        with torch.no_grad():
            served = self._served(x)
            if served is not None:
                return served[1]
            order = self._packed.known.order
            leaves = _pytree.tree_leaves(self._plain(x))
        if len(leaves) != len(order):
            raise RuntimeError(
                f"the model returns {len(leaves)} tensors now, and {len(order)} when it was compiled: "
                "call torch.compiler.reset()"
            )
        return [leaves[order.index(place)] for place in range(max(order) + 1)]

    def current_plan(self) -> Plan:
        """What kernels compute; see `casvit_kernels.ops.network.plan`."""
        return self._packed.known.plan

    # Its state -----------------------------------------------------------------------------------

    @property
    def precision(self) -> str:
        """``"fp32"`` or ``"bf16"``."""
        return self._precision

    @property
    def normalize(self) -> Normalize | None:
        """Mean and standard deviation by channel, or None."""
        return self._normalize

    @property
    def memory(self) -> Memory:
        """Bytes it holds beside the model's parameters."""
        return self._packed.memory()

    def refresh(self) -> None:
        """Fold and pack the weights anew in the next call, for writes through ``.data``."""
        self._packed.forget()

    def why_original(self) -> str | None:
        """Why `casvit_kernels.unfuse` leaves it in a larger model, or None."""
        return None if self._normalize is None else "it normalises its input, the model does not"

    def extra_repr(self) -> str:
        parts = [
            f"{type(self._model).__name__} in one call on the CPU",
            f"precision={self._precision!r}",
        ]
        if self._normalize is not None:
            parts.append(f"normalize={self._normalize!r}")
        return ", ".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights and scratch memory are derived from the parameters, and this machine's.
        return {key: vars(self)[key] for key in (*_KEPT, *hooks_of_its_own())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._stand_for(state["_model"])
        self._prepare(self._precision, self._normalize, self._shape)

    def _warn_once(self, reason: str | None) -> None:
        if reason is not None and reason not in self._warned:
            self._warned = self._warned | {reason}
            warnings.warn(
                f"a fused network runs its model, unfused: {reason}. It is right and slower; to run "
                "fused, undo the change",
                UnfusedWarning,
                stacklevel=5,
            )


def _find(model: nn.Module, shape: tuple[int, ...] | None) -> Found:
    found = find(model, shape)
    for weight, what, most, got in _sizes(found):
        if got > most:
            layer = weight.removesuffix(".weight")
            raise NetworkUnsupported(layer, f"expected at most {most} {what}, got {got}")
    return found


def _sizes(found: Found) -> Iterator[tuple[str, str, int, int]]:
    """Of each layer its weight, what is counted of it, the most that kernels take, and its own."""
    plan, (first, second) = found.plan, found.sources.stem
    yield first.weight, "input channels", MOST_CHANNELS, plan.in_chans
    yield first.weight, "channels", MOST_CHANNELS, plan.stem
    for stage, sources in zip(plan.stages, found.sources.stages, strict=True):
        layer = sources.embedding or second
        yield layer.weight, "channels", MOST_CHANNELS, stage.channels
        for block, hidden in zip(sources.blocks, stage.hidden, strict=True):
            yield block.fc1.weight, "channels", MOST_HIDDEN, hidden
    yield layer.weight, "stages", MOST_STAGES, len(plan.stages)


def _handed_out(found: Found, outs: list[Tensor]) -> Any:
    """The outputs as the model returns them."""
    if found.bare:
        return outs[found.order[0]]
    return _pytree.tree_unflatten([outs[place] for place in found.order], found.spec)


def _serves(network: FusedNetwork) -> bool:
    """Whether a compiler may put the operator in the place of the model."""
    reading = network._packed.look()
    if reading.found is None:
        network._warn_once(reading.refusal)
        return False
    return (
        not reading.watch.hooked()
        and not reading.watch.training()
        and dispatch.chosen() is not None
    )


# A compiled function keeps the choice; the operator itself asks again in each call.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _example_shape(example: Any) -> tuple[int, ...] | None:
    if example is None:
        return None
    if not isinstance(example, Tensor) or not example.dtype.is_floating_point:
        got = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"example_input: expected a floating tensor (B, C, H, W), got {got}")
    if example.dim() != 4 or example.numel() == 0:
        raise ValueError(
            f"example_input: expected a shape (B, C, H, W) with values, got {tuple(example.shape)}"
        )
    return tuple(example.shape)


def _checked(normalize: Any) -> Normalize:
    """Pairs of floats."""
    try:
        mean, std = (tuple(float(value) for value in each) for each in normalize)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"normalize: expected two sequences of floats (mean, std), got {normalize!r:.80}"
        ) from error
    if len(mean) != len(std):
        raise ValueError(
            f"normalize: expected as many means as deviations, got {len(mean)} and {len(std)}"
        )
    if not all(map(math.isfinite, (*mean, *std))) or any(value <= 0 for value in std):
        raise ValueError(
            f"normalize: expected finite means and deviations above 0, got {mean} and {std}"
        )
    if any(abs(value) > 1 for value in mean):
        raise ValueError(
            f"normalize: expected means of images in [0, 1], got {mean}: divide those of 0 to 255 by 255"
        )
    return mean, std
