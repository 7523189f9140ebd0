"""Reads checkpoints of detectors and segmenters: published ones, and those of the models here."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import keys
from ..checkpoint import LoadReport
from ..reading import CheckpointError, read
from .layout import KINDS, Kind, is_published, kind_of, translated

_STAGE = re.compile(r"backbone\.body\.(network\.(\d+)\.|norm([0246])\.)")


def load_dense_checkpoint(
    model: nn.Module,
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
    use_ema: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Copy the weights of a checkpoint into a `RetinaNet`, `MaskRCNN` or `SemanticFPN`.

    Args:
        model: of `retinanet`, `mask_rcnn` or `semantic_fpn`, plain, fused, compiled or under DDP.
        path_or_dict: a file of `torch.save` or safetensors, or what such a file holds. Its keys are
            those of mmdetection 2 and 3 or mmsegmentation 0 and 1 (``backbone.``, ``neck.``,
            ``bbox_head.``, ...), which are translated so that the network computes the same, or those
            of the model.
        use_ema: read the averaged weights of a file that has them under ``model_ema``.
        strict: the checkpoint must hold every tensor of the model and no other. Excepted, and in the
            report: what is per class, where the number of classes is another; stages and norms that
            the model is built without. Shapes must agree either way.

    Only tensors and plain data are read from a file, as by `load_checkpoint`. For a backbone alone use
    ``load_checkpoint(model.backbone.body, ...)``.

    Returns:
        A `LoadReport`, in our key names. Layers left out for their number of classes are also warned
        about.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is no checkpoint, or one of another head, size or layout.
        TypeError: ``model`` or ``path_or_dict`` is of another type.

    After any of these the model is as it was.
    """
    kind = _kind_of_model(model)
    source, content = read(path_or_dict)
    own_keys = {keys.strip(key): key for key in model.state_dict()}
    own = {keys.strip(key): tensor for key, tensor in model.state_dict().items()}
    for key, tensor in own.items():
        if tensor.is_meta:
            raise CheckpointError(f"model: expected tensors with storage, {key} is on device meta")
    _check_version(content, source)
    state, averaged = keys.state_dict_of(content, use_ema, source)
    if use_ema and not averaged:
        raise CheckpointError(
            f"{source}: use_ema expected averaged weights under 'model_ema', "
            f"got the entries {keys.names(content)}"
        )
    tensors = keys.cleaned(state, source)
    _check_kind(tensors, kind, source)
    unknown: tuple[str, ...] = ()
    # An average that mmengine's or mmcv's hook wrote beside the weights.
    skipped = {key: "averaged weights" for key in tensors if re.match(r"ema_\w+$", key)}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in skipped}
    if is_published(tensors):
        tensors, unknown = translated(_usable(tensors, source), kind.rules)
    _check_size(tensors, own, source)

    skipped |= _left_out(tensors, own, kind)
    loaded = {key: t for key, t in tensors.items() if key in own and key not in skipped}
    missing = tuple(key for key in own if key not in tensors)
    unexpected = (*(key for key in tensors if key not in own and key not in skipped), *unknown)
    wrong = [
        f"{key}: expected {tuple(own[key].shape)}, got {keys.shape_of(tensor)}"
        for key, tensor in _usable(loaded, source).items()
        if keys.shape_of(tensor) != tuple(own[key].shape)
    ]
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors do not fit: {keys.first(wrong, '; ')}"
        )
    if strict and (missing or unexpected):
        problems = [f"lacks {len(missing)} of the model's tensors ({keys.first(missing)})"]
        problems = problems if missing else []
        if unexpected:
            problems.append(f"has {len(unexpected)} the model lacks ({keys.first(unexpected)})")
        raise CheckpointError(
            f"{source}: strict=True expected exactly the model's tensors, the checkpoint "
            f"{' and '.join(problems)}"
        )
    model.load_state_dict(
        {own_keys[key]: tensor.detach().to(own[key].dtype) for key, tensor in loaded.items()},
        strict=False,
    )
    resized = {key: why for key, why in skipped.items() if key in own}
    if resized:
        warnings.warn(
            f"{source}: left out {', '.join(resized)}, the model keeps its own: "
            f"{next(iter(resized.values()))}",
            stacklevel=2,
        )
    return LoadReport(len(loaded), missing, unexpected, skipped)


def _kind_of_model(model: nn.Module) -> Kind:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    # Wrappers hold the model somewhere inside.
    for module in model.modules():
        for base in type(module).__mro__:
            if base.__module__.startswith(__package__ or "") and base.__name__ in KINDS:
                return KINDS[base.__name__]
    raise TypeError(
        "model: expected one of retinanet(), mask_rcnn() or semantic_fpn(), got "
        f"{type(model).__name__}"
    )


def _check_version(content: Any, source: str) -> None:
    """mmdetection 1 had anchors half a pixel off, and background first: same shapes, other boxes."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    version = meta.get("mmdet_version") if isinstance(meta, Mapping) else None
    if isinstance(version, str) and re.match(r"[01]\.", version):
        raise CheckpointError(
            f"{source}: expected the layout of mmdetection 2 or 3, got a file of mmdetection {version}, "
            "whose anchors lie elsewhere and whose classes are in another order"
        )


def _check_kind(tensors: Mapping[str, Tensor], kind: Kind, source: str) -> None:
    found = kind_of(tensors)
    if found in KINDS and KINDS[found] is kind:
        return
    hint = ""
    if found == "a network without a head":
        hint = "; load it by load_checkpoint(model.backbone.body, ...)"
    raise CheckpointError(
        f"{source}: expected weights of {kind.name}, got those of "
        f"{KINDS[found].name if found in KINDS else found} with keys {keys.names(tensors)}{hint}"
    )


def _check_size(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    theirs, ours = (keys.stages_of(_body(state)) for state in (tensors, own))
    if theirs and ours and not keys.same_size(theirs, ours):
        raise CheckpointError(
            f"{source}: this is {keys.describe(theirs)} file, the model is {keys.describe(ours)}"
        )


def _body(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "backbone.body."
    return {key[len(prefix) :]: t for key, t in state.items() if key.startswith(prefix)}


def _usable(tensors: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    for key, tensor in tensors.items():
        if why := keys.unusable(tensor):
            raise CheckpointError(
                f"{source}: {key}: expected a dense tensor with storage, got {why}"
            )
    return tensors


def _left_out(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], kind: Kind
) -> dict[str, str]:
    """What the model does without, and why."""
    skipped = {}
    for layer, (rows, background) in kind.classes.items():
        for key in (f"{layer}.weight", f"{layer}.bias"):
            if key not in tensors or key not in own:
                continue
            theirs, ours = keys.shape_of(tensors[key]), keys.shape_of(own[key])
            if theirs[1:] == ours[1:] and theirs[:1] != ours[:1] and theirs[0] % rows == 0:
                skipped[key] = (
                    f"the checkpoint has {theirs[0] // rows - background} classes, "
                    f"the model {ours[0] // rows - background}"
                )
    for key in tensors:
        if key not in own and _STAGE.match(key):
            skipped[key] = "the model is built without this stage or its norm (out_indices)"
    return skipped
