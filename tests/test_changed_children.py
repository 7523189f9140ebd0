"""What users change in a fused mixer after the swap: it computes what its children say."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import require_backend
from mixers import filled
from published_mixer import CopiedMixer, Net
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from casvit_kernels import (
    AdditiveTokenMixer,
    FusedCATM,
    UnfusedWarning,
    catm,
    fold_for_inference,
    fuse,
    unfuse,
)
from casvit_kernels.module import mixer_weights

C = 6
X = (2, C, 7, 5)


@pytest.fixture(autouse=True)
def _native():
    require_backend("cpu")


def pair(training=False, cls=CopiedMixer):
    """A plain network and its fused copy, already called once."""
    plain = nn.Sequential(nn.Conv2d(C, C, 1), filled(cls(C)))
    fused = copy.deepcopy(plain)
    assert fuse(fused).swapped == ("1",)
    with torch.no_grad():
        fused.eval()(torch.randn(X))
    for model in (plain, fused):
        model.train(training)
    return plain, fused


def assert_same(plain, fused, training=False):
    """Output, all gradients and running statistics."""
    results = []
    x = torch.randn(X)
    for model in (plain, fused):
        model.train(training)
        own = x.clone().requires_grad_()
        out = model(own)
        wanted = [own, *(p for p in model.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
        results.append((out, *gradients, *model.buffers()))
    for a, b in zip(*results, strict=True):
        if a is None or b is None:
            assert a is None
            assert b is None
        else:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(1 + a.abs().max()))
    with torch.no_grad():
        plain.eval(), fused.eval()
        for _ in range(2):  # the second call may go another way
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


class LoRA(nn.Module):
    """As peft's: a module that has the weight of the one it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.b = nn.Conv2d(2, base.out_channels, base.kernel_size, padding=base.padding, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def exchange(path, make):
    def change(mixer):
        torch.manual_seed(3)
        parent, _, key = path.rpartition(".")
        owner = mixer.get_submodule(parent)
        owner._modules[key] = make(owner._modules[key]).train(mixer.training)

    return change


def setting(path, name, value):
    def change(mixer):
        setattr(mixer.get_submodule(path), name, value)

    return change


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def _replaced_forward(mixer):
    conv = mixer.dwc
    old = conv.forward
    conv.forward = lambda x: old(x) + 1.0


def _appended(mixer):
    mixer.oper_q[0].block.append(nn.Hardtanh(0.2, 0.7))


def _deleted(mixer):
    del mixer.oper_k[1]


def _other_class(mixer):
    mixer.oper_q.__class__ = Doubled


CHANGES = {
    "LoRA on qkv": exchange("qkv", LoRA),
    "LoRA on dwc": exchange("dwc", LoRA),
    "LoRA in a gate": exchange("oper_k.0.block.3", LoRA),
    "GELU": exchange("oper_q.0.block.2", lambda m: nn.GELU()),
    "Hardsigmoid": exchange("oper_k.1.block.2", lambda m: nn.Hardsigmoid()),
    "GroupNorm": exchange("oper_q.0.block.1", lambda m: nn.GroupNorm(2, C)),
    "InstanceNorm": exchange("oper_k.0.block.1", lambda m: nn.InstanceNorm2d(C, affine=True)),
    "max pool": exchange("oper_q.1.block.0", lambda m: nn.AdaptiveMaxPool2d(1)),
    "a gate left out": exchange("oper_k", lambda m: nn.Identity()),
    "another gate": exchange("oper_q", lambda m: Doubled(*m)),
    "Dropout2d": exchange("proj_drop", lambda m: nn.Dropout2d(0.0)),
    "dense proj": exchange("proj", lambda m: nn.Conv2d(C, C, 3, padding=1)),
    "dilation": lambda m: [setting("dwc", n, (2, 2))(m) for n in ("dilation", "padding")],
    "padding mode": lambda m: (
        setting("proj", "padding_mode", "circular")(m),
        setting("proj", "_reversed_padding_repeated_twice", [1, 1, 1, 1])(m),
    ),
    "forward replaced": _replaced_forward,
    "layer appended": _appended,
    "layer deleted": _deleted,
    "class changed": _other_class,
    "bias added": lambda m: setattr(
        m.oper_q[0].block[3], "bias", nn.Parameter(torch.full((1,), 2.0))
    ),
    "bias removed": lambda m: setattr(m.dwc, "bias", None),
    "bias of a gate removed": lambda m: setattr(m.oper_k[0].block[0], "bias", None),
    "output size": setting("oper_q.1.block.0", "output_size", X[2:]),
    "children exchanged as a whole": lambda m: setattr(
        m, "_modules", {**m._modules, "dwc": nn.Identity()}
    ),
    "an inner method replaced": lambda m: setattr(
        m.proj, "_conv_forward", lambda x, weight, bias: F.conv2d(x, weight, bias, 1, 1, 1, C) + 1
    ),
}


class Scaled(CopiedMixer):
    """Reads an attribute of its own."""

    scale = 1.0

    def __init__(self, dim):
        super().__init__(dim)
        self.scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


def test_an_attribute_of_the_replaced_mixer():
    plain, fused = pair(cls=Scaled)
    for model in (plain, fused):
        model[1].scale = 2.0
    with pytest.warns(UnfusedWarning, match="scale: was set after the swap"):
        assert_same(plain, fused)


def test_a_copy_with_children_of_its_own():
    """As DataParallel's replicas: another dictionary of children, the same replaced mixer."""
    plain, fused = pair()
    for model in (plain, fused):
        twin = copy.copy(model[1])
        twin._modules = {**twin._modules, "dwc": LoRA(copy.deepcopy(twin.dwc))}
        torch.manual_seed(5)
        nn.init.normal_(twin.dwc.b.weight)
        nn.init.normal_(twin.dwc.a.weight)
        model[1] = twin
    with pytest.warns(UnfusedWarning):
        assert_same(plain, fused)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_one_gate_for_q_and_k(momentum):
    plain, fused = pair()
    for model in (plain, fused):
        model[1].oper_q[0].block[1].momentum = momentum
        model[1].oper_k = model[1].oper_q
    assert_same(plain, fused, True)


def test_a_frozen_norm_whose_epsilon_has_another_name():
    class Other(Frozen):
        def __init__(self, norm, epsilon):
            super().__init__(norm, epsilon)
            self.epsilon = self.__dict__.pop("eps")

        def forward(self, x):
            self.__dict__["eps"] = self.epsilon
            out = super().forward(x)
            del self.__dict__["eps"]
            return out

    for epsilon in (1e-5, 0.5):
        plain, fused = pair()
        for model in (plain, fused):
            exchange(BOTH[0], lambda m, e=epsilon: Other(m, e))(model[1])
        with pytest.warns(UnfusedWarning, match="oper_q.0.block.1"):
            assert_same(plain, fused)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_child_is_computed(change, training):
    plain, fused = pair(training)
    change(plain[1])
    change(fused[1])
    with pytest.warns(UnfusedWarning, match=r"one by one, unfused: .*unfuse\(model\)"):
        assert_same(plain, fused, training)


# A compiler cannot follow the copy that is made where all children are exchanged at once: it says so.
COMPILED = {name: change for name, change in CHANGES.items() if "as a whole" not in name}


@pytest.mark.parametrize("change", COMPILED.values(), ids=COMPILED)
def test_a_changed_child_is_compiled(change):
    plain, fused = pair()
    change(plain[1])
    change(fused[1])
    x = torch.randn(X)
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_compiled_first_changed_then():
    plain, fused = pair()
    x = torch.randn(X)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(x)
        for model in (plain, fused):
            exchange("oper_q.0.block.2", lambda m: nn.GELU())(model[1])
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_it_says_so_once_and_names_the_child():
    _, fused = pair()
    fused[1].qkv = LoRA(fused[1].qkv)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            fused(torch.randn(X))
    (one,) = caught
    assert one.category is UnfusedWarning
    assert "qkv: expected a plain Conv2d, got test_changed_children.LoRA" in str(one.message)


def test_undone_it_is_fused_again():
    plain, fused = pair()
    conv = fused[1].qkv
    fused[1].qkv = LoRA(conv)
    with pytest.warns(UnfusedWarning):
        fused(torch.randn(X))
    fused[1].qkv = conv
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(plain, fused)
    assert fused[1]._structure.difference is None


def test_a_missing_child_is_named():
    _, fused = pair()
    fused[1].dwc = None
    with (
        pytest.warns(UnfusedWarning, match="dwc: expected a module, got none"),
        pytest.raises((TypeError, AttributeError)),
    ):
        fused(torch.randn(X))


# Norms that run fused


class Frozen(nn.Module):
    """As torchvision's, timm's and detectron2's: weights and statistics are buffers."""

    def __init__(self, norm, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class FrozenOtherwise(Frozen):
    def forward(self, x):
        return super().forward(x) * 1.1


def _torchvision(norm):
    ops = pytest.importorskip("torchvision.ops")
    frozen = ops.FrozenBatchNorm2d(C)
    frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if "num_" not in k})
    return frozen


def _without(affine, track):
    return lambda m: nn.BatchNorm2d(C, affine=affine, track_running_stats=track)


NORMS = {
    "frozen": lambda m: Frozen(m, 1e-3),
    "torchvision": _torchvision,
    "not affine": _without(False, True),
    "no statistics": _without(True, False),
    "identity": lambda m: nn.Identity(),
    "another eps": lambda m: nn.BatchNorm2d(C, eps=0.3),
}
BOTH = ("oper_q.0.block.1", "oper_k.0.block.1")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("paths", [BOTH, BOTH[:1]], ids=["both", "one"])
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_that_run_fused(make, paths, training, when):
    plain = nn.Sequential(nn.Conv2d(C, C, 1), filled(CopiedMixer(C)))
    fused = copy.deepcopy(plain)
    if when == "after":
        fuse(fused)
        fused.eval()(torch.randn(X))
    for path in paths:
        for model in (plain, fused):
            exchange(path, make)(model[1])
    if when == "before":
        assert fuse(fused).swapped == ("1",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(plain, fused, training)
    assert type(fused[1]) is FusedCATM
    assert fused[1]._structure.difference is None


def test_a_frozen_norm_that_computes_something_else():
    plain, fused = pair()
    for model in (plain, fused):
        exchange(BOTH[0], FrozenOtherwise)(model[1])
    with pytest.warns(UnfusedWarning, match="oper_q.0.block.1: expected a plain BatchNorm2d"):
        assert_same(plain, fused)


@pytest.mark.parametrize("first", ["fuse", "fold"])
def test_folded_and_fused_in_any_order(first):
    model = filled(Net(CopiedMixer)).eval()
    x = torch.randn(2, 3, 17, 19)
    with torch.no_grad():
        expected = model(x)
    if first == "fuse":
        fuse(model)
        model = fold_for_inference(model)
    else:
        model = fold_for_inference(model)
        assert len(fuse(model).swapped) == 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_folded_by_another_tool_after_the_swap():
    plain, fused = pair()
    for model in (plain, fused):
        block = model[1].oper_q[0].block
        block[0] = nn.utils.fusion.fuse_conv_bn_eval(block[0], block[1])
        block[1] = nn.Identity()
    assert_same(plain, fused)


# Hooks


EVERY_CHILD = [name for name, _ in AdditiveTokenMixer(1).named_modules() if name]


@pytest.mark.parametrize("name", EVERY_CHILD)
def test_hooks_on_every_child_run(name):
    plain, fused = pair()
    seen = []
    handles = [
        fused[1].get_submodule(name).register_forward_hook(lambda *_: seen.append("out")),
        fused[1].get_submodule(name).register_forward_pre_hook(lambda *_: seen.append("in")),
    ]
    x = torch.randn(X)
    with torch.no_grad():
        with pytest.warns(UnfusedWarning, match=f"{name}: has hooks"):
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
        assert seen == ["in", "out"]
        for handle in handles:
            handle.remove()
        fused(x)
    assert seen == ["in", "out"]


@pytest.mark.parametrize("name", EVERY_CHILD)
def test_hooks_on_every_child_are_compiled(name):
    plain, fused = pair()
    for model in (plain, fused):
        model[1].get_submodule(name).register_forward_hook(lambda m, i, o: o * 1.5)
    x = torch.randn(X)
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(fused, backend="eager")
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_a_hook_that_casts_its_input():
    plain, fused = pair()
    for model in (plain, fused):
        model[1].qkv.register_forward_pre_hook(lambda m, i: (i[0].float(),))
    x = torch.randn(X).double()
    with torch.no_grad(), pytest.warns(UnfusedWarning):
        torch.testing.assert_close(fused[1](x), plain[1](x))


@pytest.mark.parametrize("name", ["oper_q", "oper_q.0.block.4", "oper_k.1", "proj_drop", "dwc"])
def test_gradients_of_children_as_grad_cam_takes_them(name):
    plain, fused = pair()
    found = []
    for model in (plain, fused):
        kept = []
        child = model[1].get_submodule(name)
        child.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        child.register_full_backward_hook(lambda m, i, o, kept=kept: kept.append(o[0]))
        x = torch.linspace(-1, 1, 2 * C * 35).view(X).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfusedWarning)
            model(x).square().sum().backward()
        found.append(kept)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_hooks_after_the_dictionary_was_replaced():
    """An idiom to remove all hooks; what is registered afterwards must run."""
    _, fused = pair()
    seen = []
    for m in fused.modules():
        m._forward_hooks = type(m._forward_hooks)()
    fused(torch.randn(X))
    fused[1].oper_q[0].block[4].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), pytest.warns(UnfusedWarning):
        fused(torch.randn(X))
    assert seen == [1]


def test_global_hooks_see_every_child():
    _, fused = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        with torch.no_grad():
            fused(torch.randn(X))
    finally:
        handle.remove()
    assert seen.count(nn.Sigmoid) == 4


# Counting, tracing


@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_of_the_plain_mixer(backward):
    plain, fused = pair(True)
    weights, x = mixer_weights(fused[1]), torch.randn(X)
    counts = []
    for call in (plain, fused, lambda x: catm(fused[0](x), weights, training=True)):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            out = call(x)
            if backward:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2


@pytest.mark.parametrize("cls", [CopiedMixer, AdditiveTokenMixer])
def test_a_leaf_for_fx(cls):
    plain, fused = pair(cls=cls)
    x = torch.randn(X)
    graph = torch.fx.symbolic_trace(fused)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == ["0", "1"]
    with torch.no_grad():
        assert torch.equal(graph(x), fused(x))
        root = torch.fx.symbolic_trace(fused[1])  # as the root: its children
        torch.testing.assert_close(root(x), plain[1](x), rtol=1e-4, atol=1e-4)


def test_feature_extractor():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    plain, fused = pair()
    x = torch.randn(X)
    with torch.no_grad():
        expected = extraction.create_feature_extractor(plain, ["1"])(x)["1"]
        found = extraction.create_feature_extractor(fused, ["1"])(x)["1"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Other names


class Renamed(nn.Module):
    """As in the package birder, and with everything else renamed, too."""

    def __init__(self, dim, swapped=False):
        super().__init__()
        m = CopiedMixer(dim)
        self.expand, self.op_q, self.op_k = m.qkv, m.oper_q, m.oper_k
        self.first, self.second, self.drop = m.dwc, m.proj, m.proj_drop
        self.swapped = swapped

    def forward(self, x):
        q, k, v = self.expand(x).chunk(3, dim=1)
        a, b = (self.op_k, self.op_q) if self.swapped else (self.op_q, self.op_k)
        first, second = (self.second, self.first) if self.swapped else (self.first, self.second)
        return self.drop(second(first(a(q) + b(k)) * v))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_other_names_are_matched_by_what_they_do(swapped, training):
    plain = nn.Sequential(nn.Conv2d(C, C, 1), filled(Renamed(C, swapped)))
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert report.swapped == ("1",)
    assert list(fused.state_dict()) == list(plain.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert_same(copy.deepcopy(plain), twin, training)
    exchange("op_q.0.block.2", lambda m: nn.GELU())(fused[1])
    exchange("op_q.0.block.2", lambda m: nn.GELU())(plain[1])
    with pytest.warns(UnfusedWarning, match="op_q.0.block.2: expected a plain ReLU"):
        assert_same(plain, fused, training)
    unfuse(fused)
    assert type(fused[1]) is Renamed


class _OtherwiseRenamed(Renamed):
    def forward(self, x):
        return super().forward(x) + 1


def test_other_names_and_another_function_are_refused():
    ((name, reason),) = fuse(nn.Sequential(_OtherwiseRenamed(C))).refused
    assert name == "0"
    assert "computes something else" in reason


def test_birder_is_fused():
    net = pytest.importorskip("birder.net.cas_vit")
    plain = nn.Sequential(filled(net.AdditiveTokenMixer(C, True, 0.0)))
    fused = copy.deepcopy(plain)
    assert fuse(fused).swapped == ("0",)
    assert_same(plain, fused, True)


# Subclasses


class Residual(FusedCATM):
    def forward(self, x):
        return super().forward(x) + x


def test_a_subclass_with_a_forward_of_its_own_is_kept():
    model = nn.Sequential(filled(Residual(C)), filled(FusedCATM(C))).eval()
    x = torch.randn(X)
    with torch.no_grad():
        expected = model(x)
        folded = fold_for_inference(model, torch.randn(X))
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)
        report = unfuse(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert report.restored == ("1",)
    assert [name for name, _ in report.kept] == ["0"]
    assert "Residual has a forward of its own" in str(report)
    assert type(model[0]) is Residual


def test_train_that_returns_none():
    class Dense(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)

    model = Dense(nn.Conv2d(3, C, 3), filled(FusedCATM(C)))
    model.eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        folded = fold_for_inference(model)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
