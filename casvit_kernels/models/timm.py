"""Makes the RCViT family known to timm: `timm.create_model("rcvit_xs")`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from . import rcvit
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


def _entrypoint(name: str) -> Callable[..., RCViT]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        features_only: bool = False,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        **options: Any,
    ) -> RCViT:
        from timm.models import FeatureInfo, resolve_pretrained_cfg

        if pretrained:
            raise ValueError(
                f"pretrained: expected False, no weights of {name} are shipped, got True; "
                "load a file with casvit_kernels.models.load_checkpoint"
            )
        if features_only and tuple(out_indices) != (0, 1, 2, 3):
            raise ValueError(f"out_indices: expected (0, 1, 2, 3), got {out_indices!r}")
        for unused in _UNUSED:
            options.pop(unused, None)
        if features_only:
            options["fork_feat"] = True
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay).to_dict()
        options.setdefault("num_classes", cfg["num_classes"])
        options.setdefault("in_chans", cfg["input_size"][0])
        model: RCViT = getattr(rcvit, name)(**options)
        model.pretrained_cfg = model.default_cfg = cfg
        if model.fork_feat:
            stages = [
                {"num_chs": dim, "reduction": 4 << index, "module": f"network.{2 * index}"}
                for index, dim in enumerate(model.config.dims)
            ]
            model.feature_info = FeatureInfo(stages, (0, 1, 2, 3))
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name} for timm.create_model; options as casvit_kernels.models.{name}."
    return create
