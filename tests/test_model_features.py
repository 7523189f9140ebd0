"""RCViT as a feature extractor and in training scripts: what timm's models offer, it offers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from casvit_kernels import fuse
from casvit_kernels.models import CONFIGS, Config, RCViT, rcvit_xs

TINY = Config((1, 1, 2, 1), (8, 12, 16, 20))
INDICES: list[Any] = [None, 1, 2, 4, (0,), (-1,), [1, 2, 3], (0, -1), (-2, -3), (2, 0), (3, -1)]


def tiny(**options: Any) -> RCViT:
    torch.manual_seed(0)
    return RCViT(TINY, **{"num_classes": 5, **options})


def shapes(maps: Any) -> list[tuple[int, ...]]:
    return [tuple(map_.shape) for map_ in maps]


def kept(indices: Any) -> list[int]:
    """The stages that timm's models give for indices."""
    if indices is None:
        return [0, 1, 2, 3]
    chosen = range(4 - indices, 4) if isinstance(indices, int) else indices
    return sorted({index % 4 for index in chosen})


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {key: buffer.clone() for key, buffer in model.named_buffers()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("out_indices", [i for i in INDICES if i != (3, -1)])
def test_a_dense_backbone_returns_the_stages_asked_for(out_indices: Any, fused: bool) -> None:
    whole = tiny(fork_feat=True, fused=fused).eval()
    model = tiny(fork_feat=True, fused=fused, out_indices=out_indices).eval()
    stages = kept(out_indices)
    state = whole.state_dict()
    assert model.out_indices == tuple(stages)
    assert list(model.state_dict()) == [
        key
        for key in state
        if not key.startswith("network.") or int(key.split(".")[1]) <= 2 * stages[-1]
        if not key.startswith("norm") or int(key[4]) // 2 in stages
    ]
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    x = torch.randn(2, 3, 72, 64)
    with torch.no_grad():
        maps, expected = model(x), [whole(x)[index] for index in stages]
        assert torch.equal(model.forward_features(x), expected[-1])
    assert isinstance(maps, list)
    for ours, theirs in zip(maps, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert model.num_features == maps[-1].shape[1]


def test_every_parameter_of_a_dense_backbone_gets_a_gradient() -> None:
    # DistributedDataParallel refuses a model with parameters that take no part.
    for out_indices in INDICES[:-1]:
        model = tiny(fork_feat=True, out_indices=out_indices)
        sum(map_.sum() for map_ in model(torch.randn(2, 3, 64, 64))).backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"out_indices": (4,)}, ValueError, r"out_indices: expected stages from -4 to 3.* \(4,\)"),
        ({"out_indices": (-5, 1)}, ValueError, r"out_indices: .* got \(-5, 1\)"),
        ({"out_indices": ()}, ValueError, r"out_indices: .*at least one, got \(\)"),
        ({"out_indices": 0}, ValueError, r"out_indices: expected 1 to 4 .* got 0"),
        ({"out_indices": 5}, ValueError, r"out_indices: .* got 5"),
        ({"out_indices": (3, -1)}, ValueError, r"out_indices: expected each stage once"),
        ({"out_indices": (1.0,)}, TypeError, r"out_indices: .* got \(1.0,\)"),
        ({"out_indices": True}, TypeError, r"out_indices: .* got True"),
        ({"out_indices": "12"}, TypeError, r"out_indices: .* got '12'"),
        (
            {"out_indices": (1,), "fork_feat": False},
            ValueError,
            r"out_indices: expected None with fork_feat=False",
        ),
    ],
)
def test_bad_indices_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny(**{"fork_feat": True, **options})


@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("indices", INDICES)
def test_intermediates_are_those_of_a_timm_cnn(indices: Any, norm: bool, stop_early: bool) -> None:
    timm = pytest.importorskip("timm")
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=TINY.dims)
    ours, x = tiny().eval(), torch.randn(2, 3, 64, 64)
    call = {"indices": indices, "norm": norm, "stop_early": stop_early}
    with torch.no_grad():
        final, maps = ours.forward_intermediates(x, **call)
        their_final, their_maps = convnext.eval().forward_intermediates(x, **call)
        assert shapes(maps) == shapes(their_maps)
        assert final.shape == their_final.shape
        alone = ours.forward_intermediates(x, **call, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, maps, strict=True))

        raw = ours.forward_stages(x)
        expected = [raw[index] for index in kept(indices)]
        if norm and kept(indices)[-1] == 3:
            expected[-1] = ours.norm(expected[-1])
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
        whole = not stop_early or kept(indices)[-1] == 3
        last = ours.forward_features(x) if whole else raw[kept(indices)[-1]]
        assert torch.equal(final, last)


def test_the_signatures_are_those_of_a_timm_cnn() -> None:
    pytest.importorskip("timm")
    from timm.models.convnext import ConvNeXt

    for method in (
        "forward_intermediates",
        "prune_intermediate_layers",
        "set_grad_checkpointing",
        "group_matcher",
        "forward_head",
    ):
        ours, theirs = (inspect.signature(getattr(c, method)) for c in (RCViT, ConvNeXt))
        strip = [
            [(p.name, p.default, p.kind) for p in s.parameters.values()] for s in (ours, theirs)
        ]
        assert strip[0] == strip[1], method


def test_intermediates_of_a_dense_backbone() -> None:
    model, x = tiny(fork_feat=True).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(normed, model(x), strict=True))
        final, raw = model.forward_intermediates(x, indices=(0, 3))
        assert torch.equal(final, model(x)[3])
        assert torch.equal(model.norm0(raw[0]), normed[0])
        assert torch.equal(model.norm6(raw[1]), normed[3])


@pytest.mark.parametrize("fork_feat", [False, True])
def test_intermediates_in_training_norm_once(fork_feat: bool) -> None:
    model = tiny(fork_feat=fork_feat).train()
    model.forward_intermediates(torch.randn(2, 3, 64, 64), norm=True)
    counts = {key: int(b) for key, b in model.named_buffers() if key.endswith("batches_tracked")}
    assert set(counts.values()) == {1}


def test_bad_requests_for_intermediates_are_named() -> None:
    model, x = tiny(), torch.randn(1, 3, 64, 64)
    for call, error, message in (
        ({"output_fmt": "NHWC"}, ValueError, r"output_fmt: expected 'NCHW', got 'NHWC'"),
        ({"indices": (4,)}, ValueError, r"indices: .* got \(4,\)"),
        ({"indices": 5}, ValueError, r"indices: .* got 5"),
        ({"indices": (None,)}, TypeError, r"indices: .* got \(None,\)"),
    ):
        with pytest.raises(error, match=message):
            model.forward_intermediates(x, **call)
    with pytest.raises(ValueError, match="x: expected 4 dimensions"):
        model.forward_intermediates(x[0])


@pytest.mark.parametrize("prune_head", [False, True])
@pytest.mark.parametrize("prune_norm", [False, True])
@pytest.mark.parametrize("indices", [1, 2, (1,), (0, 2), (-1,), (-3, -2)])
def test_pruning_is_that_of_a_timm_cnn(indices: Any, prune_norm: bool, prune_head: bool) -> None:
    timm = pytest.importorskip("timm")
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=TINY.dims).eval()
    ours, x = tiny(distillation=False).eval(), torch.randn(2, 3, 64, 64)
    whole = copy.deepcopy(ours)
    call = {"prune_norm": prune_norm, "prune_head": prune_head}
    stages = ours.prune_intermediate_layers(indices, **call)
    assert stages == convnext.prune_intermediate_layers(indices, **call) == kept(indices)
    assert ours.num_features == convnext.num_features
    assert isinstance(ours.norm, nn.Identity) == (prune_norm or stages[-1] < 3)
    with torch.no_grad():
        maps = ours.forward_intermediates(x, stages, intermediates_only=True)
        expected = whole.forward_intermediates(x, stages, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
        if prune_head or stages[-1] < 3:
            assert ours.num_classes == convnext.num_classes == 0
            assert ours(x).shape == convnext(x).shape  # a map, not pooled
        else:
            assert ours(x).shape == (2, 5)
    assert set(ours.state_dict()) <= set(whole.state_dict())


def test_a_pruned_model_can_be_given_a_classifier() -> None:
    model = tiny().double()
    model.prune_intermediate_layers((1,))
    model.reset_classifier(3, "avg")
    head, dist_head = model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert head.shape == dist_head.shape == (2, 3)


def test_unpooled_features() -> None:
    model, x = tiny().eval(), torch.randn(1, 3, 64, 64)
    model.reset_classifier(0, "")
    with torch.no_grad():
        assert torch.equal(model(x), model.forward_features(x))
        assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    with pytest.raises(ValueError, match=r"global_pool: expected 'avg' with num_classes=3"):
        model.reset_classifier(3)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)


def test_wrapping_in_timms_feature_getter() -> None:
    pytest.importorskip("timm")
    from timm.models._features import FeatureGetterNet

    for norm in (False, True):
        getter = FeatureGetterNet(tiny().eval(), out_indices=(-3, -2), norm=norm)
        maps = getter(torch.randn(1, 3, 64, 64))
        assert [m.shape[1] for m in maps] == getter.feature_info.channels() == [12, 16]
        assert getter.feature_info.reduction() == [8, 16]


@pytest.mark.parametrize("out_indices", [i for i in INDICES if i not in (None, (3, -1))])
def test_features_only_is_that_of_a_timm_cnn(out_indices: Any) -> None:
    timm = pytest.importorskip("timm")
    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model("rcvit_xs", features_only=True, out_indices=out_indices).eval()
    with torch.no_grad():
        maps = model(x)
    info = model.feature_info
    assert [m.shape[1] for m in maps] == info.channels()
    assert [64 // m.shape[2] for m in maps] == info.reduction()
    assert info.module_name() == [f"network.{2 * index}" for index in kept(out_indices)]
    assert len(info) == 4
    assert info.channels([0, 1, 2, 3]) == list(CONFIGS["rcvit_xs"].dims)

    theirs = timm.create_model("convnext_atto", features_only=True, out_indices=out_indices).eval()
    with torch.no_grad():
        assert [m.shape[2:] for m in theirs(x)] == [m.shape[2:] for m in maps]
    assert sorted(theirs.feature_info.reduction()) == info.reduction()


def test_features_only_on_the_meta_device() -> None:
    # segmentation-models-pytorch asks a model without weights for its strides first.
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("rcvit_xs", features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert next(model.parameters()).is_meta


def test_transformers_takes_the_backbone() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    for out_indices, channels in ((None, [220]), ([1, 2, 3], [56, 112, 220])):
        config = transformers.TimmBackboneConfig(backbone="rcvit_xs", out_indices=out_indices)
        backbone = transformers.TimmBackbone(config).eval()
        assert backbone.channels == channels
        with torch.no_grad():
            maps = backbone(torch.randn(1, 3, 64, 64)).feature_maps
        assert [m.shape[1] for m in maps] == channels


def test_options_of_timm() -> None:
    timm = pytest.importorskip("timm")
    x = torch.randn(1, 3, 64, 64)
    assert timm.create_model("rcvit_xs", num_classes=7, global_pool="avg")(x)[0].shape == (1, 7)
    bare = timm.create_model("rcvit_xs", num_classes=0, global_pool="").eval()
    assert bare(x).shape == (1, 220, 2, 2)
    assert timm.create_model("rcvit_xs", dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    assert timm.create_model("rcvit_xs", device="meta").head.weight.is_meta
    assert timm.create_model("rcvit_xs", output_stride=32, bn_eps=None).num_classes == 1000
    for options, error, message in (
        ({"output_stride": 16}, ValueError, r"output_stride: expected 32"),
        ({"global_pool": "max"}, ValueError, r"global_pool: .* got 'max'"),
        ({"global_pool": ""}, ValueError, r"global_pool: expected 'avg' with num_classes=1000"),
        ({"out_indices": (1,)}, ValueError, r"out_indices: expected None with fork_feat=False"),
        ({"bn_eps": 1e-3, "img_size": 3}, TypeError, r"bn_eps, img_size: rcvit_xs has no such"),
        ({"pretrained": True}, ValueError, r"pretrained: .*load_checkpoint"),
    ):
        with pytest.raises(error, match=message):
            timm.create_model("rcvit_xs", **options)


def test_timm_loads_a_checkpoint(tmp_path: Any) -> None:
    timm = pytest.importorskip("timm")
    source = rcvit_xs(num_classes=5)
    torch.save({"model": source.state_dict()}, tmp_path / "xs.pth")
    model = timm.create_model("rcvit_xs", num_classes=5, checkpoint_path=str(tmp_path / "xs.pth"))
    assert torch.equal(model.head.weight, source.head.weight)


def test_layers_have_their_order_for_layerwise_learning_rates() -> None:
    pytest.importorskip("timm")
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay

    for model in (tiny(), tiny(fork_feat=True), tiny(fork_feat=True, out_indices=(1, 2))):
        layers = group_parameters(model, model.group_matcher(), reverse=True)
        assert layers["patch_embed.0.weight"] == 0
        assert layers["network.0.0.norm1.weight"] == 1
        # A downsampling belongs to the block behind it.
        assert layers["network.1.proj.weight"] == layers["network.2.0.norm1.weight"] == 2
        assert layers["network.4.0.norm1.weight"] == 3
        assert layers["network.4.1.norm1.weight"] == 4
        assert set(layers) == {name for name, _ in model.named_parameters()}
        coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        assert coarse["network.3.proj.weight"] == coarse["network.4.1.norm1.weight"] == 3
    model = tiny()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["norm.weight"] == layers["network.6.0.norm1.weight"] == 5
    assert layers["head.weight"] == layers["dist_head.bias"] == 6
    model.pretrained_cfg = {"classifier": ("head", "dist_head")}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == 7


class Recomputed:
    """Counts the calls of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        module.register_forward_pre_hook(self)

    def __call__(self, *args: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fork_feat", [False, True])
def test_checkpointed_blocks_train_as_the_others(fork_feat: bool, fused: bool) -> None:
    options = {"fork_feat": fork_feat, "fused": fused, "drop_path_rate": 0.3, "drop_rate": 0.1}
    plain, model = tiny(**options).train(), tiny(**options).train()
    model.set_grad_checkpointing()
    calls = Recomputed(model.network[4][1].mlp)
    frozen = [m.network[2][0].norm1.eval() for m in (plain, model)]
    frozen[0].running_mean.fill_(0.5)
    frozen[1].running_mean.fill_(0.5)
    for _ in range(2):
        x = torch.randn(4, 3, 64, 64)
        results = []
        for m in (plain, model):
            torch.manual_seed(5)
            outputs = m(x)
            sum(o.square().sum() for o in outputs).backward()
            results.append(outputs)
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
    assert calls.count == 4
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    # Written once a step, into the buffers that were there.
    before = statistics(plain)
    for name, buffer in statistics(model).items():
        assert torch.equal(buffer, before[name]), name
    assert int(model.network[0][0].norm1.num_batches_tracked) == 2
    assert int(frozen[1].num_batches_tracked) == 0


def test_checkpointing_alone_would_write_statistics_twice() -> None:
    # What set_grad_checkpointing avoids, and timm's models do.
    norm = nn.Sequential(nn.BatchNorm2d(3))
    out = torch.utils.checkpoint.checkpoint(norm, torch.randn(2, 3, 4, 4), use_reentrant=False)
    out.sum().backward()
    assert int(norm[0].num_batches_tracked) == 2


def test_checkpointing_can_be_repeated_and_switched_off() -> None:
    model = tiny().train()
    model.set_grad_checkpointing()
    calls = Recomputed(model.network[0][0].mlp)
    buffers = [id(buffer) for buffer in model.buffers()]
    head, _ = model(torch.randn(2, 3, 64, 64))
    head.sum().backward(retain_graph=True)
    head.sum().backward()
    assert calls.count == 3
    assert [id(buffer) for buffer in model.buffers()] == buffers
    assert int(model.network[0][0].norm1.num_batches_tracked) == 1
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert calls.count == 4
    model.set_grad_checkpointing(False)
    model(torch.randn(2, 3, 64, 64))[0].sum().backward()
    assert calls.count == 5


def test_an_error_in_the_recomputation_leaves_the_statistics() -> None:
    model = tiny().train()
    model.set_grad_checkpointing()
    block = model.network[0][0]
    out = model(torch.randn(2, 3, 64, 64))[0].sum()
    before = statistics(model)
    block.mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.backward()
    after = statistics(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_checkpointing_leaves_traces_and_compilers_alone() -> None:
    model = tiny().eval()
    expected = tiny().eval()
    model.set_grad_checkpointing()
    x = torch.randn(1, 3, 64, 64)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), expected(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected(x))


def test_checkpointing_holds_after_fuse() -> None:
    model = tiny().train()
    model.set_grad_checkpointing()
    fuse(model)
    calls = Recomputed(model.network[0][0].mlp)
    model(torch.randn(2, 3, 64, 64))[0].sum().backward()
    assert calls.count == 2


class WithoutReturn(RCViT):
    """As detection code overrides it: BatchNorms stay in eval, and nothing is returned."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


@pytest.mark.parametrize("fork_feat", [False, True])
def test_a_subclass_whose_train_returns_nothing(fork_feat: bool) -> None:
    model = WithoutReturn(TINY, num_classes=5, fork_feat=fork_feat)
    model.train()
    model.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    before = statistics(model)
    sum(o.sum() for o in model(x)).backward()
    assert all(torch.equal(b, before[key]) for key, b in statistics(model).items())
    model.forward_intermediates(x, norm=True)
    if not fork_feat:
        model.reset_classifier(7)
        assert model(x)[0].shape == (2, 7)
    model.prune_intermediate_layers((1,))
    model.eval()
    torch.fx.symbolic_trace(model)
