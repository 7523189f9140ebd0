"""Reads published checkpoints of the RCViT family: safely, all or nothing, errors in words."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import keys
from .keys import HEADS, config_of, stages_of
from .reading import CheckpointError, read

__all__ = ["CheckpointError", "LoadReport", "config_of", "load_checkpoint"]

_FINAL_NORM = tuple(
    f"norm.{name}"
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
)


class LoadReport(NamedTuple):
    """What `load_checkpoint` did, in the model's key names without wrapper prefixes.

    Attributes:
        loaded: how many tensors were copied into the model.
        missing: tensors of the model that the checkpoint lacks; they keep their values.
        unexpected: tensors of the checkpoint that the model lacks, for no known reason.
        skipped: tensors of the checkpoint left out on purpose, and why.
    """

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    skipped: Mapping[str, str]

    @property
    def left_out(self) -> tuple[str, ...]:
        """What was left out and why, a sentence for each reason, or for each tensor where few."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name)
        sentences = []
        for why, names in reasons.items():
            if len(names) <= 4:
                sentences += [f"left out {name}: {why}" for name in names]
            else:
                *parts, last = dict.fromkeys(keys.part_of(name) for name in names)
                listed = f"{', '.join(parts)} and {last}" if parts else last
                sentences.append(f"left out {len(names)} tensors of {listed}: {why}")
        return tuple(sentences)

    def __str__(self) -> str:
        lines = [f"loaded {self.loaded} tensors", *self.left_out]
        lines += [f"missing in the checkpoint: {name}" for name in self.missing]
        lines += [
            f"unexpected in the checkpoint: {keys.printable(name)}" for name in self.unexpected
        ]
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
        path_or_dict: a file of `torch.save` or safetensors (told by its content), or what such a file
            holds: a mapping with the weights under ``model`` or ``state_dict``, or the state dict
            itself. Before the keys, in any order, may stand what wrappers put there
            (DistributedDataParallel, FSDP, `torch.compile`, `AveragedModel`) and the name of the
            network in a detector, segmenter or training module: ``backbone.``, ``model.``,
            ``encoder.``, ``net.``, ``body.``, ``_backbone.``.
        use_ema: read the averaged weights: those under ``model_ema``, ``state_dict_ema`` or
            ``ema_state_dict``, or with such a name before their keys.
        strict: the checkpoint must hold every tensor of the model and no other. Excepted, and in
            the report: necks, heads, decoders and losses beside the network; averaged weights and
            their counters; heads for another number of classes; heads, norms and stages that the
            model is built without (``fork_feat``, ``out_indices``). A dense backbone may lack the
            norms of its outputs. Shapes must agree either way.

    Where two sets of weights would serve, and nothing tells which is meant, neither is loaded.

    From a file only tensors and plain data are read (and `argparse.Namespace`, which published ones
    carry). One that asks for anything else is refused before its code could run, one whose entries
    unpack to more than the file before they are unpacked.

    Returns:
        A `LoadReport`. Heads left out because of their number of classes are also warned about.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is no checkpoint, or not one for this model.
        TypeError: ``model`` or ``path_or_dict`` is of another type.
        MissingExtra: (an ImportError) the file is of safetensors, and that is not installed.

    After any of these the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    source, content = read(path_or_dict)

    # The model's own key for each clean key; the wrappers' prefixes go on both sides.
    state = model.state_dict()
    own_keys = {keys.strip(key): key for key in state}
    own = {keys.strip(key): tensor for key, tensor in state.items()}
    for key, tensor in own.items():
        if tensor.is_meta:
            raise CheckpointError(f"model: expected tensors with storage, {key} is on device meta")

    weights, outside, beside = keys.select(content, own, use_ema, source)
    keys.check_not_birders(weights, own, source)
    missing = tuple(key for key in own if key not in weights)
    skipped = _skipped(weights, own)
    unexpected = tuple(key for key in weights if key not in own and key not in skipped) + outside
    loaded = {key: weights[key] for key in own if key in weights and key not in skipped}
    _check_architecture(weights, own, strict, source, weights or [*beside, *outside])
    _check_tensors(loaded, own, source)
    converted = _converted(loaded, own, source)
    if strict:
        dense = _is_dense(own)
        required = [key for key in missing if not (dense and re.match(r"norm\d\.", key))]
        _check_complete(required, unexpected, source)

    model.load_state_dict(
        {own_keys[key]: tensor for key, tensor in converted.items()}, strict=False
    )
    report = LoadReport(len(loaded), missing, unexpected, skipped | beside)
    resized = {key: why for key, why in skipped.items() if key in own}
    if resized:
        warnings.warn(
            f"{source}: left out {', '.join(resized)}, the model keeps its own: "
            f"{next(iter(resized.values()))}",
            stacklevel=2,
        )
    return report


def _skipped(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """The checkpoint's tensors that this model does without, and why."""
    skipped = {}
    for key in HEADS:
        if key not in weights:
            continue
        name = key.split(".")[0]
        if key not in own:
            if name == "dist_head" and "head.weight" in own:
                skipped[key] = "the model has no dist_head (distillation=False)"
            elif stages_of(own):
                skipped[key] = "the model has no classifier (fork_feat=True or num_classes=0)"
        else:
            theirs, ours = keys.shape_of(weights[key]), keys.shape_of(own[key])
            if len(theirs) == len(ours) and theirs[0] != ours[0] and theirs[1:] == ours[1:]:
                skipped[key] = f"the checkpoint has {theirs[0]} classes, the model {ours[0]}"
    if _is_dense(own):
        for key in _FINAL_NORM:
            if key in weights:
                skipped[key] = "the model has no final norm (fork_feat=True, or pruned)"
        stages = len(stages_of(own))
        tops = {key.split(".")[0] for key in own}
        for key in weights:
            part = re.match(r"network\.(\d+)\.|norm([0246])\.", key)
            if part is None or key in own:
                continue
            if (part[1] and int(part[1]) > 2 * stages - 2) or (
                part[2] and f"norm{part[2]}" not in tops
            ):
                skipped[key] = "the model is built without this stage or its norm (out_indices)"
    return skipped


def _is_dense(own: Mapping[str, Tensor]) -> bool:
    return bool(stages_of(own)) and "norm.weight" not in own


def _check_architecture(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    strict: bool,
    source: str,
    found: Collection[str],
) -> None:
    """Raise when the checkpoint belongs to another size of the family, or to another network."""
    theirs, ours = stages_of(weights), stages_of(own)
    if theirs and ours and not keys.same_size(theirs, ours):
        raise CheckpointError(
            f"{source}: this is {keys.describe(theirs)} file, the model is {keys.describe(ours)}"
        )
    common = sum(key in own for key in weights)
    # Related networks share a few names; without strict a part of a model is welcome.
    if common == 0 or (strict and not theirs and 2 * common < len(own)):
        own_first = next(iter(own), "")
        prefix = next(
            (key[: -len(own_first)] for key in weights if key.endswith(f".{own_first}")), ""
        )
        hint = f" (the model's keys behind the prefix {keys.shortened(prefix)})" if prefix else ""
        raise CheckpointError(
            f"{source}: expected weights for {keys.describe(ours) if ours else 'the model'} with keys "
            f"{keys.names(own)}; got another architecture with keys {keys.names(found)}{hint}"
        )


def _check_tensors(loaded: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    stem = "patch_embed.0.weight"
    if stem in loaded:
        theirs, ours = keys.shape_of(loaded[stem]), keys.shape_of(own[stem])
        if theirs[:1] == ours[:1] and theirs[2:] == ours[2:] and theirs[1] != ours[1]:
            raise CheckpointError(
                f"{source}: expected in_chans={ours[1]} as in the model, "
                f"got weights for in_chans={theirs[1]}"
            )
    wrong = []
    for key, tensor in loaded.items():
        expected = own[key]
        if keys.shape_of(tensor) != tuple(expected.shape) and not tensor.is_nested:
            wrong.append(f"{key}: expected {tuple(expected.shape)}, got {tuple(tensor.shape)}")
        elif why := keys.unusable(tensor):
            wrong.append(f"{key}: expected a dense tensor with storage, got {why}")
        elif tensor.dtype.is_floating_point != expected.dtype.is_floating_point:
            wrong.append(f"{key}: expected {expected.dtype}, got {tensor.dtype}")
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors do not fit: {keys.first(wrong, '; ')}"
        )


def _converted(
    loaded: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """The tensors in the model's dtypes, so that no copy can fail halfway through the model."""
    converted = {}
    for key, tensor in loaded.items():
        try:
            converted[key] = tensor.detach().to(own[key].dtype)
        except Exception as error:
            raise CheckpointError(
                f"{source}: {key}: {tensor.dtype} cannot be converted to the model's "
                f"{own[key].dtype}: {error}"
            ) from error
    return converted


def _check_complete(missing: list[str], unexpected: tuple[str, ...], source: str) -> None:
    problems = []
    if missing:
        hint = ""
        if all(key.startswith("dist_head.") for key in missing):
            hint = "; build the model with distillation=False to do without dist_head"
        problems.append(
            f"lacks {len(missing)} of the model's tensors ({keys.first(missing)}){hint}"
        )
    if unexpected:
        problems.append(f"has {len(unexpected)} the model lacks ({keys.first(unexpected)})")
    if problems:
        raise CheckpointError(
            f"{source}: strict=True expected exactly the model's tensors, "
            f"the checkpoint {' and '.join(problems)}"
        )
