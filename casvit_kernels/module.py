"""`FusedCATM`: parameters, mode and the cache of packed weights; no arithmetic."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .backends import check_name
from .ops.mixer import matching, reference
from .ops.mixer.cpu import infer
from .ops.mixer.dispatch import check, group_name, train, trains
from .ops.mixer.norms import eps_of
from .ops.mixer.packed import PackedWeights, fast_path
from .ops.mixer.reference import AdditiveTokenMixer
from .ops.mixer.structure import (
    PUBLISHED_INNER,
    Roles,
    Structure,
    examine,
    hooked_below,
    norms_of,
    weights_of,
)
from .ops.mixer.weights import MixerWeights, check_alike

_HAS_HOOKS = ": has hooks, which run only where it is called"
ORIGINAL = "_original"  # on a FusedCATM: the mixer it stands for; a plain attribute, no submodule


# Attributes that are never the replaced mixer's.
_OWN = frozenset((*vars(nn.Module()), "backend", "_packed", "_structure", "_warned", "_altered"))


class UnfusedWarning(UserWarning):
    """A fused mixer's children are no longer what it fused: it runs them one by one."""


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

    **It computes what its children say.** Each call looks at them: a norm may be exchanged for a frozen
    one (torchvision's, timm's) or, folded into its convolution, for an Identity, and weights may be
    parametrized, all of which run fused. Where a child is anything else than was fused (an adapter
    around ``qkv``, another activation or setting, a replaced forward), or somebody hooked a child
    (containers and activations included), the call runs the children one by one, whatever the backend,
    and warns once with `UnfusedWarning`. Hooks on all modules, as `torch.utils.flop_counter` registers
    them, do the same without a warning.

    Raises:
        ValueError: a constructor argument is out of range (named in the message).
    """

    _roles = Roles()
    _inner = PUBLISHED_INNER  # of each container in a gate its class; see `structure.examine`
    _structure: Structure | None = None
    _warned: frozenset[str] = frozenset()
    _altered: str | None = None  # an attribute of the original that was set after the swap

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
            mixer: any module with the published structure, whatever its class and names.
            backend: as for the constructor.

        Raises:
            TypeError: ``mixer`` is no module.
            ValueError: the module does not compute the published mixer, with the reason; or the
                backend's name is not known.
        """
        check_name(backend, "backend")
        if not isinstance(mixer, nn.Module):
            raise TypeError(f"mixer: expected a torch.nn.Module, got {type(mixer).__name__}")
        found = (
            "it is a FusedCATM already" if isinstance(mixer, FusedCATM) else matching.match(mixer)
        )
        if isinstance(found, str):
            raise ValueError(f"mixer: expected the published CATM, got one where {found}")
        return share(cls, mixer, backend, found)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H, W)``; raises as `casvit_kernels.catm` does."""
        if isinstance(x, fx.Proxy):
            return self._traced(x)
        if self._altered is not None:
            reason = (
                f"{self._altered}: was set after the swap, and the mixer's own forward may read it"
            )
            if torch.compiler.is_compiling():
                _warn_unfused(reason)
            else:
                self._warn_once(reason)
            return self._unfused(x)
        if torch.compiler.is_compiling():  # it follows what it can guard: the children themselves
            difference, owners, dropout = examine(self, self._roles, self._inner)
            if difference is None:
                for name in self._roles:
                    hooked = hooked_below(name, self._modules[name])
                    if hooked is not None and difference is None:
                        difference = hooked + _HAS_HOOKS
            if difference is not None:
                _warn_unfused(difference)
                return self._unfused(x)
            w = weights_of(owners)
        else:
            structure = self._structure
            if structure is None or not structure.unchanged(self):
                structure = self._structure = Structure(self, self._roles, self._inner)
            if structure.difference is None and structure.hooked():
                child = structure.hooked_child()
                if child:
                    self._warn_once(child + _HAS_HOOKS)
                return self._unfused(x)
            if structure.difference is None:
                found = fast_path(x, self.backend, structure, self._packed)
                if found is not None:
                    return infer(x, found.packed)
                if not structure.same_biases():
                    structure = self._structure = Structure(self, self._roles, self._inner)
            if structure.difference is not None:
                self._warn_once(structure.difference)
                return self._unfused(x)
            w, owners, dropout = structure.weights(), structure.owners, structure.dropout
        chosen, dtype = check(x, w, self.backend)
        norms = norm_q, norm_k = norms_of(owners)
        eps = (eps_of(norm_q), eps_of(norm_k))
        batch = (_uses_batch_statistics(norm_q), _uses_batch_statistics(norm_k))
        if True in batch:  # without, the packed weights see to it
            check_alike(w)
        if chosen is not None and trains(chosen, batch):
            momentum = (_momentum(norm_q), _momentum(norm_k, second=norm_k is norm_q))
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

    def _unfused(self, x: Tensor) -> Tensor:
        """The children one by one, as the mixer that this one replaced calls them."""
        original = vars(self).get(ORIGINAL)
        if original is None:
            return super().forward(x)
        if (
            original._modules is not self._modules
        ):  # of a copy or a replica with children of its own
            original = copy.copy(original)
            _share(self, original)
        original.training = self.training
        out: Tensor = original.forward(x)
        return out

    def _traced(self, x: fx.Proxy) -> Any:
        """A leaf of a `torch.fx` graph, which calls this module; at its root the formulas."""
        try:
            path = x.tracer.path_of_module(self)  # type: ignore[attr-defined]
        except NameError:
            path = ""
        if not path:
            return self._unfused(x)  # type: ignore[arg-type]
        return x.tracer.create_proxy("call_module", path, (x,), {})

    def _warn_once(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned = self._warned | {reason}
            _warn_unfused(reason)

    def train(self, mode: bool = True) -> FusedCATM:
        """As `nn.Module.train`; on a GPU, a change of mode forgets the packed weights.

        There a training step may be replayed as a CUDA graph, which writes weights unseen.
        """
        if mode != self.training and any(p.is_cuda for p in self.parameters()):
            self.refresh()
        return super().train(mode)

    def __setattr__(self, name: str, value: Any) -> None:
        """What is a plain attribute of the replaced mixer goes there: its own forward may read it."""
        original = vars(self).get(ORIGINAL)
        if original is not None and name in vars(original) and name not in _OWN:
            setattr(original, name, value)
            self._altered = name
        super().__setattr__(name, value)

    def refresh(self) -> None:
        """Forget the packed weights; the next call makes them anew."""
        self._packed = PackedWeights()

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are derived from the parameters and tied to this machine's CPU.
        return {**self.__dict__, "_packed": PackedWeights(), "_structure": None}


def mixer_weights(mixer: FusedCATM) -> MixerWeights:
    """The weights as `casvit_kernels.catm` takes them."""
    difference, owners, _ = examine(mixer, mixer._roles, mixer._inner)
    if difference is not None:
        raise ValueError(f"mixer: expected the children of the published CATM, got {difference}")
    return weights_of(owners)


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
    found = matching.match(mixer)
    return found if isinstance(found, str) else None


def share(
    cls: type[FusedCATM], mixer: nn.Module, backend: str | None, found: matching.Match
) -> FusedCATM:
    """A `FusedCATM` in place of a mixer that was matched: same children, hooks and training mode."""
    fused = cls.__new__(cls)
    _share(mixer, fused)
    fused.backend = backend
    fused._packed = PackedWeights()
    fused._roles, fused._inner = found
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


def has_own_forward(mixer: nn.Module) -> bool:
    """Whether a `FusedCATM` computes something else than the mixer: in a subclass, or replaced on it."""
    return type(mixer).forward is not FusedCATM.forward or "forward" in vars(mixer)


def _share(source: nn.Module, target: nn.Module) -> None:
    # The dictionaries themselves (children, hooks) are shared: what is added to or removed from one
    # of the two later, also through a hook's handle, holds for both; copies and pickles keep that.
    for name in vars(nn.Module()):
        vars(target)[name] = vars(source)[name]


def _warn_unfused(reason: str) -> None:
    warnings.warn(
        f"a fused mixer runs its children one by one, unfused: {reason}. It is right and slower; to run "
        "fused, undo the change, or call casvit_kernels.unfuse(model) before such changes and "
        "fuse(model) after them",
        UnfusedWarning,
        stacklevel=3,
    )


# A compiler calls it while it compiles; see `ops/mixer/dispatch.py`.
_warn_unfused._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _uses_batch_statistics(norm: Any) -> bool:
    if not isinstance(norm, _BatchNorm):  # frozen, or folded
        return False
    return norm.training or norm._buffers["running_mean"] is None


def _tracks(norm: Any) -> bool:
    """Whether this call counts as a batch of the norm."""
    return (
        isinstance(norm, _BatchNorm)
        and norm.training
        and norm.track_running_stats
        and norm._buffers["num_batches_tracked"] is not None
    )


def _momentum(norm: Any, second: bool = False) -> Any:
    """Weight of this batch in the running statistics. second: of two in one call."""
    if isinstance(norm, _BatchNorm) and norm.momentum is not None:
        return norm.momentum
    counted: Any = norm._buffers["num_batches_tracked"] if _tracks(norm) else None
    return 0.0 if counted is None else 1 / (counted + 1 + second)


def _group(norms: tuple[Any, Any]) -> str:
    """The process group over which batch statistics are taken, by name; "" for none."""
    names = {_group_of(norm) for norm in norms if _uses_batch_statistics(norm)}
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
