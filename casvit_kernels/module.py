"""`FusedCATM`: parameters, mode and the cache of packed weights; no arithmetic."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import reference
from .backends import check_name
from .functional import GateWeights, MixerWeights, check, exporting
from .packing import PackedWeights
from .reference import AdditiveTokenMixer


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
    keeps the input's layout (contiguous or channels last). Where a BatchNorm uses batch statistics
    (training), this version computes the reference formulas, with autograd; with running statistics
    (eval, or frozen BatchNorm) it runs fused and stays differentiable.

    The packed weights are renewed when a parameter or buffer is written, replaced or moved. A write
    through ``.data`` is invisible to PyTorch's version counters; it is recognised by a fingerprint of
    the values, which may miss a change of single elements of a 1x1 convolution: call `refresh` after
    such an edit.

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
        norm_q, norm_k = (
            _child(self, "oper_q", "0", "block", "1"),
            _child(self, "oper_k", "0", "block", "1"),
        )
        w = MixerWeights(
            *_weight_and_bias(self, "qkv"),
            _gate_weights(self, "oper_q", norm_q),
            _gate_weights(self, "oper_k", norm_k),
            *_weight_and_bias(self, "dwc"),
            *_weight_and_bias(self, "proj"),
        )
        chosen, dtype = check(x, w, self.backend)
        if exporting() or _uses_batch_statistics(norm_q) or _uses_batch_statistics(norm_k):
            out = reference.catm(x, w, norm_q, norm_k)
        else:
            eps = (norm_q.eps, norm_k.eps)
            packed = self._packed.get(chosen, w, eps, dtype)
            out = chosen.project_and_mix(x, w, eps, packed)
        dropped: Tensor = self.proj_drop(out)
        return dropped

    def refresh(self) -> None:
        """Forget the packed weights; the next call makes them anew."""
        self._packed = PackedWeights()

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are derived from the parameters and tied to this machine's CPU.
        return {**self.__dict__, "_packed": PackedWeights()}


def _child(module: nn.Module, *path: str) -> Any:
    # Direct look-ups: indexing an nn.Sequential costs a microsecond, and a call makes ten of them.
    for name in path:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _weight_and_bias(module: nn.Module, *path: str) -> tuple[Any, Any]:
    parameters = _child(module, *path)._parameters
    return parameters["weight"], parameters["bias"]


def _gate_weights(mixer: nn.Module, name: str, norm: nn.Module) -> GateWeights:
    return GateWeights(
        *_weight_and_bias(mixer, name, "0", "block", "0"),
        *_weight_and_bias(mixer, name, "0", "block", "1"),
        norm._buffers["running_mean"],
        norm._buffers["running_var"],
        _child(mixer, name, "0", "block", "3")._parameters["weight"],
        _child(mixer, name, "1", "block", "1")._parameters["weight"],
    )


def _uses_batch_statistics(norm: nn.Module) -> bool:
    return norm.training or norm._buffers["running_mean"] is None
