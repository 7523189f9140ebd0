"""`FusedCATM`: parameters, mode and the cache of packed weights; no arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backends import check_name
from .ops.mixer import matching, reference
from .ops.mixer.cpu import infer
from .ops.mixer.dispatch import check, group_name, train, trains
from .ops.mixer.packed import PackedWeights, fast_path
from .ops.mixer.reference import AdditiveTokenMixer
from .ops.mixer.weights import (
    BUFFERS,
    ENTRIES,
    MixerWeights,
    check_alike,
    unflatten,
)

ORIGINAL = "_original"  # on a FusedCATM: the mixer it stands for; a plain attribute, no submodule


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
            mixer: any module with the published structure; see `casvit_kernels.module.refusal`.

        Raises:
            ValueError: the module does not compute the published mixer, with the reason.
        """
        check_name(backend, "backend")
        reason = refusal(mixer)
        if reason is not None:
            raise ValueError(f"mixer: expected the published CATM, got one where {reason}")
        return share(cls, mixer, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H, W)``; raises as `casvit_kernels.catm` does."""
        owners = _owners(self)
        dropout: Any = self._modules["proj_drop"]
        if not torch.compiler.is_compiling():  # a compiler follows the long way
            found = fast_path(x, self.backend, owners, dropout, self._packed)
            if found is not None:
                return infer(x, found.packed)
        w = _weights(owners)
        chosen, dtype = check(x, w, self.backend)
        if _hooked(owners):
            return super().forward(x)
        norm_q, norm_k = owners[2], owners[6]
        norms = norm_q, norm_k
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
    return _weights(_owners(mixer))


def refusal(mixer: nn.Module) -> str | None:
    """Why `fuse` leaves ``mixer`` as it is, or None if it computes the published CATM.

    Its children, their types and settings must be the published ones, without anything that reads
    or writes between them (hooks, parametrizations, replaced methods). Then its own forward runs on
    a copy with random float64 weights on the CPU, in training and in eval mode; output, gradients
    and running statistics must be those of the reference formulas. Neither the mixer nor a
    random number generator is touched. A plain attribute that changes the result is noticed with
    the value it has now.
    """
    if not isinstance(mixer, nn.Module):
        raise TypeError(f"mixer: expected a torch.nn.Module, got {type(mixer).__name__}")
    if isinstance(mixer, FusedCATM):
        return "it is a FusedCATM already"
    return matching.difference(mixer)


def share(cls: type[FusedCATM], mixer: nn.Module, backend: str | None) -> FusedCATM:
    """A `FusedCATM` in place of ``mixer``, unchecked: same children, hooks and training mode."""
    fused = cls.__new__(cls)
    _share(mixer, fused)
    fused.backend = backend
    fused._packed = PackedWeights()
    vars(fused)[ORIGINAL] = mixer
    return fused


def unfused(fused: nn.Module) -> nn.Module:
    """The mixer that ``fused`` replaced, brought up to date, or else a plain one."""
    plain = vars(fused).get(ORIGINAL)
    if plain is None:
        plain = AdditiveTokenMixer.__new__(AdditiveTokenMixer)
    _share(fused, plain)
    mixer: nn.Module = plain
    return mixer


def _share(source: nn.Module, target: nn.Module) -> None:
    # The dictionaries themselves (children, hooks) are shared: what is added to or removed from one
    # of the two later, also through a hook's handle, holds for both; copies and pickles keep that.
    for name in vars(nn.Module()):
        vars(target)[name] = vars(source)[name]


# Below, look-ups in the dictionaries of nn.Module: its attributes and the indexing of nn.Sequential
# cost up to a microsecond each, and a call makes dozens.


def _owners(mixer: nn.Module) -> tuple[Any, ...]:
    """The modules of `weights.OWNERS`, in order."""
    children: Any = mixer._modules
    q, k = _gate(children["oper_q"]), _gate(children["oper_k"])
    return (children["qkv"], *q, *k, children["dwc"], children["proj"])


def _gate(operation: Any) -> tuple[Any, ...]:
    """The modules of `weights.GATE` of one gate."""
    parts = operation._modules
    spatial = parts["0"]._modules["block"]._modules
    return spatial["0"], spatial["1"], spatial["3"], parts["1"]._modules["block"]._modules["1"]


def _weights(owners: tuple[Any, ...]) -> MixerWeights:
    return unflatten(
        [
            _running(owners[i], name) if name in BUFFERS else _get(owners[i], name)
            for i, name in ENTRIES
        ]
    )


def _running(norm: Any, name: str) -> Any:
    """None where a training BatchNorm tracks no statistics."""
    return norm._buffers[name] if not norm.training or norm.track_running_stats else None


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
