"""A fused network computes what its model says, whatever was done to the model since."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from networks import assert_right, tiny
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from casvit_kernels import FusedNetwork, UnfusedWarning, fuse, fuse_network, unfuse
from casvit_kernels.models import Config, RCViT
from casvit_kernels.surgery import network as surgery


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 40, 48)


@pytest.fixture
def readings(monkeypatch) -> list[int]:
    """An entry for each time that a model was read."""
    found: list[int] = []
    read = surgery.find

    def counted(*arguments):
        found.append(1)
        return read(*arguments)

    monkeypatch.setattr(surgery, "find", counted)
    return found


def fused(x: Tensor, model: RCViT | None = None) -> tuple[RCViT, FusedNetwork]:
    """Called once, so that everything is packed."""
    model = tiny() if model is None else model
    net = fuse_network(model)
    with torch.no_grad():
        net(x)
    return model, net


def test_nothing_changes(served, readings, x) -> None:
    model = tiny()
    fuse(model)
    model, net = fused(x, model)
    for _ in range(3):
        assert_right(net, model, x)  # calls the model, too, whose mixers keep what they pack
        model(x).sum().backward()
        copy.deepcopy(net)
        net.state_dict()
        net.train().eval()
        net.zero_grad()
    assert (len(readings), served.packs, served.calls) == (1, 1, 4)


def test_every_tensor_counts(served, readings, x) -> None:
    """A write to any parameter or statistic is seen; none is looked at in vain."""
    model, net = fused(x)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: t for name, t in tensors.items() if t.is_floating_point()}
    with torch.no_grad():
        before = net(x)
        for packs, (name, t) in enumerate(tensors.items(), 2):
            t.mul_(1.02).add_(0.01)
            after = net(x)
            assert served.packs == packs, name
            assert not torch.equal(after, before), name
            before = after
    assert_right(net, model, x)
    assert len(readings) == 1


def test_one_number_in_place(served, x) -> None:
    model, net = fused(x)
    with torch.no_grad():
        model.network[4][1].attn.oper_k[1].block[1].weight[3, 2] += 1.0
    assert_right(net, model, x)
    assert served.packs == 2


def training_step(model: RCViT, x: Tensor) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x)[0].square().sum().backward()
    optimizer.step()
    model.eval()


def moved_and_back(model: RCViT, x: Tensor) -> None:
    model.double()
    with torch.no_grad():
        model.head.weight.add_(1)
    model.float()


def other_tensors(model: RCViT, x: Tensor) -> None:
    for module in model.modules():
        for key, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[key] = nn.Parameter(p.detach() * 1.25)


def other_data(model: RCViT, x: Tensor) -> None:
    bias = model.network[0][0].attn.dwc.bias
    bias.data = bias.data + 1


def assigned(model: RCViT, x: Tensor) -> None:
    state = {key: t * 2 if t.is_floating_point() else t for key, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def loaded(model: RCViT, x: Tensor) -> None:
    state = {key: t * 2 if t.is_floating_point() else t for key, t in model.state_dict().items()}
    model.load_state_dict(state)


def fused_step(model: RCViT, x: Tensor) -> None:
    """Its kernels write to parameters without counting a version."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Adam(model.parameters(), 0.1, fused=True).step()


def statistics_alone(model: RCViT, x: Tensor) -> None:
    """As `torch.optim.swa_utils.update_bn` does: norms count no version of what they write."""
    model.train()
    with torch.no_grad():
        model(x)
    model.eval()


def other_buffer(model: RCViT, x: Tensor) -> None:
    model.norm.running_var = model.norm.running_var + 1


@pytest.mark.parametrize(
    "change",
    [
        training_step,
        fused_step,
        statistics_alone,
        moved_and_back,
        other_tensors,
        other_data,
        assigned,
        loaded,
        other_buffer,
    ],
)
def test_tensors(served, readings, x, change: Callable[[RCViT, Tensor], None]) -> None:
    model, net = fused(x)
    with torch.no_grad():
        before = net(x)
    change(model, x)
    calls = served.calls
    assert not torch.equal(assert_right(net, model, x), before)
    assert (served.calls, served.packs, len(readings)) == (calls + 1, 2, 1)


def test_tensors_of_one_element(served, x) -> None:
    """Of which an equal one is as good as the same one to `==`, but not to autograd."""
    model, net = fused(x, tiny(Config((1, 1, 1, 1), (2, 2, 2, 2))))
    model.requires_grad_(False)
    bias = model.patch_embed[0].bias
    assert bias.numel() == 1
    assert not net(x).requires_grad
    model.patch_embed[0].bias = nn.Parameter(bias.clone())
    assert net(x).requires_grad
    with torch.no_grad():
        model.patch_embed[0].bias.add_(1)
    assert_right(net, model, x)


def test_memory_that_is_used_again(served, x) -> None:
    """A tensor with other values at the address and of the version of the one that was read."""
    model = tiny()
    weight = model.head.weight
    memory = bytearray(weight.detach().numpy().tobytes())
    weight.data = torch.frombuffer(memory, dtype=torch.float32).view_as(weight)
    model, net = fused(x, model)
    address, version = weight.data_ptr(), weight._version
    weight.data = weight.data * -2  # the first one is given back, and here it comes again
    memory[:] = weight.detach().numpy().tobytes()
    weight.data = torch.frombuffer(memory, dtype=torch.float32).view_as(weight)
    assert (weight.data_ptr(), weight._version) == (address, version)
    assert_right(net, model, x)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_tied_weights_replaced(served, x, which: int) -> None:
    model = tiny()
    layers = [block.mlp.fc1 for block in model.network[4]]
    layers[1].weight = layers[0].weight
    model, net = fused(x, model)
    layers[which].weight = nn.Parameter(layers[which].weight.detach() * -2)
    assert_right(net, model, x)
    assert served.calls == 2


def test_writes_through_data(served, x) -> None:
    model, net = fused(x)
    with torch.no_grad():
        before = net(x)
        model.head.weight.data.add_(1)
        net.refresh()
        assert not torch.equal(net(x), before)
    assert_right(net, model, x)


def test_inference_tensors(served, x) -> None:
    with torch.inference_mode():
        model = tiny()
        net = fuse_network(model)
        net(x)
        model.head.bias.add_(1)
        net.refresh()
    assert_right(net, model, x)


def new_norm(model: RCViT) -> None:
    norm = nn.BatchNorm2d(8, eps=0.3).eval()
    nn.init.constant_(norm.weight, 1.5)
    model.network[0][0].norm1 = norm


def without_norm(model: RCViT) -> None:
    model.network[2][0].norm2 = nn.Identity()


def without_bias(model: RCViT) -> None:
    model.network[4][0].mlp.fc1.bias = None


def with_bias(model: RCViT) -> None:
    qkv = model.network[4][0].attn.qkv
    assert qkv.bias is None
    qkv.bias = nn.Parameter(torch.full((48,), 0.3))


def new_classifier(model: RCViT) -> None:
    model.reset_classifier(7)
    nn.init.normal_(model.head.weight)


def one_head(model: RCViT) -> None:
    model.distillation = False


def features(model: RCViT) -> None:
    model.num_classes = 0


def unpooled(model: RCViT) -> None:
    model.reset_classifier(0, "")


def another_eps(model: RCViT) -> None:
    model.norm.eps = 0.5


def fewer_blocks(model: RCViT) -> None:
    model.network[4] = model.network[4][:1]


def swapped_blocks(model: RCViT) -> None:
    first, second = model.network[4]
    model.network[4][0], model.network[4][1] = second, first


def fused_mixers(model: RCViT) -> None:
    fuse(model)


@pytest.mark.parametrize(
    "change",
    [
        new_norm,
        without_norm,
        without_bias,
        with_bias,
        new_classifier,
        one_head,
        features,
        unpooled,
        another_eps,
        fewer_blocks,
        swapped_blocks,
        fused_mixers,
    ],
)
def test_structures_that_kernels_compute(
    served, readings, x, change: Callable[[RCViT], None]
) -> None:
    model, net = fused(x)
    change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfusedWarning)
        assert_right(net, model, x)
        assert_right(net, model, x)
    assert served.calls == 3
    assert len(readings) == 2


def test_other_channels(served, x) -> None:
    model, net = fused(x)
    model.patch_embed[0] = nn.Conv2d(4, 4, 3, 2, 1)
    model.in_chans = 4
    assert_right(net, model, torch.randn(2, 4, 40, 48))
    assert served.calls == 2
    with pytest.raises(ValueError, match="expected 4 channels"):
        net(x)


def test_mixers_fused_and_unfused(served, x) -> None:
    model, net = fused(x)
    fuse(model)
    assert_right(net, model, x)
    unfuse(model)
    assert_right(net, model, x)
    assert served.calls == 3


def another_activation(model: RCViT) -> None:
    model.network[0][0].mlp.act = nn.SiLU()


def approximated(model: RCViT) -> None:
    model.network[0][0].mlp.act.approximate = "tanh"


def dilated(model: RCViT) -> None:
    conv = model.network[2][0].attn.proj
    conv.dilation = conv.padding = (2, 2)


def reflected(model: RCViT) -> None:
    conv = model.network[2][0].attn.proj
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    conv.padding_mode = "reflect"


def forward_of_a_layer(model: RCViT) -> None:
    layer = model.network[0][0].mlp.act
    layer.forward = lambda t: t * 2  # type: ignore[method-assign]


def forward_of_the_model(model: RCViT) -> None:
    model.forward = lambda t: t.sum()  # type: ignore[method-assign]


def another_class(model: RCViT) -> None:
    class Twice(nn.GELU):
        def forward(self, t: Tensor) -> Tensor:
            return 2 * super().forward(t)

    model.network[0][0].mlp.act.__class__ = Twice


def an_adapter(model: RCViT) -> None:
    class Adapter(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.down = inner, nn.Conv2d(8, 24, 1)

        def forward(self, t: Tensor) -> Tensor:
            return self.inner(t) + self.down(t)

    model.network[0][0].attn.qkv = Adapter(model.network[0][0].attn.qkv)


def pruned(model: RCViT) -> None:
    prune.l1_unstructured(model.network[0][0].mlp.fc1, "weight", 0.3)


def parametrized(model: RCViT) -> None:
    parametrizations.weight_norm(model.network[0][0].mlp.fc1)


@pytest.mark.parametrize(
    "change",
    [
        another_activation,
        approximated,
        dilated,
        reflected,
        forward_of_a_layer,
        forward_of_the_model,
        another_class,
        an_adapter,
        pruned,
        parametrized,
    ],
)
def test_structures_that_the_model_computes(
    served, readings, x, change: Callable[[RCViT], None]
) -> None:
    model, net = fused(x)
    was = copy.deepcopy(model)
    change(model)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        with pytest.warns(UnfusedWarning, match="a fused network runs its model"):
            assert torch.equal(net(x), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(net(x), expected)
        assert not torch.equal(was(x), expected)
    assert served.calls == 1
    assert len(readings) == 2


class Act(nn.Module):
    """An exact GELU until one of its attributes says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.function: Callable[[Tensor], Tensor] = nn.functional.gelu
        self.settings = {"power": 1}
        self.scales = [[1.0]]
        self.scale: object = 1.0
        self.behind = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x = self.behind(self.function(x))
        if self.settings["power"] != 1:
            x = x ** self.settings["power"]
        if self.scales[0][0] != 1:
            x = x * self.scales[0][0]
        if isinstance(self.scale, Tensor):
            x = x * self.scale.sum()
        return x * self.late if hasattr(self, "late") else x


def set_(key: str, value: object) -> Callable[[Act], None]:
    return lambda act: setattr(act, key, value)


@pytest.mark.parametrize(
    "change",
    [
        set_("function", torch.relu),
        lambda act: act.settings.update(power=2),
        lambda act: act.scales[0].__setitem__(0, 2.0),
        set_("scale", torch.ones(2)),
        lambda act: act.behind.append(nn.Tanh()),
        set_("late", nn.Parameter(torch.tensor(3.0))),
    ],
    ids=["function", "dict", "nested", "tensor", "empty", "late"],
)
def test_attributes_of_somebody_elses_module(served, x, change: Callable[[Act], None]) -> None:
    model = tiny()
    act = model.network[0][0].mlp.act = Act().eval()
    model, net = fused(x, model)
    assert served.calls == 1
    change(act)
    with torch.no_grad(), pytest.warns(UnfusedWarning):
        assert torch.equal(net(x), model.eval()(x))


def test_a_change_that_is_undone(served, x) -> None:
    model, net = fused(x)
    act = model.network[0][0].mlp.act
    another_activation(model)
    reason = r"network\.0\.0\.mlp\.act: expected an exact GELU"
    with torch.no_grad(), pytest.warns(UnfusedWarning, match=reason):
        net(x)
    model.network[0][0].mlp.act = act
    assert_right(net, model, x)
    assert served.calls == 2


def test_a_fused_mixer_of_which_an_attribute_is_set(served, x) -> None:
    """What `fuse` itself leaves to the replaced mixer's forward is not taken from the kernels."""
    model = tiny()
    fuse(model)
    model, net = fused(x, model)
    mixer = model.network[0][0].attn
    mixer.forward = lambda t: t  # type: ignore[method-assign]
    with torch.no_grad(), pytest.warns(UnfusedWarning):
        assert torch.equal(net(x), model(x))
    del mixer.forward
    assert_right(net, model, x)
