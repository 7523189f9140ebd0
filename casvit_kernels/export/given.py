"""Holds the copy that is exported to the model that was given.

An export works on a copy whose mixers compute the plain formulas, and a file is compared with that
copy in float64. That says nothing where the copy is another function than the model: a subclass of
`FusedCATM` with a forward of its own, a hook that runs in one of the two only, a child that was
replaced. So the model itself, in eval mode, must give the outputs of the copy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..module import FusedCATM, UnfusedWarning
from ..testing.numerics import AgainstTruth, against_truth, without_tf32
from .report import ExportError

# Model and copy are one function in float32, with sums in another order. Allowed are ten times the error
# that the copy itself makes in float32, or about a hundred roundings of the largest output.
FACTOR, FLOOR = 10.0, 1e-5


def use_reference(model: nn.Module) -> None:
    """Let every fused mixer compute the plain formulas, whatever its backend."""
    for m in model.modules():
        if isinstance(m, FusedCATM):
            m.backend = "reference"


class Given:
    """A float32 copy of the caller's model in eval mode.

    On the model's device and with its kernels; on the CPU in plain PyTorch where these cannot run here
    (a backend of another machine). Nothing is replaced in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.model.eval()  # not chained: overridden in published code, it returns None
        self.model.float()
        self.note: str | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Its outputs, flat and on the CPU, for a float32 input as the model takes it.

        Raises:
            ExportError: it cannot compute the input.
        """
        try:
            return self._run(x)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        try:
            use_reference(self.model.cpu())
            outputs = self._run(x)
        except Exception as error:
            raise ExportError(
                f"the model given cannot compute an input of shape {tuple(x.shape)}, a copy with "
                f"plain mixers can: {type(error).__name__}: {error}"
            ) from error
        self.note = (
            f"compared with the model in plain PyTorch, its kernels cannot run here: {reason}"
        )
        return outputs

    def _run(self, x: Tensor) -> tuple[Tensor, ...]:
        first = next((t for t in (*self.model.parameters(), *self.model.buffers())), x)
        kind = first.device.type
        with (
            torch.no_grad(),
            without_tf32(kind),
            torch.autocast(kind, enabled=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", UnfusedWarning)  # speed does not matter here
            leaves = _pytree.tree_leaves(self.model(x.to(first.device)))
        return tuple(leaf.cpu() for leaf in leaves if isinstance(leaf, Tensor))

    def hold(
        self,
        plain: nn.Module,
        x: Tensor,
        own: Sequence[Tensor],
        truth: Sequence[Tensor],
        names: Sequence[str],
    ) -> None:
        """Compare with the plain copy.

        Args:
            plain: the copy in float32.
            x: input of both.
            own, truth: outputs of the copy in float32 and in float64.
            names: of the outputs.

        Raises:
            ExportError: the copy computes something else; names the output and the mixer.
        """
        outputs = self(x)
        if len(outputs) != len(truth):
            raise ExportError(
                f"{self._blame(plain, x)} computes {len(outputs)} tensors, its copy with plain mixers "
                f"{len(truth)}"
            )
        for name, got, copied, expected in zip(names, outputs, own, truth, strict=True):
            if got.shape != expected.shape:
                raise ExportError(
                    f"{name}: {self._blame(plain, x)} computes shape {tuple(got.shape)}, its copy with "
                    f"plain mixers {tuple(expected.shape)}"
                )
            found = _finite_part(got, copied, expected)
            if found is not None and not found.largest <= found.bound(FACTOR, FLOOR):
                raise ExportError(
                    f"{name}: {self._blame(plain, x)} computes something else than its copy with plain "
                    f"mixers, which would be exported: they differ by {found.largest:.3g}, expected at "
                    f"most {found.bound(FACTOR, FLOOR):.3g}. Is its forward overridden, or are there "
                    "hooks that a fused mixer does not run?"
                )

    def _blame(self, plain: nn.Module, x: Tensor) -> str:
        """The first fused mixer that differs from its counterpart, for the same input."""
        inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def keep(name: str) -> Any:
            return lambda m, args, kwargs: inputs.setdefault(name, (args, kwargs)) and None

        mixers = {n: m for n, m in self.model.named_modules() if isinstance(m, FusedCATM)}
        handles = [
            m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in mixers.items()
        ]
        try:
            self._run(x)
        finally:
            for handle in handles:
                handle.remove()
        for name, (args, kwargs) in inputs.items():
            try:
                with torch.no_grad():
                    got = mixers[name](*args, **kwargs).cpu()
                    moved = _pytree.tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
                    copied = plain.get_submodule(name)(*moved[0], **moved[1])
                same = bool((got - copied).abs().max() <= FLOOR * copied.abs().max())
            except Exception:
                same = False
            if not same:
                return f"{name or 'the model'} ({type(mixers[name]).__name__})"
        return "the model"


def _finite_part(got: Tensor, own: Tensor, truth: Tensor) -> AgainstTruth | None:
    """Errors where plain PyTorch itself is finite; None where nothing is."""
    known = truth.isfinite() & own.isfinite()
    if not bool(known.any()):
        return None
    return against_truth(got[known], own[known], truth[known])
