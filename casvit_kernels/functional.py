"""`catm`: the mixer as a function. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from .ops.mixer import reference
from .ops.mixer.dispatch import check, group_name, train, trains
from .ops.mixer.reference import formula_norm
from .ops.mixer.weights import GateWeights, MixerWeights, check_alike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GateWeights", "MixerWeights", "catm"]

_T = TypeVar("_T")


def catm(
    x: Tensor,
    weights: MixerWeights,
    *,
    eps: tuple[float, float] = (1e-5, 1e-5),
    training: bool | tuple[bool, bool] = False,
    momentum: float | tuple[float, float] = 0.1,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """The convolutional additive token mixer of CAS-ViT (arXiv 2408.03703, section 3.2).

    Args:
        x: ``(B, C, H, W)`` with B >= 0, C, H, W >= 1; float32, bfloat16, float16 or float64; any
            strides.
        weights: `MixerWeights`, on the device of ``x`` and of its dtype (of any floating dtype under
            autocast).
        eps: the BatchNorm epsilon of the q gate and of the k gate.
        training: whether BatchNorm uses the statistics of this batch; a pair says it for the q gate
            and the k gate. The running statistics in ``weights`` may then be None, else they are
            updated in place, as by `torch.nn.functional.batch_norm`.
        momentum: weight of this batch in that update; a pair for the q gate and the k gate.
        process_group: batch statistics are those of all processes of this group together, as by
            `torch.nn.SyncBatchNorm`; None: of this process.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None chooses (see
            `casvit_kernels.use_backend`). Whatever is asked, the reference formulas serve exports,
            `torch.func` transforms, forward-mode AD and tensors without values (meta, fake): only
            they can be followed there. They also serve training on a backend without kernels for it.

    Returns:
        ``(B, C, H, W)`` of the dtype of ``x`` (or of autocast), channels last if ``x`` has its channels
        innermost, else contiguous (where the reference formulas serve: as the convolutions of PyTorch
        lay it out). Differentiable with respect to ``x`` and all weights. Second derivatives
        differentiate the reference formulas; higher ones exist where PyTorch has them (not of batch
        statistics), and with a process group they raise NotImplementedError. For the backward ``x``
        and the weights are kept, and nothing else of the size of ``x``.

    Raises:
        TypeError: ``x`` is no floating tensor, ``training`` or ``momentum`` is not as above, or ``x``
            and the weights differ in dtype (under autocast: one of them is float64, which autocast
            leaves alone, and another is not). BatchNorm's may be float32 beside narrower ones.
        ValueError: a shape, a device or the backend's name does not fit, running statistics are
            missing, there is one value per channel to take statistics of, or the reference formulas
            must serve a call with a process group.
        BackendUnavailable: the backend that was asked for cannot serve this call, with the reason.
    """
    chosen, dtype = check(x, weights, backend)
    check_alike(weights)
    batch = _pair("training", training, bool)
    momenta = _pair("momentum", momentum, (int, float))
    norms = list(map(formula_norm, (weights.q, weights.k), eps, batch, momenta))
    if trains(chosen, batch):
        assert chosen is not None
        group = "" if process_group is None else group_name(process_group)
        return train(chosen, x, weights, eps, batch, momenta, group, dtype)
    if chosen is not None and True not in batch:
        return chosen.project_and_mix(x, weights, eps, None)
    if process_group is not None and True in batch:
        raise ValueError(
            "process_group: expected None where the reference formulas serve, "
            f"which know one process only, got {process_group}"
        )
    return reference.catm(x, weights, *norms)


def _pair(name: str, value: _T | tuple[_T, _T], kind: type | tuple[type, ...]) -> tuple[_T, _T]:
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, kind) for v in pair):
        what = "bool" if kind is bool else "number"
        raise TypeError(f"{name}: expected a {what} or a tuple of two, got {value!r}")
    return pair
