"""Makes the RCViT family known to timm: `timm.create_model("rcvit_xs")`."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from . import rcvit
from .indices import stage_indices
from .rcvit import CONFIGS, RCViT

# timm fills in the rest; the preprocessing is that of the published evaluation.
default_cfgs: dict[str, dict[str, Any]] = {
    name: {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.0",
        "classifier": ("head", "dist_head"),
    }
    for name in CONFIGS
}

# The published training script passes these and the published models disregard them.
_UNUSED = ("layer_scale_init_value", "head_init_scale", "input_res", "classifier_dropout")

_OPTIONS = frozenset(inspect.signature(RCViT).parameters) - {"config"}


def register() -> None:
    """Register every size with timm if that is installed; a name that is taken stays as it is."""
    if importlib.util.find_spec("timm") is None:
        return
    try:
        from timm.models import is_model, model_entrypoint, register_model
    except Exception as error:  # a timm that does not fit this torch must not cost the models
        warnings.warn(
            f"timm is installed but does not import, so it does not know the rcvit models: {error}",
            stacklevel=3,
        )
        return
    for name in CONFIGS:
        if not is_model(name):
            register_model(_entrypoint(name))
        elif (owner := model_entrypoint(name).__module__) != __name__:
            warnings.warn(
                f"timm knows a model {name} from {owner}: it is left in place, and "
                f"casvit_kernels.models.{name} is not registered",
                stacklevel=3,
            )


def _check_stride(name: str, asked: int, out_indices: int | Sequence[int] | None) -> None:
    """Raise unless the last stage that is built has at most this stride: nothing is dilated."""
    last = stage_indices("out_indices", out_indices, 4)[-1]
    possible = [stride for stride in (4, 8, 16, 32) if stride >= 4 << last]
    if asked not in possible:
        hint = " (out_indices without the last stages allows less)" if last and asked < 32 else ""
        raise ValueError(
            f"output_stride: expected {' or '.join(map(str, possible))}, as no stage of {name} is "
            f"dilated, got {asked!r}{hint}"
        )


def _entrypoint(name: str) -> Callable[..., RCViT]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        output_stride: int = 32,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> RCViT:
        from timm.models import FeatureInfo, resolve_pretrained_cfg

        if pretrained:
            raise ValueError(
                f"pretrained: expected False, no weights of {name} are shipped, got True; build the "
                "model without, then load a file with casvit_kernels.models.load_checkpoint"
            )
        _check_stride(name, output_stride, out_indices if features_only else None)
        for unused in _UNUSED:
            options.pop(unused, None)
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise TypeError(
                f"{', '.join(unknown)}: {name} has no such option; it has {', '.join(sorted(_OPTIONS))} "
                "and timm's own for every model"
            )
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay).to_dict()
        options.setdefault("num_classes", cfg["num_classes"])
        options.setdefault("in_chans", cfg["input_size"][0])
        if features_only:
            options["fork_feat"] = True
        with nullcontext() if device is None else torch.device(device):
            model: RCViT = getattr(rcvit, name)(out_indices=out_indices, **options)
        model.to(dtype=dtype)
        if not model.fork_feat and global_pool != "avg":
            model.reset_classifier(model.num_classes, global_pool)
        model.pretrained_cfg = model.default_cfg = cfg
        if model.fork_feat:
            model.feature_info = FeatureInfo(model.feature_info, model.out_indices)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{name} for timm.create_model; options as casvit_kernels.models.{name}.

    And those of timm: ``features_only`` (the model is a dense backbone, ``fork_feat=True``, and
    returns a list of normed maps, fine to coarse) with ``out_indices`` (any, negative ones, or how
    many of the last), ``global_pool`` ("avg", or "" with ``num_classes=0``), ``output_stride`` (32, or
    down to the stride of the last of ``out_indices``), ``device``, ``dtype``, ``pretrained`` (False: no
    weights are shipped).

    Raises:
        ValueError: an option is out of range (named in the message).
        TypeError: an option is unknown (named in the message).
    """
    return create
