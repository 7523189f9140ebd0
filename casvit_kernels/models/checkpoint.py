"""Reads published checkpoints of the RCViT family: safely, all or nothing, errors in words."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .rcvit import CONFIGS, Config
from .reading import CheckpointError, read

__all__ = ["CheckpointError", "LoadReport", "config_of", "load_checkpoint"]

_HEADS = ("head.weight", "head.bias", "dist_head.weight", "dist_head.bias")
_FINAL_NORM = tuple(
    f"norm.{name}"
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
)


class LoadReport(NamedTuple):
    """What `load_checkpoint` did, in the model's key names without wrapper prefixes.

    loaded: tensors copied into the model.
    missing: tensors of the model that the checkpoint lacks; they keep their values.
    unexpected: tensors of the checkpoint that the model lacks, for no known reason.
    skipped: tensors of the checkpoint left out on purpose, and why.
    """

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"loaded {self.loaded} tensors"]
        lines += [f"left out {name}: {why}" for name, why in self.skipped.items()]
        lines += [f"missing in the checkpoint: {name}" for name in self.missing]
        lines += [f"unexpected in the checkpoint: {name}" for name in self.unexpected]
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
    use_ema: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Copy the weights of a checkpoint into an RCViT, plain, fused, compiled or under DDP.

    Args:
        model: an RCViT of this package, or a module with the same state-dict keys.
        path_or_dict: a file written by `torch.save`, or what such a file holds: a mapping with the
            weights under ``model`` or ``state_dict``, or the state dict itself. The prefixes that
            DDP and `torch.compile` put before keys do not matter.
        use_ema: read the averaged weights, under ``model_ema`` (or ``state_dict_ema``).
        strict: the checkpoint must hold every tensor of the model and no other. Excepted, and in
            the report, are heads for another number of classes, heads that the model is built
            without, and in a dense backbone (``fork_feat=True``) the norms of its outputs and the
            final norm of a classifier. Shapes must agree either way.

    From a file only tensors and plain data are read (and `argparse.Namespace`, which published ones
    carry); one that asks for anything else is refused before its code could run, one whose entries
    unpack to more than the file before they are unpacked.

    Returns:
        A `LoadReport`. Heads left out because of their number of classes are also warned about.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is no checkpoint, or not one for this model.
        TypeError: ``model`` or ``path_or_dict`` is of another type.
        After any of these the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    source, content = read(path_or_dict)
    weights = _clean(_select(content, use_ema, source), source)

    # The model's own key for each clean key; the wrappers' prefixes go on both sides.
    state = model.state_dict()
    own_keys = {_strip(key): key for key in state}
    own = {_strip(key): tensor for key, tensor in state.items()}
    for key, tensor in own.items():
        if tensor.is_meta:
            raise CheckpointError(f"model: expected tensors with storage, {key} is on device meta")

    missing = tuple(key for key in own if key not in weights)
    skipped = _skipped(weights, own)
    unexpected = tuple(key for key in weights if key not in own and key not in skipped)
    loaded = {key: weights[key] for key in own if key in weights and key not in skipped}
    _check_architecture(weights, own, strict, source)
    _check_tensors(loaded, own, source)
    if strict:
        dense = _is_dense(own)
        required = [key for key in missing if not (dense and re.match(r"norm\d\.", key))]
        _check_complete(required, unexpected, source)

    model.load_state_dict({own_keys[key]: tensor for key, tensor in loaded.items()}, strict=False)
    report = LoadReport(len(loaded), missing, unexpected, skipped)
    resized = {key: why for key, why in skipped.items() if key in own}
    if resized:
        warnings.warn(
            f"{source}: left out {', '.join(resized)}, the model keeps its own: "
            f"{next(iter(resized.values()))}",
            stacklevel=2,
        )
    return report


def _select(content: Any, use_ema: bool, source: str) -> Mapping[str, Any]:
    """The state dict inside a checkpoint."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source}: expected a checkpoint (a mapping), got {type(content).__name__}"
        )
    names = ("model_ema", "state_dict_ema") if use_ema else ("model", "state_dict")
    for name in names:
        if content.get(name) is None:
            continue
        inner = content[name]
        if not isinstance(inner, Mapping):
            raise CheckpointError(
                f"{source}: expected a state dict under {name!r}, got {type(inner).__name__}"
            )
        return inner
    if use_ema:
        raise CheckpointError(
            f"{source}: use_ema expected averaged weights under 'model_ema', "
            f"got the entries {_names(content)}"
        )
    return content


def _clean(state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The state dict without wrapper prefixes; every value a tensor."""
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{source}: expected a state dict of tensors, got one without any; "
            f"its entries: {_names(state)}"
        )
    clean: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{source}: expected a state dict of named tensors, "
                f"got {type(value).__name__} under {key!r}"
            )
        if _strip(key) in clean:
            raise CheckpointError(
                f"{source}: expected one tensor for {_strip(key)}, got several (one as {key})"
            )
        clean[_strip(key)] = value
    return clean


def _strip(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


def _skipped(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """The checkpoint's tensors that this model does without, and why."""
    skipped = {}
    for key in _HEADS:
        if key not in weights:
            continue
        name = key.split(".")[0]
        if key not in own:
            if name == "dist_head" and "head.weight" in own:
                skipped[key] = "the model has no dist_head (distillation=False)"
            elif config_of(own) is not None:
                skipped[key] = "the model has no classifier (fork_feat=True or num_classes=0)"
        else:
            theirs, ours = weights[key].shape, own[key].shape
            if len(theirs) == len(ours) and theirs[0] != ours[0] and theirs[1:] == ours[1:]:
                skipped[key] = f"the checkpoint has {theirs[0]} classes, the model {ours[0]}"
    if _is_dense(own):
        for key in _FINAL_NORM:
            if key in weights:
                skipped[key] = "the model is a dense backbone (fork_feat=True) without final norm"
    return skipped


def _is_dense(own: Mapping[str, Tensor]) -> bool:
    return config_of(own) is not None and "norm.weight" not in own


def config_of(state: Mapping[str, Tensor]) -> Config | None:
    """The size of the RCViT that a state dict belongs to, None when it is no RCViT."""
    layers, dims = [], []
    for index in range(0, 8, 2):
        first = f"network.{index}.0"
        norm = state.get(f"{first}.norm1.weight")
        if norm is None or norm.dim() != 1 or f"{first}.attn.oper_q.0.block.0.weight" not in state:
            return None
        depth = 1
        while f"network.{index}.{depth}.norm1.weight" in state:
            depth += 1
        layers.append(depth)
        dims.append(norm.shape[0])
    if "patch_embed.0.weight" not in state:
        return None
    return Config(
        (layers[0], layers[1], layers[2], layers[3]), (dims[0], dims[1], dims[2], dims[3])
    )


def _describe(config: Config) -> str:
    for name, known in CONFIGS.items():
        if config == known:
            return f"an {name}"
    return f"an RCViT with layers {config.layers} and dims {config.dims}"


def _check_architecture(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], strict: bool, source: str
) -> None:
    """Raise when the checkpoint belongs to another size of the family, or to another network."""
    theirs, ours = config_of(weights), config_of(own)
    if theirs is not None and ours is not None and theirs != ours:
        raise CheckpointError(
            f"{source}: this is {_describe(theirs)} file, the model is {_describe(ours)}"
        )
    common = sum(key in own for key in weights)
    # Related networks share a few names; without strict a part of a model is welcome.
    if common == 0 or (strict and 2 * common < len(own)):
        raise CheckpointError(
            f"{source}: expected weights for {_describe(ours) if ours else 'the model'} with keys "
            f"{_names(own)}; got another architecture with keys {_names(weights)}"
        )


def _check_tensors(loaded: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    stem = "patch_embed.0.weight"
    if stem in loaded:
        theirs, ours = loaded[stem].shape, own[stem].shape
        if theirs[:1] == ours[:1] and theirs[2:] == ours[2:] and theirs[1] != ours[1]:
            raise CheckpointError(
                f"{source}: expected in_chans={ours[1]} as in the model, "
                f"got weights for in_chans={theirs[1]}"
            )
    wrong = []
    for key, tensor in loaded.items():
        expected = own[key]
        if tensor.shape != expected.shape:
            wrong.append(f"{key}: expected {tuple(expected.shape)}, got {tuple(tensor.shape)}")
        elif tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
            wrong.append(f"{key}: expected a dense tensor with storage, got {_kind(tensor)}")
        elif tensor.dtype.is_floating_point != expected.dtype.is_floating_point:
            wrong.append(f"{key}: expected {expected.dtype}, got {tensor.dtype}")
    if wrong:
        raise CheckpointError(f"{source}: {len(wrong)} tensors do not fit: {_first(wrong, '; ')}")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} with {tensor.layout} on device {tensor.device}"


def _check_complete(missing: list[str], unexpected: tuple[str, ...], source: str) -> None:
    problems = []
    if missing:
        hint = ""
        if all(key.startswith("dist_head.") for key in missing):
            hint = "; build the model with distillation=False to do without dist_head"
        problems.append(f"lacks {len(missing)} of the model's tensors ({_first(missing)}){hint}")
    if unexpected:
        problems.append(f"has {len(unexpected)} the model lacks ({_first(unexpected)})")
    if problems:
        raise CheckpointError(
            f"{source}: strict=True expected exactly the model's tensors, "
            f"the checkpoint {' and '.join(problems)}"
        )


def _names(entries: Mapping[Any, Any]) -> str:
    return _first([repr(key) for key in entries]) or "none"


def _first(items: Iterable[str], separator: str = ", ") -> str:
    """The first few of many, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return separator.join(items[:4]) + more
