"""What `expedite` knows of models: blocks, patch embedding, prefix tokens, and what cannot be served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

_CONTAINERS = ("blocks", "layers", "layer")
# Parameters (1, n, C) that models put before the tokens of the map.
_PREFIX = (
    "cls_token",
    "class_token",
    "dist_token",
    "distillation_token",
    "reg_token",
    "reg_tokens",
    "register_tokens",
)


def find_blocks(
    model: nn.Module, blocks: str | Sequence[nn.Module] | nn.Module | None
) -> tuple[str, list[nn.Module]]:
    """The path of the list of blocks in the model, and the blocks.

    Raises:
        TypeError, ValueError: there is none, there are several, or it is not in the model.
    """
    if blocks is None:
        found = _containers(model)
        if len(found) == 1:
            return found[0]
        if not found:
            raise ValueError(
                "blocks: found no nn.Sequential or nn.ModuleList of equal blocks named blocks, layers "
                f"or layer in {type(model).__name__}: give its dotted name"
            )
        names = ", ".join(repr(path) for path, _ in found)
        raise ValueError(f"blocks: found several lists of blocks, {names}: give the name of one")
    if isinstance(blocks, str):
        try:
            module = model.get_submodule(blocks)
        except AttributeError as error:
            raise ValueError(f"blocks: {type(model).__name__} has no {blocks!r}: {error}") from None
        return blocks, _members(module, blocks)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise TypeError(
            "blocks: expected the dotted name of a list of blocks, an nn.ModuleList or an "
            f"nn.Sequential, got {type(blocks).__name__}"
        )
    for path, module in model.named_modules():
        if module is blocks:
            return path, _members(module, path)
    raise ValueError(f"blocks: expected a list inside of the {type(model).__name__}, it is not")


def _members(module: nn.Module, path: str) -> list[nn.Module]:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
        raise ValueError(
            f"blocks: expected {path!r} to be an nn.Sequential or nn.ModuleList of blocks, "
            f"got {type(module).__name__}"
        )
    members = list(module.children())
    if len(members) != len(module) or len({id(m) for m in members}) != len(members):
        raise ValueError(f"blocks: expected {path!r} to hold each block once")
    return members


def _containers(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    found: list[tuple[str, list[nn.Module]]] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        if path.rpartition(".")[2] not in _CONTAINERS or any(
            path.startswith(f"{outer}.") for outer, _ in found
        ):
            continue
        members = list(module.children())
        if len(members) > 1 and len({type(m) for m in members}) == 1:
            found.append((path, members))
    return found


def patch_embedding(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Conv2d | None:
    """The convolution that makes tokens of an image: the last before the blocks, else the first after.

    Its output has the map's height and width, whatever the model's input was.
    """
    inside = {id(m) for block in blocks for m in block.modules()}
    before: nn.Conv2d | None = None
    passed = False
    for module in model.modules():
        if id(module) in inside:
            passed = True
        elif isinstance(module, nn.Conv2d) and tuple(module.kernel_size) == tuple(module.stride):
            if passed:
                return before or module
            before = module
    return before


def prefix_tokens(model: nn.Module, path: str) -> int:
    """How many class and register tokens stand before the map's: told by the model, else counted."""
    around = [model]
    for name in path.split(".")[:-1]:
        around.append(around[-1].get_submodule(name))
    for module in reversed(around):
        told = getattr(module, "num_prefix_tokens", None)
        if isinstance(told, int):
            return told
    count = 0
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in _PREFIX and parameter.dim() == 3:
            count += parameter.shape[1]
    return count


def relative_attention(block: nn.Module) -> nn.Module | None:
    """The attention of a block of timm's BEiT with a table of relative positions, which is served."""
    attention = getattr(block, "attn", None)
    if (
        isinstance(attention, nn.Module)
        and hasattr(type(attention), "_get_rel_pos_bias")
        and isinstance(getattr(attention, "relative_position_bias_table", None), Tensor)
        and isinstance(getattr(attention, "window_size", None), (tuple, list))
    ):
        return attention
    return None


def why_not(block: nn.Module) -> str | None:
    """Why a block cannot run on cluster centres, as far as its modules tell; None: nothing known."""
    served = relative_attention(block)
    for name, module in block.named_modules():
        if module is served:
            continue
        where = f"its {name} has" if name else "it has"
        held: Any = module
        for table in ("relative_position_bias_table", "rel_pos_h", "rel_pos_w"):
            if isinstance(getattr(held, table, None), Tensor):
                return f"{where} relative positions of its own ({table}) of the full grid"
        if _positive(getattr(held, "window_size", None)):
            return f"{where} windows of fixed size ({held.window_size}), and centres are on another grid"
        if callable(getattr(held, "get_embed", None)):
            return f"{where} a position table of its own ({type(held).__name__}) of the full grid"
    return None


def _positive(size: object) -> bool:
    if isinstance(size, (tuple, list)):
        return any(_positive(n) for n in size)
    return isinstance(size, int) and size > 0


def usual_size(model: nn.Module) -> tuple[int, int] | None:
    """The map that the model is made for: timm's patch_embed.grid_size, or image and patch size."""
    for module in model.modules():
        told = getattr(module, "grid_size", None)
        if (
            isinstance(told, (tuple, list))
            and len(told) == 2
            and all(isinstance(n, int) for n in told)
        ):
            return told[0], told[1]
    config = getattr(model, "config", None)
    image, patch = (
        _pair(getattr(config, "image_size", None)),
        _pair(getattr(config, "patch_size", None)),
    )
    if image is None or patch is None:
        return None
    return image[0] // patch[0], image[1] // patch[1]


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    return None
