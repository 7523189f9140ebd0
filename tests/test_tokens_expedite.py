"""`expedite` on models of many families: as by hand, dense for everybody, undone without a trace."""

import copy
import pickle

import pytest
import torch
from torch import nn

from casvit_kernels.tokens import (
    PRESETS,
    cluster_tokens,
    deferred,
    expedite,
    reconstruct_tokens,
    unexpedite,
)

timm = pytest.importorskip("timm")

WHOLE = {
    "iterations": 0,
    "neighbours": 1,
    "norm": "sum",
}  # on a grid as fine as the map: the identity


def timm_model(name, **kwargs):
    return timm.create_model(name, pretrained=False, num_classes=5, depth=4, **kwargs)


def small(config, **kwargs):
    return config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
        **kwargs,
    )


def hugging_face(name, kind, **kwargs):
    transformers = pytest.importorskip("transformers")
    config = small(getattr(transformers, f"{name}Config"), **kwargs)
    return getattr(transformers, f"{name}{kind}")(config)


STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
# Of timm: name, patch size, tokens.
TIMM = {
    "vit": ("vit_tiny_patch16_224", 16, (4, 6)),
    "dinov2": ("vit_small_patch14_dinov2", 14, (4, 6)),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", 14, (4, 6)),
    "dinov3": ("vit_small_patch16_dinov3", 16, (5, 6)),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", 16, (4, 6)),
    "deit3": ("deit3_small_patch16_224", 16, (4, 6)),
    "beit": ("beit_base_patch16_224", 16, (4, 6)),
    "eva02": ("eva02_tiny_patch14_224", 14, (4, 6)),
}
HUGGING_FACE = {
    "hf_vit": (lambda: hugging_face("ViT", "Model"), (4, 4)),
    "hf_dinov2": (lambda: hugging_face("Dinov2", "Model"), (4, 6)),
    "hf_dinov2_reg": (lambda: hugging_face("Dinov2WithRegisters", "Model"), (4, 6)),
    "hf_dinov3": (lambda: hugging_face("DINOv3ViT", "Model", num_register_tokens=2), (4, 6)),
    "hf_dinov2_backbone": (lambda: hugging_face("Dinov2", "Backbone", **STAGES), (4, 6)),
}
FAMILIES = [*TIMM, *HUGGING_FACE]


def made(family):
    """A model with weights that hide nothing, two images, and the size of their map."""
    torch.manual_seed(0)
    if family in TIMM:
        name, patch, tokens = TIMM[family]
        size = (patch * tokens[0], patch * tokens[1])
        model = timm_model(name, img_size=size, embed_dim=48, num_heads=4)
    else:
        make, tokens = HUGGING_FACE[family]
        size, model = (16 * tokens[0], 16 * tokens[1]), make()
    with torch.no_grad():  # tables of zeros and layers scaled to nothing would
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), torch.randn(2, 3, *size), tokens


def outputs(model, x):
    """All that a model gives: its output and its intermediate ones."""
    if hasattr(model, "forward_intermediates"):
        _, maps = model.forward_intermediates(x)
        return [model(x), *maps, *model.forward_intermediates(x, output_fmt="NLC")[1]]
    out = model(x, output_hidden_states=True)
    first = [out[0]] if isinstance(out[0], torch.Tensor) else list(out[0])
    return [*first, *out.hidden_states]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_clusters_of_one_token_change_nothing(family):
    model, x, tokens = made(family)
    plain = outputs(model, x)
    expedite(model, 2, tokens, **WHOLE)
    assert len(model.state_dict()) == len(made(family)[0].state_dict())
    for ours, theirs in zip(outputs(model, x), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_is_dense_and_unexpedite_leaves_nothing(family):
    model, x, _ = made(family)
    plain = outputs(model, x)
    keys = list(model.state_dict())
    hooks = counted_hooks(model)
    report = expedite(model, 1, (3, 3), 3, norm="sum")
    assert (report.tokens_after, report.at, report.until, report.depth) == (
        9 + report.prefix,
        1,
        3,
        4,
    )
    found = outputs(model, x)
    assert [t.shape for t in found] == [t.shape for t in plain]
    if family in HUGGING_FACE:  # what a model's call returns is no deferred map
        assert all(type(t) is torch.Tensor for t in found)
    assert not torch.equal(found[-1], plain[-1])
    assert all(t.isfinite().all() for t in found)
    assert list(model.state_dict()) == keys
    unexpedite(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), plain, strict=True))
    assert counted_hooks(model) == hooks
    kept = [value for module in model.modules() for value in vars(module).values()]
    assert not any(type(value).__module__.startswith("casvit_kernels") for value in kept)


def counted_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


SETTINGS = {"iterations": 3, "window": 3, "temperature": 0.05}


@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "deit3", "dinov3"])
def test_as_by_hand(family):
    model, x, size = made(family)
    embedded = model._pos_embed(model.patch_embed(x))
    tokens, full, own = embedded, {}, {}
    if family == "dinov3":
        tokens, full = embedded[0], {"rope": embedded[1]}
    prefix, grid = model.num_prefix_tokens, (3, 4)
    first = model.blocks[0](model.norm_pre(tokens), **full)
    clusters = cluster_tokens(first[:, prefix:], size, grid, **SETTINGS)
    if family == "dinov3":  # the model's own module, at the mean position of a centre's tokens
        at = 2 * (clusters.positions() + 0.5) / torch.tensor(size) - 1
        table = model.rope._get_pos_embed_from_coords(at.flatten(0, 1))
        own = {"rope": torch.cat(table, 1).unflatten(0, at.shape[:2])[:, None]}
    second = model.blocks[1](torch.cat((first[:, :prefix], clusters.centres), 1), **own)
    third = model.blocks[2](second, **own)
    expected = [first]
    for y in (second, third):
        maps = reconstruct_tokens(y[:, prefix:], clusters, neighbours=2)
        expected.append(torch.cat((y[:, :prefix], maps), 1))
    expected.append(model.blocks[3](expected[-1], **full))

    expedite(model, 1, grid, 3, neighbours=2, **SETTINGS)
    final, maps = model.forward_intermediates(x, output_fmt="NLC")
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, prefix:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, model.norm(expected[-1]), rtol=1e-4, atol=1e-4)
    head = model.forward_head(model.norm(expected[-1]))
    torch.testing.assert_close(model(x), head, rtol=1e-4, atol=1e-4)


def test_hidden_states_as_by_hand():
    model, x, size = made("hf_dinov2_reg")
    hidden = model(x, output_hidden_states=True).hidden_states
    clusters = cluster_tokens(hidden[3][:, 5:], size, (2, 3))
    layer = next(m for n, m in model.named_modules() if n.endswith("layer.3"))
    tokens = layer(torch.cat((hidden[3][:, :5], clusters.centres), 1), None)
    expected = torch.cat((tokens[:, :5], reconstruct_tokens(tokens[:, 5:], clusters)), 1)
    report = expedite(model, 3, (2, 3))
    assert report.prefix == 5
    found = model(x, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(found[:4], hidden[:4], strict=True))
    torch.testing.assert_close(found[4], expected, rtol=1e-4, atol=1e-5)


def test_maps_are_rebuilt_for_those_who_look(monkeypatch):
    model, x, _ = made("vit")
    count = []

    def counted(*args, **kwargs):
        count.append(1)
        return reconstruct_tokens(*args, **kwargs)

    monkeypatch.setattr(deferred, "reconstruct_tokens", counted)
    expedite(model, 1, (3, 4))
    model(x)
    assert len(count) == 1
    seen = []
    handle = model.blocks[2].register_forward_hook(lambda m, args, out: seen.append(out))
    model(x)
    assert len(count) == 2
    assert seen[0].shape == (2, 25, 48)
    assert seen[0].dtype == torch.float32
    assert len(count) == 2  # a shape is no look
    seen[0].sum()
    seen[0].mean()
    assert len(count) == 3
    handle.remove()
    model.forward_intermediates(x, indices=[1, 3])
    assert len(count) == 5


def test_features_only_and_intermediate_layers():
    model, x, _ = made("dinov2_reg")
    wrapper = timm.create_model(
        "vit_tiny_patch16_224",
        features_only=True,
        out_indices=(1, 2),
        pretrained=False,
        img_size=64,
    ).eval()
    plain = wrapper(torch.ones(1, 3, 64, 64))
    expedite(wrapper, 2, (4, 4), **WHOLE)
    for ours, theirs in zip(wrapper(torch.ones(1, 3, 64, 64)), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    expedite(model, 1, (3, 4))
    layers = model.get_intermediate_layers(x, n=[1, 3], reshape=True, return_prefix_tokens=True)
    assert [(a.shape, b.shape) for a, b in layers] == [((2, 48, 4, 6), (2, 5, 48))] * 2


def test_sizes_and_batches_that_change():
    torch.manual_seed(0)
    model = timm_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    expedite(model, 1, (2, 3), iterations=2)
    fresh = copy.deepcopy(model)
    for size, batch in (((64, 96), 2), ((96, 64), 1), ((64, 96), 3), ((48, 48), 1)):
        x = torch.randn(batch, 3, *size)
        ours = model.forward_intermediates(x, intermediates_only=True)
        assert [t.shape[2:] for t in ours] == [(size[0] // 16, size[1] // 16)] * 4
        alone = copy.deepcopy(fresh).forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))
    with pytest.raises(ValueError, match="grid: expected at most the map's 1 x 4, got 2 x 3"):
        model(torch.randn(1, 3, 16, 64))


@pytest.mark.parametrize("family", ["vit", "dinov3", "beit"])
def test_batch_mates_do_not_matter(family):
    model, x, _ = made(family)
    expedite(model, 1, (3, 4))
    other = x.clone()
    other[1] *= -3
    assert torch.equal(model(x)[0], model(other)[0])


@pytest.mark.parametrize("family", ["vit", "beit", "eva02", "hf_dinov3"])
def test_copies_are_expedited_on_their_own(family):
    model, x, _ = made(family)
    plain = outputs(copy.deepcopy(model), x)[0]
    expedite(model, 1, (3, 3))
    pickled = pickle.loads(pickle.dumps(model))
    expected = outputs(model, x)[0]
    for other in (copy.deepcopy(model), pickled):
        assert torch.equal(outputs(other, x)[0], expected)
        unexpedite(other)
        assert torch.equal(outputs(other, x)[0], plain)
    assert torch.equal(outputs(model, x)[0], expected)


def test_presets():
    assert PRESETS["segmenter_vit_large_ade20k"].settings == {
        "at": 10,
        "grid": (28, 28),
        "iterations": 5,
        "window": 5,
        "temperature": 0.02,
        "neighbours": 20,
    }
    with pytest.raises(ValueError, match="inside of each attention window"):
        _ = PRESETS["mask2former_swin_large_ade20k"].settings


def test_the_report_counts_matrix_products():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=(64, 96), depth=4)
    report = expedite(model, 1, (2, 3), 3, iterations=2, window=3, reconstruction_window=1)
    c = 192
    patch, block = 24 * 3 * 256 * c, lambda t: t * 12 * c * c + 2 * t * t * c
    assert report.macs_before == patch + 4 * block(25)
    layers = 2 * 2 * 24 * 9 * c + 2 * 24 * 1 * c
    assert report.macs_after == patch + 2 * block(25) + 2 * block(7) + layers
    assert report.for_size((8, 8)).tokens_before == 65
    assert "blocks[1] to blocks[2] of 4 blocks run on 2 x 3 centres" in str(report)


def test_a_model_without_patch_embedding_is_told_its_size():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
            self.blocks = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Plain().eval(), torch.randn(2, 12, 8)
    plain = model(x)
    expedite(model, 1, (3, 4), size=(3, 4), **WHOLE)
    torch.testing.assert_close(model(x), plain)
    unexpedite(model)
    expedite(model, 1, (2, 2), blocks=model.blocks)
    with pytest.raises(ValueError, match=r"blocks\[1\]: height and width of the map of 12 tokens"):
        model(x)


def test_with_the_residual_blocks_that_change_nothing_lose_nothing():
    """Blocks that add 0: the tokens come back as they were clustered, whatever the grid."""
    torch.manual_seed(0)
    model = timm_model("vit_tiny_patch16_224", img_size=(64, 96)).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for block in model.blocks[2:]:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
        expected = model.forward_features(x)
        expedite(model, at=2, grid=(2, 3), norm="sum", residual=True)
        torch.testing.assert_close(model.forward_features(x), expected)
        unexpedite(model)
        expedite(model, at=2, grid=(2, 3), norm="sum")
        assert (model.forward_features(x) - expected).abs().max() > 0.1
    with pytest.raises(TypeError, match="residual: expected True or False, got 1"):
        expedite(timm_model("vit_tiny_patch16_224"), at=2, grid=(2, 3), residual=1)
