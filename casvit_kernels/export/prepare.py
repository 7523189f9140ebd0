"""`prepare`: checks the arguments and copies the model, once to export and twice to compare with."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .. import photographs
from .._optional import MissingExtra
from .._version import __version__
from ..models.checkpoint import config_of
from ..models.rcvit import CONFIGS
from ..module import UnfusedWarning
from ..surgery.fold import FoldReport, fold_for_inference, plain_copy
from .given import Given, use_reference
from .inputs import Normalization, noise, resized
from .report import UntrainedWeights

UNTRAINED = (
    "the weights look untrained: every BatchNorm has its initial mean of 0 "
    "(was a checkpoint loaded?)"
)


class Flat(nn.Module):
    """A model with one input, called ``input``, and a flat tuple of tensors as its output."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, normalize: Normalization | None = None) -> None:
        super().__init__()
        self.model = model
        self.normalized = normalize is not None
        if normalize is not None:
            tensors = (*model.parameters(), *model.buffers())
            like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
            mean, std = (
                torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
                for values in (normalize.mean, normalize.std)
            )
            self.register_buffer("scale", (1 / (std * normalize.top)).to(like.dtype))
            self.register_buffer("shift", (-mean / std).to(like.dtype))

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        leaves = _pytree.tree_leaves(self.model(self.model_input(input)))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def model_input(self, input: Tensor) -> Tensor:
        """What ``model`` receives."""
        return input * self.scale + self.shift if self.normalized else input


@dataclass(frozen=True)
class Prepared:
    """Copies of the caller's model in eval mode on the CPU, and an input for them.

    All three compute mixers by the plain formulas and normalise their input where asked to.
    """

    exported: Flat  # float32, folded if asked
    plain: Flat  # float32, not folded
    truth: Flat  # float64, not folded
    example: Tensor  # float32
    outputs: tuple[tuple[int, ...], ...]  # shapes for `example`
    output_names: list[str]
    notes: tuple[str, ...]
    metadata: dict[str, str]  # to be written into the file
    normalize: Normalization | None

    def noise(self, *shape: int) -> Tensor:
        """Random float32 input; within the range of pixels where the file normalises."""
        return noise(shape, self.normalize)

    def pictures(self) -> tuple[Tensor | None, str]:
        """Photographs as an input, ``(N, 3, H, W)``, and a note; None and why there are none."""
        if self.example.dim() != 4 or self.example.shape[1] != 3:
            return None, "checked on random input: photographs need 3 channels"
        try:
            found = photographs.load(None)
        except (MissingExtra, ValueError) as error:
            return None, f"checked on random input alone, without photographs: {error}"
        x = resized(found.pixels, self.example.shape[2:], self.normalize)
        return x, f"checked on random input and {len(x)} photographs"


def prepare(
    model: nn.Module,
    input_size: int | tuple[int, int],
    batch: int,
    example_input: Tensor | None,
    *,
    fold: bool = True,
    normalize: Normalization | bool = False,
) -> Prepared:
    """Check the arguments, copy the model, and hold the copy to the model.

    Warns `UntrainedWeights` where every BatchNorm has its initial statistics.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model cannot compute such an input.
        ExportError: the copy with plain mixers computes something else than the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors):
        raise ValueError("model: expected parameters with values, got some on the meta device")
    inside = (Normalization() if normalize else None) if isinstance(normalize, bool) else normalize
    if not isinstance(inside, Normalization | None):
        raise TypeError(f"normalize: expected a bool or a Normalization, got {normalize!r}")
    example = _example(model, input_size, batch, example_input, inside)
    if inside is not None and (example.dim() != 4 or example.shape[1] != len(inside.mean)):
        raise ValueError(
            f"normalize: expected {len(inside.mean)} channels in dimension 1 of the input, "
            f"got shape {tuple(example.shape)}"
        )
    notes = _remarks(model)

    source = plain_copy(model)
    source.eval()  # not chained: overridden in published code, it returns None
    source.requires_grad_(False)
    use_reference(source)  # where a fused mixer stayed: float64 and every tracer take the formulas
    plain = Flat(copy.deepcopy(source).float(), inside)
    truth = Flat(copy.deepcopy(source).double(), inside)
    try:
        with strides_fit(truth), torch.no_grad():
            outputs = truth(example.double())
    except _TooSmall as error:
        raise ValueError(
            f"input_size: {tuple(example.shape[2:])} is too small for this model: {error}"
        ) from None
    except Exception as error:
        raise ValueError(
            f"input_size: the model cannot compute an input of shape {tuple(example.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not outputs:
        raise ValueError("model: expected an output with at least one tensor, got none")
    names = _output_names(model, len(outputs))
    given = Given(model)
    with torch.no_grad():
        own, x = plain(example), plain.model_input(example)
    given.hold(plain.model, x, own, outputs, names)
    if given.note is not None:
        notes.append(given.note)
    exported = source.float()
    if fold:
        exported = _folded(exported, example)
        report: FoldReport = vars(exported)["fold_report"]
        notes += [f"{len(report.folded)} norms folded, {len(report.left)} left as they are"]
    return Prepared(
        Flat(exported, inside),
        plain,
        truth,
        example,
        tuple(tuple(out.shape) for out in outputs),
        names,
        tuple(notes),
        _metadata(model, outputs, inside),
        inside,
    )


def _folded(model: nn.Module, example: Tensor) -> nn.Module:
    """Folded with the default probe, whose maps have more than one pixel; else with the example."""
    try:
        return fold_for_inference(model)
    except ValueError:  # the model takes its own size alone
        return fold_for_inference(model, example)


def _remarks(model: nn.Module) -> list[str]:
    notes = []
    tensors = [*model.parameters(), *model.buffers()]
    if any(m.training for m in model.modules()):
        notes.append("exported in eval mode; the model itself was left in training mode")
    dtypes = {t.dtype for t in tensors if t.is_floating_point()} - {torch.float32}
    if dtypes:
        names = ", ".join(sorted(str(d) for d in dtypes))
        notes.append(f"exported from a float32 copy; the model has parameters in {names}")
    devices = {t.device.type for t in tensors} - {"cpu"}
    if devices:
        notes.append(f"exported from a copy on the CPU; the model is on {', '.join(devices)}")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    means = [m.running_mean for m in norms if m.running_mean is not None]
    # Not the variances: an identity that folding leaves in place has mean 0, too, but no weight.
    if means and any(m.affine for m in norms) and not any(bool(t.any()) for t in means):
        notes.append(UNTRAINED)
        warnings.warn(UNTRAINED, UntrainedWeights, stacklevel=4)
    return notes


def _output_names(model: nn.Module, count: int) -> list[str]:
    if count == 1:
        return ["output"]
    if getattr(model, "fork_feat", False):  # a dense backbone, the published one too
        stages = getattr(model, "out_indices", range(count))
        return [f"stage{i + 1}" for i in stages]
    body = getattr(model, "body", None)
    if isinstance(getattr(model, "fpn", None), nn.Module) and getattr(body, "fork_feat", False):
        finest = 2 + min(getattr(body, "out_indices", (0,)))  # `Pyramid`: level n has stride 2^n
        return [f"p{finest + i}" for i in range(count)]
    return [f"output{i}" for i in range(count)]


def _metadata(
    model: nn.Module, outputs: tuple[Tensor, ...], normalize: Normalization | None
) -> dict[str, str]:
    if normalize is not None:
        expects = f"0 to {normalize.top:g}; normalised inside"
    else:
        expects = "normalised by the caller, as in training"
    config = config_of(model.state_dict())
    name = next((name for name, known in CONFIGS.items() if known == config), None)
    metadata = {"model": name or type(model).__name__, "input range": expects}
    if config is not None:
        metadata["layers"], metadata["channels"] = (", ".join(map(str, n)) for n in config)
    if normalize is not None:
        metadata["mean"], metadata["std"] = (
            ", ".join(f"{value:g}" for value in values)
            for values in (normalize.mean, normalize.std)
        )
    if len(outputs) == 1 and outputs[0].dim() == 2:
        metadata["classes"] = str(outputs[0].shape[1])
    return {**metadata, "casvit_kernels": __version__, "torch": torch.__version__}


class _TooSmall(Exception):
    """An input with fewer pixels than the model's strides need."""


@contextlib.contextmanager
def strides_fit(model: nn.Module) -> Iterator[None]:
    """Inside, a convolution raises `_TooSmall` if its stride is larger than its input.

    PyTorch would compute it, mostly from padding: five strides of 2 need more than 16 pixels.
    """

    def check(conv: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not arguments:  # called by keyword
            return
        stride, size = conv.stride, tuple(arguments[0].shape[-2:])
        if any(s > n for s, n in zip(stride, size, strict=True)):  # type: ignore[arg-type]
            strided = sum(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in model.modules())
            raise _TooSmall(
                f"of its {strided} convolutions with stride, one gets a map of {size} pixels"
            )

    handles = [
        m.register_forward_pre_hook(check) for m in model.modules() if isinstance(m, nn.Conv2d)
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfusedWarning)  # of these hooks
            yield
    finally:
        for handle in handles:
            handle.remove()


def _example(
    model: nn.Module,
    input_size: int | tuple[int, int],
    batch: int,
    example_input: Tensor | None,
    normalize: Normalization | None,
) -> Tensor:
    if example_input is not None:
        if not isinstance(example_input, Tensor) or not example_input.dtype.is_floating_point:
            raise TypeError(f"example_input: expected a floating tensor, got {example_input!r:.60}")
        if example_input.dim() == 0 or example_input.numel() == 0:
            raise ValueError(
                "example_input: expected at least one element and a batch dimension, "
                f"got shape {tuple(example_input.shape)}"
            )
        return example_input.detach().cpu().float().contiguous()
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(map(_is_positive, size))):
        raise ValueError(
            f"input_size: expected a positive integer or a pair (H, W), got {input_size!r}"
        )
    if not _is_positive(batch):
        raise ValueError(f"batch: expected a positive integer, got {batch!r}")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(
            "model: expected a Conv2d to read the number of input channels from, got none: "
            "pass example_input"
        )
    return noise((batch, first.in_channels, *size), normalize)


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
