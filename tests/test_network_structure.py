"""What `fuse_network` finds in a model, whatever its classes; what it refuses, by layer and reason."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import TINY, Elsewhere, assert_right, tiny, trained
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from casvit_kernels import NetworkUnsupported, fuse, fuse_network
from casvit_kernels.models import Config, RCViT
from casvit_kernels.ops.network.plan import LOGITS, MAP, MAPS, POOLED, Plan, Stage
from casvit_kernels.surgery.find import find


def plan_of(model: nn.Module) -> Plan:
    return find(model).plan


def test_plans() -> None:
    stages = tuple(
        Stage(dim, (4 * dim,) * depth, False)
        for dim, depth in zip((8, 12, 16, 20), (1, 1, 2, 1), strict=True)
    )
    assert plan_of(tiny()) == Plan(3, 4, False, stages, LOGITS, 5)
    assert plan_of(tiny(num_classes=0)) == Plan(3, 4, False, stages, POOLED, 0)
    dense = plan_of(tiny(fork_feat=True, in_chans=2, out_indices=(1, 3)))
    returned = tuple(stage._replace(returned=i in (1, 3)) for i, stage in enumerate(stages))
    assert dense == Plan(2, 4, False, returned, MAPS, 0)
    model = tiny()
    model.reset_classifier(0, "")
    assert plan_of(model) == Plan(3, 4, False, stages, MAP, 0)
    elsewhere = plan_of(trained(Elsewhere()))
    assert elsewhere == Plan(
        4, 4, False, tuple(Stage(c, (3 * c,), False) for c in (8, 10, 12)), LOGITS, 6
    )
    assert fuse_network(model, normalize=([0.5] * 3, [0.2] * 3)).current_plan().normalized


def test_plans_as_integers() -> None:
    for model in (tiny(), tiny(fork_feat=True, out_indices=(0, 2)), trained(Elsewhere())):
        plan = plan_of(model)
        assert Plan.from_ints(plan.to_ints()) == plan
    assert plan_of(trained(Elsewhere())).to_ints() == [
        *(4, 4, 0, 3),
        *(8, 1, 0, 24, 10, 1, 0, 30, 12, 1, 0, 36),
        *(LOGITS, 6),
    ]


def test_finding_leaves_the_model_and_random_numbers_alone() -> None:
    model = tiny()
    fuse(model)
    hook = model.register_forward_hook(lambda *_: pytest.fail("the model itself was called"))
    before = {key: t.clone() for key, t in model.state_dict().items()}
    attributes = [set(vars(m)) for m in model.modules()]
    state = torch.get_rng_state()
    find(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert all(p.requires_grad for p in model.parameters())
    hook.remove()


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode(), torch.autocast("cpu"), torch.device("cpu"), torch.enable_grad()],
)
def test_finding_within_contexts(served, context: Any) -> None:
    model = tiny()
    with context:
        net = fuse_network(model)
    assert_right(net, model, torch.randn(1, 3, 40, 64))
    assert served.calls == 1


def norm_replaced(make: Callable[[int], nn.Module]) -> RCViT:
    model = tiny()
    model.norm = make(20)
    model.network[0][0].norm2 = make(8)
    model.network[2][0].attn.oper_k[0].block[1] = make(12)
    return trained(model)


def frozen(width: int) -> nn.Module:
    norm = FrozenBatchNorm2d(width, eps=1e-4)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize(
    "make",
    [
        frozen,
        nn.SyncBatchNorm,
        lambda width: nn.BatchNorm2d(width, affine=False),
        lambda width: nn.BatchNorm2d(width, eps=0.1),
        lambda width: nn.Identity(),
    ],
)
def test_norms(served, make: Callable[[int], nn.Module]) -> None:
    model = norm_replaced(make)
    assert_right(fuse_network(model), model, torch.randn(2, 3, 40, 64))
    assert served.calls == 1


class Pooled(nn.Module):
    """A head of its own behind somebody's backbone."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = tiny()
        self.body.reset_classifier(0, "")
        self.head = head
        self.last = nn.Linear(20, 3)
        self.one = nn.Conv2d(20, 3, 1)
        self.norm = trained(nn.BatchNorm1d(20))
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self, self.body(x))  # type: ignore[call-arg]


HEADS: dict[str, Callable[[Any, Tensor], Any]] = {
    "mean": lambda m, x: m.last(x.mean([-2, -1])),
    "mean of flat": lambda m, x: m.last(x.flatten(2).mean(2)),
    "mean of a view": lambda m, x: m.last(x.view(x.shape[0], 20, -1).mean(dim=-1)),
    "kept sides": lambda m, x: m.last(x.mean((2, 3), keepdim=True).flatten(1)),
    "squeezed": lambda m, x: m.last(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)),
    "indexed": lambda m, x: m.last(F.adaptive_avg_pool2d(x, 1)[..., 0, 0]),
    "convolution": lambda m, x: m.one(F.adaptive_avg_pool2d(x, (1, 1))).flatten(1),
    "whole map": lambda m, x: m.last(F.avg_pool2d(x, x.shape[2:]).reshape(x.shape[0], -1)),
    "weighed": lambda m, x: (
        0.25 * m.last(x.mean((2, 3))) + m.one(x.mean((2, 3), keepdim=True)).flatten(1).div(4)
    ),
    "dropout": lambda m, x: m.last(F.dropout(x.mean((2, 3)), 0.3, m.training)),
    "a list": lambda m, x: [m.last(x.mean((2, 3)))],
    "a dictionary": lambda m, x: {"logits": m.last(x.mean((2, 3)))},
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(served, name: str) -> None:
    model = Pooled(HEADS[name]).eval()
    x = torch.randn(2, 3, 50, 64)
    with torch.no_grad():
        got, expected = fuse_network(model)(x), model(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert served.calls == 1


def test_stochastic_depth_and_norms_of_pooled_features(served) -> None:
    model = tiny()
    for block in model.network[4]:
        block.drop_path = StochasticDepth(0.4, "row").eval()
    assert_right(fuse_network(model), model, torch.randn(2, 3, 50, 64))
    pooled = Pooled(lambda m, x: m.last(m.norm(x.mean((2, 3)))))  # type: ignore[call-arg,misc,arg-type]
    pooled.body.norm = nn.Identity()
    x = torch.randn(2, 3, 50, 64)
    assert served.calls == 1
    with torch.no_grad():
        torch.testing.assert_close(fuse_network(pooled.eval())(x), pooled(x), rtol=1e-4, atol=1e-5)
    assert served.calls == 2


# Refusals ----------------------------------------------------------------------------------------


def changed(path: str, key: str, module: nn.Module, **options: Any) -> nn.Module:
    model = tiny(**options)
    setattr(model.get_submodule(path), key, module)
    return model.eval()


def setting(path: str, **settings: Any) -> nn.Module:
    model = tiny()
    vars(model.get_submodule(path)).update(settings)
    return model


def conv(width: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(width, width, **{"kernel_size": 3, "padding": 1, **options})


class Scaled(nn.Module):
    """LayerScale, of ones: what it multiplies by hides in no output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def scaled() -> nn.Module:
    model = tiny()
    model.network[0][0].mlp = Scaled(model.network[0][0].mlp).eval()
    return model


def swapped() -> nn.Module:
    """Norms before the sums' other input."""
    model = tiny()
    block = model.network[0][0]

    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            block = self.block
            x = x + block.local_perception(x)
            x = x + block.attn(block.norm1(x))
            y = block.norm2(x)
            return y + block.mlp(y)

    model.network[0][0] = Post().eval()
    return model


REFUSED: list[tuple[Callable[[], nn.Module], str, str]] = [
    (lambda: changed("network.0.0.mlp", "act", nn.SiLU()), "network.0.0.mlp.act", "silu"),
    (lambda: changed("network.0.0.mlp", "act", nn.GELU("tanh")), "network.0.0.mlp.act", "gelu"),
    (
        lambda: changed("network.2.0.attn.oper_q.0.block", "2", nn.ReLU6()),
        "network.2.0.attn.oper_q.0.block.2",
        "expected a ReLU",
    ),
    (
        lambda: changed("network.2.0.attn.oper_k.1.block", "2", nn.Hardsigmoid()),
        "network.2.0.attn.oper_k.1.block.2",
        "expected a Sigmoid",
    ),
    (lambda: changed("patch_embed", "2", nn.GELU()), "patch_embed.2", "expected a ReLU"),
    (lambda: setting("patch_embed.0", stride=(1, 1)), "patch_embed.0", r"stride \(2, 2\)"),
    (lambda: setting("network.3.proj", padding=(2, 2)), "network.3.proj", r"padding \(1, 1\)"),
    (
        lambda: setting("network.4.1.attn.dwc", dilation=(2, 2), padding=(2, 2)),
        "network.4.1.attn.dwc",
        r"padding \(1, 1\), got \(2, 2\)",
    ),
    (
        lambda: setting(
            "patch_embed.0", padding_mode="reflect", _reversed_padding_repeated_twice=[1] * 4
        ),
        "patch_embed.0",
        "pad",
    ),
    (
        lambda: changed("network.0.0.local_perception.network", "2", conv(8)),
        "network.0.0.local_perception.network.2",
        "groups 8, got 1",
    ),
    (
        lambda: changed(
            "network.0.0.local_perception.network", "2", conv(8, kernel_size=5, padding=2, groups=8)
        ),
        "network.0.0.local_perception.network.2",
        r"kernel_size \(3, 3\)|padding",
    ),
    (
        lambda: changed("network.0.0.attn.oper_q.0.block", "3", nn.Conv2d(8, 1, 1)),
        "network.0.0.attn.oper_q.0.block.3",
        "no bias",
    ),
    (
        lambda: changed("network.0.0.attn.oper_q.0.block", "3", nn.Conv2d(8, 8, 1, bias=False)),
        "network.0.0.attn.oper_q.0.block.3",
        "spatial gate of 1 channel, got 8",
    ),
    (lambda: changed("", "norm", nn.InstanceNorm2d(20)), "norm", "instance_norm"),
    (lambda: changed("", "norm", nn.GroupNorm(2, 20)), "norm", "group_norm"),
    (
        lambda: changed("", "norm", nn.BatchNorm2d(20, track_running_stats=False)),
        "norm",
        "running statistics",
    ),
    (scaled, "network.0.0.mlp", "expected a Conv2d .*, got a product"),
    (swapped, "network.0.0.block.norm2", "expected a sum .*, got a BatchNorm"),
    (lambda: Pooled(lambda m, x: m.last(x.amax((2, 3)))), "", "amax"),  # type: ignore[call-arg,misc,arg-type]
    (
        lambda: Pooled(lambda m, x: m.last(m.pool(x)[:, :, 0, 0])),  # type: ignore[call-arg,misc,arg-type]
        "",
        "its own output .* is not that",
    ),
    (lambda: Pooled(lambda m, x: (m.last(x.mean((2, 3))), x.mean((2, 3)))), "", "returns more"),  # type: ignore[call-arg,misc,arg-type]
    (lambda: Pooled(lambda m, x: 3), "", "something else than tensors"),  # type: ignore[misc,arg-type]
    (lambda: nn.Linear(3, 3), "", "no Conv2d"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "0", "stride"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refused(case: int) -> None:
    make, layer, reason = REFUSED[case]
    with pytest.raises(NetworkUnsupported, match=reason) as caught:
        fuse_network(make().eval())
    assert caught.value.layer == layer
    assert (layer or "where the model:") in str(caught.value)


def test_computed_weights_are_refused_by_name() -> None:
    def pruned(model: nn.Module) -> None:
        prune.l1_unstructured(model.network[0][0].mlp.fc1, "weight", 0.3)

    def normed(model: nn.Module) -> None:
        weight_norm(model.network[0][0].mlp.fc1)

    def parametrized(model: nn.Module) -> None:
        parametrizations.weight_norm(model.network[0][0].mlp.fc1)

    for change, remedy in (
        (pruned, "prune.remove"),
        (normed, "remove_weight_norm"),
        (parametrized, "remove_p"),
    ):
        model = tiny()
        change(model.eval())
        model.eval()
        with pytest.raises(NetworkUnsupported, match=remedy) as caught:
            fuse_network(model)
        assert caught.value.layer == "network.0.0.mlp.fc1"
    model = tiny()
    pruned(model)
    prune.remove(model.network[0][0].mlp.fc1, "weight")
    fuse_network(model)


def test_compiled_and_fused_models_are_refused() -> None:
    model = tiny()
    traced = torch.jit.trace(model, torch.zeros(1, 3, 64, 64), check_trace=False)
    for other, reason in ((traced, "is TorchScript"), (torch.compile(model), "is compiled")):
        with pytest.raises(NetworkUnsupported, match=reason):
            fuse_network(other)
        with pytest.raises(NetworkUnsupported, match=f"1: {reason}"):
            fuse_network(nn.Sequential(nn.Identity(), other).eval())
    with pytest.raises(NetworkUnsupported, match=r"0: is a fused network: use its original\(\)"):
        fuse_network(nn.Sequential(fuse_network(model)))


def test_a_replaced_forward_is_refused() -> None:
    model = tiny()
    layer = model.network[0][0].mlp
    layer.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(NetworkUnsupported, match=r"network\.0\.0\.mlp: its forward is replaced"):
        fuse_network(model)


def test_what_a_recording_does_not_see_is_disproved() -> None:
    """Pooling that is the mean at one size alone, and another layer for larger images."""

    class AtSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tiny(num_classes=0)
            self.other = tiny(num_classes=0)

        def forward(self, x: Tensor) -> Tensor:
            return (self.body if x.shape[2] == 64 else self.other)(x)

    for model in (AtSize(), Pooled(lambda m, x: m.last(F.avg_pool2d(x, (2, 3)).flatten(1)))):  # type: ignore[call-arg,misc,arg-type]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        with pytest.raises(NetworkUnsupported):
            fuse_network(model.eval())


def test_errors_without_values_and_errors_pickle() -> None:
    with torch.device("meta"):
        model = RCViT(TINY).eval()
    with pytest.raises(NetworkUnsupported, match="meta device") as caught:
        fuse_network(model)
    assert isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.layer) == (str(caught.value), caught.value.layer)


def test_an_example_for_a_model_of_one_size(served) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tiny()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] < 70:
                raise RuntimeError("too small")
            return self.body(x)

    with pytest.raises(NetworkUnsupported, match=r"example_input gives another.*too small"):
        fuse_network(Large().eval())
    net = fuse_network(Large().eval(), example_input=torch.zeros(1, 3, 80, 96))
    assert_right(net, net.original(), torch.randn(1, 3, 80, 50))
    assert served.calls == 1


def test_large_and_broken_weights_are_no_reason() -> None:
    model = tiny()
    with torch.no_grad():
        model.network[0][0].mlp.fc1.weight.fill_(float("nan"))
        model.network[2][0].mlp.fc1.weight.fill_(1e30)
    fuse_network(model)


@pytest.mark.parametrize(
    ("dims", "in_chans", "match"),
    [
        ((4, 4, 4, 1030), 3, r"network\.5\.proj: expected at most 1024 channels, got 1030"),
        ((4, 4, 4, 4), 1030, r"patch_embed\.0: expected at most 1024 input channels, got 1030"),
    ],
)
def test_more_than_kernels_take(dims: Any, in_chans: int, match: str) -> None:
    model = tiny(Config((0, 0, 0, 0), dims), in_chans=in_chans)
    with pytest.raises(NetworkUnsupported, match=match):
        fuse_network(model)
