"""A dense map that is rebuilt when somebody reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .clusters import Clusters, reconstruct_tokens


class Rebuilding:
    """How the outputs of a call's clustered blocks become dense maps; one for each clustering."""

    def __init__(
        self,
        clusters: Clusters,
        prefix: int,
        neighbours: int,
        norm: str,
        window: int | None,
        residual: bool,
    ) -> None:
        self.clusters, self.prefix = clusters, prefix
        self.neighbours, self.norm, self.window = neighbours, norm, window
        self.residual = residual

    def dense(self, tokens: Tensor) -> Tensor:
        """``(B, P + N, C)`` of ``(B, P + K, C)``: P class and register tokens pass by."""
        maps = reconstruct_tokens(
            tokens[:, self.prefix :],
            self.clusters,
            neighbours=self.neighbours,
            norm=self.norm,
            residual=self.residual,
            window=self.window,
        )
        return torch.cat((tokens[:, : self.prefix], maps), 1) if self.prefix else maps


class Deferred(Tensor):
    """The output of a clustered block as everybody but the next block sees it: ``(B, P + N, C)``.

    Shape, dtype and device are known; any other use rebuilds the map, once, and goes on with that
    ordinary tensor. It has no storage, and what bypasses `__torch_function__` cannot read garbage.
    """

    tokens: Tensor  # (B, P + K, C), what the block returned
    rebuilding: Rebuilding
    block: int  # its index
    _dense: Tensor | None
    _seen: int  # version counter of it

    @staticmethod
    def __new__(cls, tokens: Tensor, rebuilding: Rebuilding, block: int) -> Deferred:
        count = rebuilding.prefix + rebuilding.clusters.tokens.shape[1]
        self: Deferred = torch.Tensor._make_wrapper_subclass(
            cls,
            (tokens.shape[0], count, tokens.shape[2]),
            dtype=tokens.dtype,
            device=tokens.device,
            requires_grad=tokens.requires_grad,
        )
        self.tokens, self.rebuilding, self.block = tokens, rebuilding, block
        self._dense, self._seen = None, 0
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Deferred, dense, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Past autograd: a gradient would end here.
        every = (tuple(args), dict(kwargs or {}))
        for leaf in tree_leaves(every):
            if isinstance(leaf, Deferred) and leaf.tokens.requires_grad:
                raise RuntimeError(
                    f"{func} reads the output of a block of an expedited model in a way that gradients "
                    "cannot follow (reentrant checkpointing does): unexpedite the model, or call it "
                    "under torch.no_grad()"
                )
        args, kwargs = tree_map_only(Deferred, dense, every)
        return func(*args, **kwargs)


def dense(x: Deferred) -> Tensor:
    """The map itself, made once."""
    made = x._dense
    # One made without gradients, of a block's output that has some, does for nobody else.
    if made is None or (x.tokens.requires_grad and not made.requires_grad):
        with torch.set_grad_enabled(x.tokens.requires_grad):
            made = x.rebuilding.dense(x.tokens)
        x._dense, x._seen = made, 0 if made.is_inference() else made._version
    return made


def written(x: Deferred) -> bool:
    """Whether somebody changed the map in place, of which the centres know nothing."""
    made = x._dense
    return made is not None and not made.is_inference() and made._version != x._seen


def all_dense(value: Any) -> Any:
    """``value`` with every map in it rebuilt; itself where there is none."""
    if not any(isinstance(leaf, Deferred) for leaf in tree_leaves(value)):
        return value
    return tree_map_only(Deferred, dense, value)


# What is known without the values. As Tensor.shape.__get__: properties arrive as their getters.
_KNOWN = frozenset(
    (
        Tensor.dim,
        Tensor.size,
        Tensor.numel,
        Tensor.nelement,
        Tensor.element_size,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.__len__,
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,
        Tensor.layout.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    )
)
