"""`expedite` makes a plain ViT run its later blocks on cluster centres, `unexpedite` undoes it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from . import models
from .calls import HOOKS, After, Before, Finish, Patches, Plan, Start
from .clusters import Size, check, check_reconstruction
from .positions import RelativeBias
from .report import Report, cost

_BIAS = "_get_rel_pos_bias"


def expedite(
    model: nn.Module,
    at: int = 10,
    grid: Size = (28, 28),
    until: int | None = None,
    *,
    blocks: str | Sequence[nn.Module] | nn.Module | None = None,
    size: Size | None = None,
    prefix: int | None = None,
    iterations: int = 5,
    window: int = 5,
    temperature: float = 0.02,
    neighbours: int = 20,
    norm: str = "l2",
    reconstruction_window: int | None = None,
    residual: bool = False,
) -> Report:
    """Cluster the tokens of a plain ViT after its first ``at`` blocks (arXiv 2210.01035).

    Blocks ``[0]`` to ``[at - 1]`` run as they are. The output of the ``at``-th is clustered, so that
    ``[at]`` is the first to run on centres, and ``[until - 1]`` the last: after it the map is rebuilt,
    and whatever follows (more blocks, the norm, a head) sees all tokens. So does everybody who asks for
    the output of a block between: each is rebuilt by its clusters when it is first read. No parameter
    and no state-dict key changes, and no class is patched: hooks do it, on this model alone.

    Serves timm's ViTs (DeiT, DINOv2, DINOv3, EVA, BEiT among them), transformers' ViT and DINOs, and
    models with a list of blocks that take and return ``(B, N, C)``, class and register tokens first.
    Centres have the mean position of their tokens where blocks use rotary embeddings (arguments
    ``rope``, ``position_embeddings``) or timm's BEiT bias. Gradients flow, except through affinities.
    Blocks' own attention maps, and the inputs that hooks on them see, are those of centres.

    Args:
        model: any module; it is changed in place.
        at: blocks before the clustering, at least 1.
        until: blocks before the reconstruction, above ``at``; None: all of them.
        grid: ``(h, w)`` of the centres; at most the map, which is compared in each call.
        blocks: the list of blocks, or its dotted name in the model; None: the one there is.
        size: ``(H, W)`` of the map in every call. None: each call's own, as its patch embedding (an
            nn.Conv2d of stride = kernel size) returns it; without one, of the image and the number of
            tokens.
        prefix: class and register tokens; None: as the model has them.
        iterations, window, temperature: as of `cluster_tokens`.
        neighbours, norm, residual: as of `reconstruct_tokens`.
        reconstruction_window: its ``window``.

    Returns:
        `Report`: which blocks, how many tokens and multiply-accumulates.

    Raises:
        TypeError, ValueError: an argument does not fit the model, or a block cannot run on centres (it
            has windows or relative positions of the full grid), with the reason. Nothing is changed
            then. In a call: the map's size is not known, the grid is larger, a block is given something
            else of the full map's size (a mask), or gradient checkpointing of timm is on.
        RuntimeError: the model is expedited, or a part of it: `unexpedite` it first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model: expected a module that is not compiled, got a {type(model).__name__}: "
            "expedite what it was made of, and compile that afterwards"
        )
    for name, module in model.named_modules():
        if _plans(module):
            raise RuntimeError(
                f"model: {name or 'it'} is expedited already: call unexpedite on that first"
            )
    path, members = models.find_blocks(model, blocks)
    until = len(members) if until is None else until
    for name, value in (("at", at), ("until", until)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a whole number of blocks, got {value!r}")
    if not 1 <= at < until <= len(members):
        raise ValueError(
            f"at, until: expected 1 <= at < until <= {len(members)}, the number of blocks in {path!r}, "
            f"got {at} and {until}"
        )
    check(grid if size is None else size, grid, iterations, window, temperature)
    check_reconstruction(neighbours, temperature, norm, reconstruction_window, residual)
    if prefix is None:
        prefix = models.prefix_tokens(model, path)
    elif not isinstance(prefix, int) or isinstance(prefix, bool) or prefix < 0:
        raise ValueError(f"prefix: expected a number of tokens, at least 0, got {prefix!r}")
    for index in range(at, until):
        reason = models.why_not(members[index])
        if reason is not None:
            raise ValueError(f"{path}[{index}]: it cannot run on cluster centres: {reason}")
    relative = [models.relative_attention(members[index]) for index in range(at, until)]
    biased = [attention for attention in relative if attention is not None]
    if biased and prefix != 1:
        raise ValueError(
            f"prefix: expected 1, as the relative positions of {path} have, got {prefix}"
        )
    names = [_argument_names(members[i], f"{path}[{i}]") for i in range(at, until)]

    plan = Plan(
        path=path,
        at=at,
        until=until,
        grid=(grid[0], grid[1]),
        size=None if size is None else (size[0], size[1]),
        prefix=prefix,
        iterations=iterations,
        window=window,
        temperature=temperature,
        neighbours=neighbours,
        norm=norm,
        reconstruction_window=reconstruction_window,
        residual=residual,
        relative=bool(biased),
        checkpointing=tuple(m for m in model.modules() if hasattr(m, "grad_checkpointing")),
    )
    handles = plan.handles
    handles.append(model.register_forward_pre_hook(Start(plan), with_kwargs=True))
    patch = models.patch_embedding(model, members)
    if patch is not None:
        handles.append(patch.register_forward_hook(Patches(plan)))
    for index, arguments in zip(range(at, until), names, strict=True):
        block = members[index]
        before = Before(plan, index, arguments)
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        # Before others' hooks: they see the dense map.
        handles.append(block.register_forward_hook(After(plan, index), prepend=True))
    handles.append(model.register_forward_hook(Finish(plan)))
    for attention in biased:
        setattr(attention, _BIAS, RelativeBias(attention, plan.call))
    known = models.usual_size(model) if size is None else (size[0], size[1])
    return Report(
        path,
        len(members),
        at,
        until,
        plan.grid,
        prefix,
        iterations,
        window,
        reconstruction_window,
        known,
        cost(members, patch),
    )


def unexpedite(model: nn.Module) -> None:
    """Undo `expedite`: the model computes what it did before, bit for bit, and no hook of it is left.

    Args:
        model: what `expedite` was given.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it is not expedited, or the expedited module is a part of it (named), or it is a part
            of that.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    plans = _plans(model, (Start,))
    if not plans:
        for name, module in model.named_modules():
            if _plans(module, (Start,)):
                raise ValueError(
                    f"model: its {name} is what was expedited: call unexpedite on that"
                )
            if _plans(module):
                raise ValueError(
                    "model: expected the module that expedite was given, got a part of it"
                )
        raise ValueError("model: expected an expedited model, it is not")
    for plan in plans:
        for handle in plan.handles:
            handle.remove()
    for module in model.modules():
        bias = vars(module).get(_BIAS)
        if isinstance(bias, RelativeBias) and any(bias.call is plan.call for plan in plans):
            delattr(module, _BIAS)


def _plans(module: nn.Module, kinds: tuple[type, ...] = HOOKS) -> list[Plan]:
    """Those whose hooks are on the module itself."""
    hooks: list[Any] = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    plans: list[Plan] = [hook.plan for hook in hooks if type(hook) in kinds]
    return list(dict.fromkeys(plans))


def _argument_names(block: nn.Module, where: str) -> tuple[str, ...]:
    """Names of what the block can be given by place, its tokens first."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(block.forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind in kinds)
    if not names:
        raise ValueError(f"{where}: expected a forward that takes tokens as its first argument")
    return names
