"""`FusedCATM`: parameters, mode and the cache of packed weights; no arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import reference, shortcut
from .backends import check_name
from .backends.cpu import infer
from .functional import GateWeights, MixerWeights, check, group_name, train, trains
from .packing import PackedWeights
from .reference import AdditiveTokenMixer
from .weights import check_alike


class FusedCATM(AdditiveTokenMixer):
    """Drop-in replacement of the CAS-ViT token mixer, fused where a backend can.

    Same constructor, state-dict keys, parameter order and initialisation as the published mixer;
    BatchNorm stays a real ``nn.BatchNorm2d`` submodule (``oper_q[0].block[1]``, ``oper_k[0].block[1]``).
    Source: arXiv 2408.03703, section 3.2.

    Args:
        dim: channels C, at least 1.
        attn_bias: whether the qkv projection has a bias.
        proj_drop: dropout probability after the output projection.
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or None to choose per call (see
            `casvit_kernels.use_backend`).

    Input and output: ``(B, C, H, W)``, float32, bfloat16, float16 or float64, any strides; the output
    keeps the input's layout (contiguous or channels last). Both norms may be frozen (eval in a training
    mixer), one alone too, and both may be ``nn.SyncBatchNorm``, on CPU tensors as well. For the
    backward the input is kept and nothing else of its size. The backend ``"reference"``, and
    float64, run plain PyTorch with autograd.

    The packed weights are renewed when a parameter or buffer is written, replaced or moved. A write
    through ``.data`` is invisible to PyTorch's version counters: call `refresh` after it. (On the CPU a
    fingerprint of the values recognises it, but may miss single elements of a 1x1 convolution.)

    A forward or backward hook on a child that has weights (``torch.nn.utils.prune`` adds one) makes
    the call run the children one by one, unfused, whatever the backend. Hooks on the other children
    (containers, activations, the dropout in eval) do not run.

    Raises:
        ValueError: a constructor argument is out of range (named in the message).
    """

    def __init__(
        self,
        dim: int = 512,
        attn_bias: bool = False,
        proj_drop: float = 0.0,
        *,
        backend: str | None = None,
    ) -> None:
        check_name(backend, "backend")
        super().__init__(dim, attn_bias, proj_drop)
        self.backend = backend
        self._packed = PackedWeights()

    @classmethod
    def from_mixer(cls, mixer: nn.Module, *, backend: str | None = None) -> FusedCATM:
        """A FusedCATM that shares the submodules (so the parameters) of an existing mixer.

        Args:
            mixer: any module with the published structure; see `casvit_kernels.swap.refusal`.

        Raises:
            ValueError: the module does not compute the published mixer, with the reason.
        """
        from .swap import refusal, share  # swap builds on this module

        check_name(backend, "backend")
        reason = refusal(mixer)
        if reason is not None:
            raise ValueError(f"mixer: expected the published CATM, got one where {reason}")
        return share(cls, mixer, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H, W)``; raises as `casvit_kernels.catm` does."""
        children = self._modules
        q, k = _gate(children["oper_q"]), _gate(children["oper_k"])
        ends: tuple[Any, ...] = children["qkv"], children["dwc"], children["proj"]
        dropout: Any = children["proj_drop"]
        if not torch.compiler.is_compiling():  # a compiler follows the long way
            found = shortcut.find(x, self.backend, ends, q, k, dropout, self._packed)
            if found is not None:
                return infer(x, found.packed)
        w = _weights(ends, q, k)
        chosen, dtype = check(x, w, self.backend)
        if _hooked(ends) or _hooked(q) or _hooked(k):
            return super().forward(x)
        norms = norm_q, norm_k = q[1], k[1]
        eps = (norm_q.eps, norm_k.eps)
        batch = (_uses_batch_statistics(norm_q), _uses_batch_statistics(norm_k))
        if True in batch:  # without, the packed weights see to it
            check_alike(w)
        if chosen is not None and trains(chosen, batch):
            momentum = (_momentum(norm_q), _momentum(norm_k))
            out = train(chosen, x, w, eps, batch, momentum, _group(norms), dtype)
            for norm in norms:
                if _tracks(norm):
                    norm._buffers["num_batches_tracked"].add_(1)
        elif chosen is None or True in batch:
            out = reference.catm(x, w, norm_q, norm_k)
        else:
            packed = self._packed.get(chosen, w, eps, dtype)
            out = chosen.project_and_mix(x, w, eps, packed)
        return dropout(out) if dropout.training else out

    def train(self, mode: bool = True) -> FusedCATM:
        """As `nn.Module.train`; on a GPU, a change of mode forgets the packed weights.

        There a training step may be replayed as a CUDA graph, which writes weights unseen.
        """
        if mode != self.training and self.qkv.weight.is_cuda:
            self.refresh()
        return super().train(mode)

    def refresh(self) -> None:
        """Forget the packed weights; the next call makes them anew."""
        self._packed = PackedWeights()

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are derived from the parameters and tied to this machine's CPU.
        return {**self.__dict__, "_packed": PackedWeights()}


def mixer_weights(mixer: FusedCATM) -> MixerWeights:
    """The weights as `casvit_kernels.catm` takes them."""
    ends = (mixer.qkv, mixer.dwc, mixer.proj)
    return _weights(ends, _gate(mixer.oper_q), _gate(mixer.oper_k))


# Below, look-ups in the dictionaries of nn.Module: its attributes and the indexing of nn.Sequential
# cost up to a microsecond each, and a call makes dozens.


def _gate(operation: Any) -> tuple[Any, ...]:
    """Of one gate: depthwise convolution, norm, spatial and channel convolution."""
    parts = operation._modules
    spatial = parts["0"]._modules["block"]._modules
    return spatial["0"], spatial["1"], spatial["3"], parts["1"]._modules["block"]._modules["1"]


def _weights(ends: tuple[Any, ...], q: tuple[Any, ...], k: tuple[Any, ...]) -> MixerWeights:
    qkv, dwc, proj = ends
    return MixerWeights(
        _get(qkv, "weight"),
        _get(qkv, "bias"),
        _gate_weights(*q),
        _gate_weights(*k),
        _get(dwc, "weight"),
        _get(dwc, "bias"),
        _get(proj, "weight"),
        _get(proj, "bias"),
    )


def _gate_weights(depthwise: Any, norm: Any, spatial: Any, channel: Any) -> GateWeights:
    running = norm._buffers if not norm.training or norm.track_running_stats else _NOT_TRACKED
    return GateWeights(
        _get(depthwise, "weight"),
        _get(depthwise, "bias"),
        _get(norm, "weight"),
        _get(norm, "bias"),
        running["running_mean"],
        running["running_var"],
        _get(spatial, "weight"),
        _get(channel, "weight"),
    )


def _get(module: Any, name: str) -> Any:
    parameters = module._parameters
    # Parametrized or pruned, it is a property or a plain attribute.
    return parameters[name] if name in parameters else getattr(module, name)


def _hooked(modules: tuple[Any, ...]) -> bool:
    backward = torch.is_grad_enabled()  # only then hooks of the backward can run
    for m in modules:
        if m._forward_pre_hooks or m._forward_hooks:
            return True
        if backward and (m._backward_hooks or m._backward_pre_hooks):
            return True
    return False


_NOT_TRACKED = {"running_mean": None, "running_var": None}


def _uses_batch_statistics(norm: Any) -> bool:
    return norm.training or norm._buffers["running_mean"] is None


def _tracks(norm: Any) -> bool:
    """Whether this call counts as a batch of the norm."""
    return (
        norm.training
        and norm.track_running_stats
        and norm._buffers["num_batches_tracked"] is not None
    )


def _momentum(norm: Any) -> Any:
    """Weight of this batch in the running statistics."""
    if norm.momentum is not None:
        return norm.momentum
    return 1 / (norm._buffers["num_batches_tracked"] + 1) if _tracks(norm) else 0.0


def _group(norms: tuple[Any, Any]) -> str:
    """The process group over which batch statistics are taken, by name; "" for none."""
    names = {_group_of(norm) for norm in norms if norm.training}
    if len(names) > 1:
        raise ValueError(
            "oper_q and oper_k: expected BatchNorms synchronised over the same processes, "
            f"got {norms[0]} and {norms[1]}"
        )
    return names.pop() if names else ""


def _group_of(norm: Any) -> str:
    if not isinstance(norm, nn.SyncBatchNorm):
        return ""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return ""
    world: Any = dist.group.WORLD
    return group_name(norm.process_group or world)
