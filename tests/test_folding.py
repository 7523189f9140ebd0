"""`fold_for_inference`: what is folded, what is left and said so, and that nothing else changes."""

import copy

import published_mixer
import pytest
import torch
from mixers import filled
from torch import nn

from casvit_kernels import FusedCATM, fold_for_inference, fuse
from casvit_kernels.models import Config, RCViT

CONFIG = Config((1, 1, 2, 1), (8, 8, 12, 20))


def statistics(model, seed=0):
    """Random statistics and norms; the other weights stay as initialised, so that nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.3, generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
            m.weight.data.uniform_(0.5, 2, generator=generator)
            m.bias.data.normal_(0, 0.3, generator=generator)
    return model


def outputs(model, x):
    with torch.no_grad():
        out = model(x)
    return list(out) if isinstance(out, (list, tuple)) else [out]


def folded_and_equal(model, x, rtol=1e-5):
    """The folded copy, after it was held against the original."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    folded = fold_for_inference(model)
    assert dict(model.named_modules()) == modules
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(m.training for m in folded.modules())
    original = copy.deepcopy(model).eval()
    got, expected = outputs(folded, x), outputs(original, x)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())
    return folded


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"distillation": False}, {"drop_path_rate": 0.3, "drop_rate": 0.1}]
)
def test_every_norm_of_a_classifier(fused, options):
    model = statistics(RCViT(CONFIG, num_classes=7, fused=fused, **options))
    folded = folded_and_equal(model, torch.randn(2, 3, 70, 45))
    report = folded.fold_report
    assert {fold.norm for fold in report.folded} == set(norms(model))
    assert report.left == ()
    assert norms(folded) == []
    into = {fold.norm: fold.into for fold in report.folded}
    assert into["network.0.0.norm1"] == ("network.0.0.attn.qkv",)
    assert into["network.0.0.norm2"] == ("network.0.0.mlp.fc1",)
    assert into["network.1.norm"] == ("network.1.proj",)
    assert into["norm"] == (("head",) if "distillation" in options else ("head", "dist_head"))
    before, after = report.parameters
    assert before == sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    assert after == sum(t.numel() for t in folded.state_dict().values() if t.is_floating_point())
    assert report.nodes[0] - report.nodes[1] == len(norms(model))
    assert f"{before - after:,} fewer" in str(report)


def test_a_dense_backbone_keeps_the_norms_of_its_outputs():
    model = statistics(RCViT(CONFIG, fork_feat=True))
    folded = folded_and_equal(model, torch.randn(1, 3, 64, 64))
    assert norms(folded) == ["norm0", "norm2", "norm4", "norm6"]
    assert {name for name, _ in folded.fold_report.left} == set(norms(folded))
    assert all("returned by the model" in reason for _, reason in folded.fold_report.left)
    assert "norm0: " in str(folded.fold_report)


@pytest.mark.parametrize("mixer", [published_mixer.CopiedMixer, published_mixer.RewrittenMixer])
@pytest.mark.parametrize("fused", [False, True])
def test_somebody_else_s_network(mixer, fused):
    model = filled(published_mixer.Net(mixer))
    if fused:
        fuse(model)
    folded = folded_and_equal(model, torch.randn(2, 3, 20, 21))
    assert len(folded.fold_report.folded) == 6
    assert folded.fold_report.left == ()
    assert norms(folded) == []


@pytest.mark.parametrize("bias", [False, True])
def test_a_single_mixer(bias):
    mixer = filled(FusedCATM(8, attn_bias=bias))
    folded = folded_and_equal(mixer, torch.randn(2, 8, 5, 7))
    assert isinstance(folded, FusedCATM)
    assert len(folded.fold_report.folded) == 2


def test_folding_twice_changes_nothing():
    folded = fold_for_inference(statistics(RCViT(CONFIG, fused=True)).eval())
    again = fold_for_inference(folded)
    for name, value in folded.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert again.fold_report.parameters[0] == again.fold_report.parameters[1]


def test_half_precision_stays_half():
    model = statistics(RCViT(CONFIG, num_classes=5)).bfloat16().eval()
    folded = folded_and_equal(model, torch.randn(1, 3, 64, 64).bfloat16(), rtol=0.05)
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}


def test_a_trained_norm_without_affine_part():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    model(torch.randn(4, 3, 9, 9))
    assert norms(folded_and_equal(model, torch.randn(2, 3, 8, 8))) == []


class _Scaled(nn.Module):
    """Layer scale, as in relatives of the published block."""

    def __init__(self, layer):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.layer = layer
        self.gamma = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x):
        return x + self.gamma * self.layer(self.norm(x))


def test_layer_scale():
    model = statistics(nn.Sequential(nn.Conv2d(3, 4, 1), _Scaled(nn.Conv2d(4, 4, 1, groups=2))))
    assert norms(folded_and_equal(model, torch.randn(2, 3, 8, 8))) == []


class _Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x + 1)


class _Tapped(_Shared):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) * y


class _Returned(_Shared):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), y


class _Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.norm(x))


class _Maximum(nn.Module):
    """A head behind another pooling: a negative scale would choose another pixel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.stem(x) + x).amax((2, 3)))


class _Hidden(_Padded):
    """Reads its norm's input behind PyTorch's back."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.norm(x)
        return self.conv(y) + float(y.numpy().mean())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_Shared, "called more than once"),
        (_Tapped, "output of conv is used elsewhere"),
        (_Returned, "output of conv is used elsewhere"),
        (_Padded, "conv behind it is no 1x1 convolution without padding"),
        (_Maximum, "head does not read the spatial mean"),
        (_Hidden, "computes something else without it"),
    ],
)
def test_what_cannot_be_folded_is_left_and_named(model, reason):
    folded = folded_and_equal(statistics(model()), torch.randn(2, 4, 6, 6))
    assert norms(folded) == ["norm"]
    ((name, why),) = folded.fold_report.left
    assert name == "norm"
    assert reason in why


def test_hooks_and_parametrizations_are_respected():
    model = statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    seen = []
    model[1].register_forward_hook(lambda *arguments: seen.append(1))
    assert norms(fold_for_inference(model)) == ["1"]
    model = statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    nn.utils.parametrizations.weight_norm(model[0])
    folded = folded_and_equal(model, torch.randn(1, 3, 4, 4))
    assert "computed or shared" in folded.fold_report.left[0].reason


def test_weights_that_would_overflow():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half().eval()
    model[0].weight.data.fill_(60000.0)
    model[1].weight.data.fill_(2.0)
    assert fold_for_inference(model).fold_report.left[0].reason.endswith("overflow their dtype")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1],), TypeError, r"model: expected a torch\.nn\.Module, got list"),
        ((FusedCATM(4).to("meta"),), ValueError, "model: .*meta device"),
        ((nn.Linear(3, 3),), ValueError, "pass example_input"),
        ((FusedCATM(4), [1]), TypeError, "example_input: expected a floating tensor"),
        ((FusedCATM(4), torch.ones(1, 3, 4, 4)), ValueError, r"example_input: .*\(1, 3, 4, 4\)"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fold_for_inference(*arguments)
