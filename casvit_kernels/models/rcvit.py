"""The RCViT networks of CAS-ViT in four sizes, for classification and as dense backbones.

State-dict keys, their order and the initial weights drawn from a seed are those of the published
networks. Source: CAS-ViT, arXiv 2408.03703, section 3.3 and table 1.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
from torch import Tensor, fx, nn
from typing_extensions import Self

from ..module import FusedCATM
from ..ops.mixer.reference import AdditiveTokenMixer
from ..ops.tracing import exporting
from .blocks import AdditiveBlock, DropPath, Embedding, LocalIntegration, Mlp
from .indices import stage_indices

# The blocks are named here for models pickled when they stood in this file.
__all__ = [
    "CONFIGS",
    "AdditiveBlock",
    "Config",
    "DropPath",
    "Embedding",
    "LocalIntegration",
    "Mlp",
    "RCViT",
    "rcvit_m",
    "rcvit_s",
    "rcvit_t",
    "rcvit_xs",
]


class Config(NamedTuple):
    """One size of the family."""

    layers: tuple[int, int, int, int]  #: blocks of the four stages
    dims: tuple[int, int, int, int]  #: channels of the four stages


CONFIGS: dict[str, Config] = {
    "rcvit_xs": Config((2, 2, 4, 2), (48, 56, 112, 220)),
    "rcvit_s": Config((3, 3, 6, 3), (48, 64, 128, 256)),
    "rcvit_m": Config((3, 3, 6, 3), (64, 96, 192, 384)),
    "rcvit_t": Config((3, 3, 6, 3), (96, 128, 256, 512)),
}


class RCViT(nn.Module):
    """The CAS-ViT network: stem, four stages of blocks with downsampling between, head.

    Args:
        config: blocks and channels per stage; the named sizes are in `CONFIGS`.
        num_classes: outputs of the classifier; 0 leaves it out and returns pooled features.
        in_chans: channels of the input image.
        fork_feat: build a dense backbone: no classifier, returns the stage outputs normed.
        distillation: a second classifier `dist_head`; the pair is returned in training, its average
            in eval.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        drop_rate: dropout after each mixer and inside each Mlp.
        fused: build `FusedCATM` mixers in place of the published ones; same weights, same keys.
        backend: backend of the fused mixers, None to choose per call.
        out_indices: stages that a dense backbone returns, 0 to 3 or negative from the end, or how
            many of the last stages; None for all four. The model is built without what the others
            need alone: later stages and their own norms.

    Input: ``(B, in_chans, H, W)``, a floating dtype. Output, with C the last stage's channels:
    ``(B, num_classes)``; in training with distillation two of them; with ``num_classes=0``
    ``(B, C)``; with ``fork_feat`` a list of maps ``(B, C_i, ceil(H/s), ceil(W/s))`` with strides s
    of 4, 8, 16 and 32, or those of ``out_indices``, fine to coarse.

    ``feature_info`` describes the four stages as timm's models do: a list of channels
    (``num_chs``), strides (``reduction``) and names (``module``).

    Raises:
        ValueError: an argument is out of range (named in the message).

    Source: CAS-ViT, arXiv 2408.03703, section 3.3 and table 1.
    """

    # Of models pickled before these were attributes.
    global_pool = "avg"
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    norms_frozen = False

    def __init__(
        self,
        config: Config,
        /,
        num_classes: int = 1000,
        in_chans: int = 3,
        fork_feat: bool = False,
        distillation: bool = True,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        fused: bool = False,
        backend: str | None = None,
        out_indices: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _check_count("num_classes", num_classes, 0)
        _check_count("in_chans", in_chans, 1)
        _check_rate("drop_path_rate", drop_path_rate)
        _check_rate("drop_rate", drop_rate)
        _check_count("config.dims[0]", config.dims[0], 2)  # the stem has half of them
        if backend is not None and not fused:
            raise ValueError(
                f"backend: expected None with fused=False (plain mixers have no backend), "
                f"got {backend!r}"
            )
        if out_indices is not None and not fork_feat:
            raise ValueError(
                f"out_indices: expected None with fork_feat=False (one output), got {out_indices!r}"
            )
        self.config = config
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.fork_feat = fork_feat
        self.distillation = distillation
        self.num_features = config.dims[-1]
        self.feature_info: Any = [
            {"num_chs": dim, "reduction": 4 << index, "module": f"network.{2 * index}"}
            for index, dim in enumerate(config.dims)
        ]

        def mixer(dim: int) -> nn.Module:
            if fused:
                return FusedCATM(dim, proj_drop=drop_rate, backend=backend)
            return AdditiveTokenMixer(dim, proj_drop=drop_rate)

        layers, dims = config
        self.patch_embed = nn.Sequential(
            nn.Conv2d(in_chans, dims[0] // 2, 3, 2, 1),
            nn.BatchNorm2d(dims[0] // 2),
            nn.ReLU(),
            nn.Conv2d(dims[0] // 2, dims[0], 3, 2, 1),
            nn.BatchNorm2d(dims[0]),
            nn.ReLU(),
        )
        self.network = nn.ModuleList()
        last = max(sum(layers) - 1, 1)
        before = 0
        for index, (depth, dim) in enumerate(zip(layers, dims, strict=True)):
            if index > 0:
                self.network.append(Embedding(dims[index - 1], dim))
            blocks = [
                AdditiveBlock(dim, mixer, drop_rate, drop_path_rate * block / last)
                for block in range(before, before + depth)
            ]
            self.network.append(nn.Sequential(*blocks))
            before += depth

        if fork_feat:
            for index, dim in enumerate(dims):
                self.add_module(f"norm{2 * index}", nn.BatchNorm2d(dim))
            self._prune(stage_indices("out_indices", out_indices, len(dims), distinct=True))
        else:
            self.norm: nn.Module = nn.BatchNorm2d(dims[-1])
            self._make_heads(num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor] | list[Tensor]:
        """See the class for shapes.

        Raises:
            ValueError: ``x`` has not 4 dimensions or not ``in_chans`` channels.
            TypeError: ``x`` is no tensor of a floating dtype.
        """
        if self.fork_feat:
            return self.forward_stages(x)
        return self.forward_head(self.forward_features(x))

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all stages; of a dense backbone those of ``out_indices``, normed."""
        if not self.fork_feat:
            return self._run_stages(x, range(self._stages()))[1]
        maps = self._run_stages(x, self.out_indices)[1]
        return [
            self._normed(map_, index) for map_, index in zip(maps, self.out_indices, strict=True)
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map ``(B, C, ceil(H/32), ceil(W/32))``, normed."""
        last, _ = self._run_stages(x, ())
        return self._normed(last, self._stages() - 1)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of stages, with the contract of timm's models.

        Args:
            x: as for the model.
            indices: stages, negative from the end; or how many of the last; None for all.
            norm: norm the maps that the model has a norm for: the last of a classifier's, in a dense
                backbone those of ``out_indices``.
            stop_early: compute no stage behind the last one asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the maps alone.

        Returns:
            The maps, fine to coarse; unless ``intermediates_only`` behind the final map, which is
            that of `forward_features`, or with ``stop_early`` the last one computed.

        Raises:
            ValueError: an index is out of range, ``output_fmt`` is another, ``x`` as for the model.
            TypeError: ``indices`` holds something else than integers, ``x`` as for the model.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        wanted = stage_indices("indices", indices, self._stages())
        last = wanted[-1] if stop_early else self._stages() - 1
        final, maps = self._run_stages(x, wanted, last)
        if norm:
            maps = [self._normed(map_, index) for map_, index in zip(maps, wanted, strict=True)]
        if intermediates_only:
            return maps
        if last == self._stages() - 1:
            # Normed once: in training each call of a BatchNorm moves its statistics.
            final = maps[-1] if norm and wanted[-1] == last else self._normed(final, last)
        return final, maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the outputs of some stages do not need, as timm's models do.

        Stages behind the last one asked for go, and with them a classifier's norm and heads: the
        model then returns its last map. A dense backbone returns the maps of ``indices`` afterwards
        and loses the norms of others. Keys of the state dict that remain are the same.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: remove the norms, too.
            prune_head: remove the heads even when all stages stay.

        Returns:
            The stages asked for, counted from the first.

        Raises:
            ValueError: an index is out of range.
            TypeError: ``indices`` holds something else than integers.
        """
        wanted = stage_indices("indices", indices, self._stages())
        self._prune(wanted, prune_norm, prune_head)
        return list(wanted)

    def _prune(
        self, wanted: tuple[int, ...], prune_norm: bool = False, prune_head: bool = True
    ) -> None:
        last = wanted[-1]
        cut = last < self._stages() - 1
        if cut:
            self.network = self.network[: 2 * last + 1]
            self.num_features = self.config.dims[last]
        if self.fork_feat:
            self.out_indices = wanted
            for index in range(len(self.config.dims)):
                if prune_norm or index not in wanted:
                    self._modules.pop(f"norm{2 * index}", None)
        else:
            if prune_norm or cut:
                self.norm = nn.Identity()
            if prune_head or cut:
                self.reset_classifier(0, "")

    def sequential(self) -> nn.Sequential:
        """Stem and stages as children that run in order: ``stem``, ``stage0``, ``stage1``, ...

        For tools that take a network apart by its children, as torchvision's `BackboneWithFPN` does. The
        modules are the model's own, without norms of outputs and heads; a stage begins with its
        downsampling. ``(B, in_chans, H, W)`` to the last stage's map.
        """
        stages: dict[str, nn.Module] = {"stem": self.patch_embed}
        for index in range(self._stages()):
            down = [] if index == 0 else [self.network[2 * index - 1]]
            stages[f"stage{index}"] = nn.Sequential(*down, self.network[2 * index])
        return nn.Sequential(OrderedDict(stages))

    def freeze_norms(self, frozen: bool = True) -> Self:
        """Keep every BatchNorm in eval mode, whatever `train` says later: as in dense prediction.

        The running statistics then stay what they are and normalise in training, too. Weights and
        biases of the norms stay trainable. ``frozen=False`` gives them the model's mode again. Returns
        the model. Norms that `fuse` finds are shared by the fused mixers and stay as they are.
        """
        self.norms_frozen = frozen
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As for every module; norms that `freeze_norms` froze stay in eval mode."""
        super().train(mode)
        if self.norms_frozen:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward (`torch.utils.checkpoint`) instead of keeping it.

        Outputs, gradients and random draws are those without it. So are the running statistics of
        BatchNorm: the recomputation leaves them alone. (With `torch.utils.checkpoint` alone, and in
        timm's models, one step moves them twice.) Exports and `torch.fx` record plain blocks.
        """
        for module in self.modules():
            if isinstance(module, AdditiveBlock):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth for timm's layer-wise learning rates.

        Args:
            coarse: one group a stage instead of one a block. A downsampling belongs to what follows.
        """
        last = () if coarse else (0,)
        down = [(rf"^network\.{index - 1}\.", (index, *last)) for index in (2, 4, 6)]
        block = r"^network\.(\d+)\." if coarse else r"^network\.(\d+)\.(\d+)\."
        norms = (r"^norm", (99999,))  # timm's sign for the group before
        return {"stem": r"^patch_embed", "blocks": [*down, (block, None), norms]}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pool the map of `forward_features` and classify it; only pool it with ``pre_logits``."""
        pooled = x.mean((2, 3)) if self.global_pool else x
        if pre_logits or self.num_classes == 0:
            return pooled
        self._check_has_head("forward_head")
        logits: Tensor = self.head(pooled)
        if not self.distillation:
            return logits
        distilled: Tensor = self.dist_head(pooled)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The `head` layer, or `head` and `dist_head` with distillation."""
        self._check_has_head("get_classifier")
        return (self.head, self.dist_head) if self.distillation else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a freshly initialised one, 0 classes to leave it out.

        Args:
            num_classes: outputs of the new classifier.
            global_pool: ``"avg"``, or ``""`` to return the map unpooled (with 0 classes); None keeps
                what is set.

        Raises:
            ValueError: ``num_classes`` is negative or ``global_pool`` another.
            RuntimeError: the model is a dense backbone.
        """
        _check_count("num_classes", num_classes, 0)
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise ValueError(f"global_pool: expected 'avg', '' or None, got {global_pool!r}")
        if not pool and num_classes > 0:
            raise ValueError(
                f"global_pool: expected 'avg' with num_classes={num_classes} (a classifier takes "
                "pooled features), got ''"
            )
        self._check_has_head("reset_classifier")
        self.num_classes = num_classes
        self.global_pool = pool
        self._make_heads(num_classes)

    def _stages(self) -> int:
        """How many stages there are: four unless pruned."""
        return (len(self.network) + 1) // 2

    def _run_stages(
        self, x: Tensor, wanted: Collection[int], last: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The output of stage ``last`` (None: of all) and those of the stages wanted."""
        self._check_input(x)
        x = self.patch_embed(x)
        outputs = []
        for index, part in enumerate(self.network):
            if last is not None and index > 2 * last:
                break
            x = part(x)
            if index % 2 == 0 and index // 2 in wanted:
                outputs.append(x)
        return x, outputs

    def _normed(self, x: Tensor, stage: int) -> Tensor:
        """The map of a stage, through its norm where the model has one."""
        norm: nn.Module | None = None
        if self.fork_feat:
            norm = getattr(self, f"norm{2 * stage}", None)
        elif stage == self._stages() - 1:
            norm = self.norm
        if norm is None:
            return x
        out: Tensor = norm(x)
        return out

    def _make_heads(self, num_classes: int) -> None:
        def layer() -> nn.Module:
            if num_classes == 0:
                return nn.Identity()
            like = next(self.parameters())
            return nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)

        self.head = layer()
        if self.distillation:
            self.dist_head = layer()
        for head in self.head, getattr(self, "dist_head", None):
            if isinstance(head, nn.Linear):
                _init_head(head)
                head.train(self.training)

    def _check_has_head(self, method: str) -> None:
        if self.fork_feat:
            raise RuntimeError(f"{method}: expected a classifier, got a model with fork_feat=True")

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            if isinstance(
                x, fx.Proxy
            ):  # symbolic tracing: no dtype, no sizes, nothing to check yet
                return
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"x: expected 4 dimensions (B, C, H, W), got shape {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
        # In a trace sizes are tensors, and comparing them would be recorded with a warning.
        if not exporting() and x.shape[1] != self.in_chans:
            raise ValueError(
                f"x: expected {self.in_chans} channels (in_chans) in dimension 1, "
                f"got {x.shape[1]} in shape {tuple(x.shape)}"
            )


P = ParamSpec("P")


def _size(
    model: Callable[Concatenate[Config, P], RCViT], name: str, parameters: str
) -> Callable[P, RCViT]:
    def build(*args: P.args, **kwargs: P.kwargs) -> RCViT:
        return model(CONFIGS[name], *args, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"{name}: {parameters} parameters with two heads of 1000 classes.\n\n"
        "Arguments, shapes and errors as `RCViT`, without its config."
    )
    signature = inspect.signature(RCViT)
    build.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[1:], return_annotation=RCViT
    )
    return build


rcvit_xs = _size(RCViT, "rcvit_xs", "3,200,700")
rcvit_s = _size(RCViT, "rcvit_s", "5,764,224")
rcvit_m = _size(RCViT, "rcvit_m", "12,421,520")
rcvit_t = _size(RCViT, "rcvit_t", "21,763,120")


@torch.no_grad()
def _init_head(head: nn.Linear) -> None:
    """Normal with std 0.02 through the inverse CDF, biases 0.

    `nn.init.trunc_normal_` draws by rejection in newer versions of torch, so other numbers.
    """
    head.weight.uniform_(-1.0, 1.0).erfinv_().mul_(0.02 * math.sqrt(2.0)).clamp_(-2.0, 2.0)
    head.bias.zero_()


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def _check_rate(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value!r}")
