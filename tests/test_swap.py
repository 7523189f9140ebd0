"""fuse() and unfuse(): what is recognised, what is refused and why, and what stays as it was."""

import copy
import io
import pickle

import published_mixer as copies
import pytest
import torch
from published_mixer import CopiedMixer, Net, RewrittenMixer
from torch import nn
from torch.nn.utils import parametrizations

import casvit_kernels
from casvit_kernels import AdditiveTokenMixer, FusedCATM, fuse, unfuse
from casvit_kernels import module as swap

MIXERS = [CopiedMixer, RewrittenMixer, AdditiveTokenMixer]


def images(*shape):
    return torch.randn(shape or (2, 3, 12, 10))


def output(model, x):
    model.eval()
    with torch.no_grad():
        return model(x)


# Recognition


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dim", [1, 5, 16])
@pytest.mark.parametrize(("bias", "drop"), [(False, 0.0), (True, 0.3)])
def test_copies_are_recognised(mixer, dim, bias, drop):
    assert swap.refusal(mixer(dim, bias, drop)) is None


@pytest.mark.parametrize("mixer", MIXERS)
def test_fused_copy_computes_the_same(mixer):
    model = Net(mixer)
    x = images()
    expected = output(model, x)
    report = fuse(model)
    assert report.swapped == ("blocks.0.attn", "blocks.1.attn")
    assert report.refused == ()
    assert report.already == ()
    assert all(type(block.attn) is FusedCATM for block in model.blocks)
    torch.testing.assert_close(output(model, x), expected)


def relu(mixer):
    return mixer.oper_q[0].block


def _replace(path, module):
    def change(mixer):
        parent, _, name = path.rpartition(".")
        mixer.get_submodule(parent)._modules[name] = module(mixer.qkv.in_channels)

    return change


class _LoRA(nn.Conv2d):
    pass


class _ExtraParameter(CopiedMixer):
    def __init__(self, dim):
        super().__init__(dim)
        self.gamma = nn.Parameter(torch.ones(dim))


class _ExtraBuffer(CopiedMixer):
    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("table", torch.ones(dim))


class _ExtraChild(CopiedMixer):
    def __init__(self, dim):
        super().__init__(dim)
        self.norm = nn.BatchNorm2d(dim)


class _OwnTrain(CopiedMixer):
    def train(self, mode=True):
        return super().train(False)


def _depthwise(**options):
    return lambda c: nn.Conv2d(c, c, 3, groups=c, **{"padding": 1, **options})


STRUCTURES = {
    "qkv kernel 3": (_replace("qkv", lambda c: nn.Conv2d(c, 3 * c, 3, padding=1)), "qkv: .*kernel"),
    "qkv too narrow": (_replace("qkv", lambda c: nn.Conv2d(c, 2 * c, 1)), "qkv: .*out_channels"),
    "channel gate bias": (
        _replace("oper_k.1.block.1", lambda c: nn.Conv2d(c, c, 1)),
        "oper_k.1.block.1: expected no bias",
    ),
    "spatial gate bias": (
        _replace("oper_q.0.block.3", lambda c: nn.Conv2d(c, 1, 1)),
        "oper_q.0.block.3: expected no bias",
    ),
    "dwc without bias": (_replace("dwc", _depthwise(bias=False)), "dwc: expected a bias"),
    "dwc dilated": (_replace("dwc", _depthwise(padding=2, dilation=2)), "dwc: .*padding"),
    "proj reflecting": (
        _replace("proj", _depthwise(padding_mode="reflect")),
        "proj: .*padding_mode",
    ),
    "proj not depthwise": (
        _replace("proj", lambda c: nn.Conv2d(c, c, 3, padding=1)),
        "proj: expected groups",
    ),
    "GELU": (_replace("oper_q.0.block.2", lambda c: nn.GELU()), "block.2: .*ReLU, got .*GELU"),
    "Hardsigmoid": (_replace("oper_k.0.block.4", lambda c: nn.Hardsigmoid()), "Sigmoid, got"),
    "GroupNorm": (_replace("oper_q.0.block.1", lambda c: nn.GroupNorm(1, c)), "BatchNorm2d"),
    "half a norm": (
        _replace("oper_q.0.block.1", lambda c: nn.BatchNorm2d(c + 1)),
        "oper_q.0.block.1.weight: expected shape",
    ),
    "max pool": (_replace("oper_q.1.block.0", lambda c: nn.AdaptiveMaxPool2d(1)), "AdaptiveAvg"),
    "pool to 2": (_replace("oper_q.1.block.0", lambda c: nn.AdaptiveAvgPool2d(2)), "output_size"),
    "Dropout2d": (_replace("proj_drop", lambda c: nn.Dropout2d()), "proj_drop: .*Dropout2d"),
    "LoRA": (_replace("qkv", lambda c: _LoRA(c, 3 * c, 1)), "qkv: .*plain Conv2d, got .*_LoRA"),
    "no proj_drop": (lambda m: m._modules.pop("proj_drop"), "expected the children .*proj_drop"),
    "gates swapped": (
        lambda m: m._modules.update(oper_q=nn.Sequential(m.oper_q[1], m.oper_q[0])),
        "oper_q.0.block.2: expected a plain ReLU, got .*Sigmoid",
    ),
    "parametrized": (lambda m: parametrizations.weight_norm(m.qkv), "qkv: .*parametrized"),
    "spectral norm": (lambda m: nn.utils.spectral_norm(m.dwc), "dwc: has a parameter weight_orig"),
    "pruned weight": (
        lambda m: setattr(m.qkv, "weight", nn.Parameter(m.qkv.weight[:, :-1].detach())),
        "qkv.weight: expected shape",
    ),
    "hook inside": (
        lambda m: m.oper_q[0].register_forward_hook(lambda *a: None),
        "oper_q.0: has forward hooks",
    ),
    "pre-hook inside": (
        lambda m: m.proj.register_forward_pre_hook(lambda *a: None),
        "proj: has forward pre hooks",
    ),
    "backward hook inside": (
        lambda m: m.dwc.register_full_backward_hook(lambda *a: None),
        "dwc: has backward hooks",
    ),
    "forward replaced": (
        lambda m: setattr(m, "forward", lambda x: x),
        "its forward is replaced on the instance",
    ),
    "inner forward replaced": (
        lambda m: setattr(m.oper_k[1], "forward", lambda x: x),
        "oper_k.1: its forward is replaced",
    ),
    "extra parameter": (_ExtraParameter, "has a parameter gamma"),
    "extra buffer": (_ExtraBuffer, "has a buffer table"),
    "extra child": (_ExtraChild, "expected the children .*got .*norm"),
    "own train()": (_OwnTrain, r"its class overrides train\(\)"),
    "meta device": (lambda m: m.to("meta"), "meta device"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_another_structure_is_refused(name):
    change, reason = STRUCTURES[name]
    if isinstance(change, type):
        mixer = change(4)
    else:
        mixer = CopiedMixer(4)
        change(mixer)
    model = nn.ModuleDict({"attn": mixer})
    report = fuse(model)
    assert report.swapped == ()
    assert model["attn"] is mixer
    ((path, why),) = report.refused
    assert path == "attn"
    with pytest.raises(ValueError, match=reason):
        raise ValueError(why)


def _qkv(self, x):
    return self.qkv(x).chunk(3, dim=1)


class _DocstringOrder(CopiedMixer):
    def forward(self, x):  # what the published docstring says, not what the code does
        q, k, v = _qkv(self, x)
        return self.proj_drop(self.proj(self.dwc((self.oper_q(q) + self.oper_k(k)) * v)))


class _Scaled(CopiedMixer):
    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


class _Residual(CopiedMixer):
    def forward(self, x):
        return x + super().forward(x)


class _OnlyInTraining(CopiedMixer):
    def forward(self, x):
        out = super().forward(x)
        return out * 1.0001 if self.training else out


class _OnlyInEval(CopiedMixer):
    def forward(self, x):
        out = super().forward(x)
        return out if self.training else out + 1e-6


class _Detached(CopiedMixer):
    def forward(self, x):
        q, k, v = _qkv(self, x)
        a = self.oper_q(q) + self.oper_k(k).detach()
        return self.proj_drop(self.proj(self.dwc(a) * v))


class _NoGrad(CopiedMixer):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class _NormTwice(CopiedMixer):
    def forward(self, x):
        self.oper_q(_qkv(self, x)[0])
        return super().forward(x)


class _DropsEarly(CopiedMixer):
    def forward(self, x):
        q, k, v = _qkv(self, x)
        return self.proj(self.proj_drop(self.dwc(self.oper_q(q) + self.oper_k(k)) * v))


class _NeverDrops(CopiedMixer):
    def forward(self, x):
        q, k, v = _qkv(self, x)
        return self.proj(self.dwc(self.oper_q(q) + self.oper_k(k)) * v)


class _OwnDropout(CopiedMixer):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class _SwappedGates(CopiedMixer):
    def forward(self, x):
        q, k, v = _qkv(self, x)
        return self.proj_drop(self.proj(self.dwc(self.oper_q(k) + self.oper_k(q)) * v))


class _WantsSize(CopiedMixer):
    def forward(self, x, height, width):
        return super().forward(x)


class _Pair(CopiedMixer):
    def forward(self, x):
        return super().forward(x), x


class _Flat(CopiedMixer):
    def forward(self, x):
        return super().forward(x).flatten(2)


class _Single(CopiedMixer):
    def forward(self, x):
        return super().forward(x).float()


class _WritesInput(CopiedMixer):
    def forward(self, x):
        out = super().forward(x)
        x.data.zero_()
        return out


class _NaN(CopiedMixer):
    def forward(self, x):
        return super().forward(x) * float("nan")


FORWARDS = {
    _DocstringOrder: "computes something else in training mode: max difference",
    _Residual: "computes something else in training mode",
    _OnlyInTraining: "computes something else in training mode",
    _OnlyInEval: "computes something else in eval mode: max difference 1e-06",
    _Detached: "has another gradient of",
    _NoGrad: "cannot be differentiated",
    _NormTwice: "updates oper_q.0.block.1.running_mean differently in training mode",
    _OwnDropout: "computes something else in training mode",
    _SwappedGates: "computes something else in training mode",
    _WantsSize: "raises TypeError",
    _Pair: "returns builtins.tuple, expected a tensor",
    _Flat: r"returns \(2, 4, 15\)",
    _Single: "torch.float32",
    _WritesInput: "writes into its input",
    _NaN: "max difference nan",
}


@pytest.mark.parametrize("cls", FORWARDS, ids=lambda cls: cls.__name__)
def test_another_forward_is_refused(cls):
    reason = swap.refusal(cls(4))
    assert reason is not None
    with pytest.raises(ValueError, match=FORWARDS[cls]):
        raise ValueError(reason)


@pytest.mark.parametrize("cls", [_DropsEarly, _NeverDrops])
def test_a_dropout_in_another_place_is_refused(cls):
    assert "training mode" in swap.refusal(cls(4, proj_drop=0.1))
    assert swap.refusal(cls(4, proj_drop=0.0)) is None  # without a rate there is no difference


def test_a_setting_of_one_instance_is_noticed():
    model = nn.Sequential(*(_Scaled(4) for _ in range(3)))
    model[1].scale = 0.5
    report = fuse(model)
    assert report.swapped == ("0", "2")
    assert [name for name, _ in report.refused] == ["1"]
    assert "computes something else" in report.refused[0].reason


def test_gate_of_another_kind_is_refused():
    mixer = CopiedMixer(4)

    class Root(copies.PixelGate):
        def forward(self, maps):
            return self.block(maps).sqrt() * maps

    mixer.oper_k[0] = Root(4)
    assert "computes something else" in swap.refusal(mixer)


def test_norm_settings_are_those_of_the_mixer():
    mixer = CopiedMixer(4)
    mixer.oper_q[0].block[1] = nn.BatchNorm2d(4, eps=0.1, momentum=0.3)
    mixer.oper_k[0].block[1] = nn.SyncBatchNorm(4, momentum=None)
    assert swap.refusal(mixer) is None


def test_scripted_mixer_is_refused():
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
        scripted = torch.jit.script(nn.Sequential(RewrittenMixer(4)))
    ((name, reason),) = fuse(scripted).refused
    assert name == "0"
    assert reason


def test_wrappers_are_looked_through():
    model = nn.Sequential(torch.compile(CopiedMixer(4), backend="eager"))
    assert fuse(model).swapped == ("0._orig_mod",)


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_no_trace(training):
    mixer = CopiedMixer(4, proj_drop=0.5).train(training).bfloat16()
    mixer.qkv.weight.requires_grad_(False)
    mixer.dwc.weight.grad = torch.ones_like(mixer.dwc.weight)
    calls = []
    mixer.register_forward_hook(lambda *a: calls.append(a))
    before = {name: value.clone() for name, value in mixer.state_dict().items()}
    versions = [p._version for p in mixer.parameters()]
    torch.rand(3)
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert swap.refusal(mixer) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    assert mixer.training is training
    assert [p._version for p in mixer.parameters()] == versions
    assert [p.requires_grad for p in mixer.parameters()].count(False) == 1
    assert [p.grad is not None for p in mixer.parameters()].count(True) == 1
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_check_that_draws_random_numbers_gives_them_back():
    mixer = _OwnDropout(4)
    state = torch.get_rng_state()
    assert swap.refusal(mixer) is not None
    assert torch.equal(torch.get_rng_state(), state)


# Swapping


def test_parameters_keys_and_order_stay():
    class Reordered(CopiedMixer):
        def __init__(self, dim):
            super().__init__(dim)
            self._modules["qkv"] = self._modules.pop("qkv")  # registered last

    for mixer in (CopiedMixer, Reordered):
        model = Net(mixer)
        parameters = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        modules = [name for name, _ in model.named_modules()]
        fuse(model)
        assert list(model.state_dict()) == list(Net(mixer).state_dict())
        assert [name for name, _ in model.named_modules()] == modules
        assert [(n, id(p)) for n, p in model.named_parameters()] == [
            (n, id(p)) for n, p in parameters.items()
        ]
        assert [(n, id(b)) for n, b in model.named_buffers()] == [
            (n, id(b)) for n, b in buffers.items()
        ]


def _train(model, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 3, 9, 7, generator=generator)
        y = torch.randint(3, (4,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_an_optimizer_made_before_trains_the_fused_model():
    model = Net().train()
    plain = copy.deepcopy(model)
    expected = _train(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fuse(model)
    assert _train(model, optimizer) == pytest.approx(expected, rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)


def test_eval_after_a_step_uses_the_new_weights():
    model = Net().train()
    fuse(model)
    x = images()
    output(model, x)  # weights may be packed now
    _train(model.train(), torch.optim.SGD(model.parameters(), lr=0.5))
    fused = output(model, x)
    unfuse(model)
    torch.testing.assert_close(fused, output(model, x))


def test_batch_statistics_are_shared_with_the_original():
    model = Net().train()
    original = model.blocks[0].attn
    before = original.oper_q[0].block[1].running_mean.clone()
    fuse(model)
    model(images())
    assert not torch.equal(original.oper_q[0].block[1].running_mean, before)
    assert original.oper_q[0].block[1].num_batches_tracked == 1


def test_ema_copy_is_independent_and_unfuses_on_its_own():
    model = Net()
    fuse(model)
    ema = copy.deepcopy(model)
    x = images()
    expected = output(ema, x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    torch.testing.assert_close(output(ema, x), expected)
    assert unfuse(ema).restored == ("blocks.0.attn", "blocks.1.attn")
    mixer = ema.blocks[0].attn
    assert type(mixer) is CopiedMixer
    torch.testing.assert_close(output(ema, x), expected)
    assert type(model.blocks[0].attn) is FusedCATM
    assert not {id(p) for p in ema.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("through", ["pickle", "torch.save"])
def test_a_pickled_model_unfuses(through):
    model = Net()
    fuse(model, backend="reference")
    x = images()
    expected = output(model, x)
    if through == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(output(loaded, x), expected)
    assert loaded.blocks[0].attn.backend == "reference"
    fused = loaded.blocks[0].attn
    unfuse(loaded)
    assert type(loaded.blocks[0].attn) is CopiedMixer
    assert loaded.blocks[0].attn.qkv is fused.qkv
    torch.testing.assert_close(output(loaded, x), expected)


def test_unfuse_restores_the_objects_with_the_mode_of_now():
    model = Net().train()
    originals = [block.attn for block in model.blocks]
    fuse(model)
    model.eval()
    report = unfuse(model)
    assert report.restored == ("blocks.0.attn", "blocks.1.attn")
    assert all(a is b.attn for a, b in zip(originals, model.blocks, strict=True))
    assert not any(m.training for m in model.modules())
    assert unfuse(model).restored == ()
    assert fuse(model).swapped == ("blocks.0.attn", "blocks.1.attn")


def test_submodules_exchanged_while_fused_are_kept():
    model = Net()
    fuse(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    drop = model.blocks[0].attn.proj_drop = nn.Dropout(0.2)
    unfuse(model)
    assert type(model.blocks[0].attn) is CopiedMixer
    assert type(model.blocks[0].attn.oper_q[0].block[1]) is nn.SyncBatchNorm
    assert model.blocks[0].attn.proj_drop is drop


def test_hooks_on_the_mixer_keep_firing():
    model = Net()
    calls = []
    early = model.blocks[0].attn.register_forward_hook(lambda m, i, o: calls.append("early"))
    fuse(model)
    model.blocks[0].attn.register_forward_pre_hook(lambda m, i: calls.append("late"))
    output(model, images())
    assert calls == ["late", "early"]
    early.remove()
    output(model, images())
    assert calls == ["late", "early", "late"]
    unfuse(model)
    output(model, images())
    assert calls == ["late", "early", "late", "late"]


def test_backward_hooks_on_the_mixer_keep_firing():
    model = Net().train()
    calls = []
    model.blocks[0].attn.register_full_backward_hook(lambda m, i, o: calls.append(o[0].shape))
    fuse(model)
    model(images(2, 3, 8, 8)).sum().backward()
    assert calls == [(2, 4, 4, 4)]


def test_one_mixer_in_two_places_stays_one():
    mixer = CopiedMixer(4)
    model = nn.Sequential(mixer, nn.Identity(), mixer)
    assert fuse(model).swapped == ("0", "2")
    assert model[0] is model[2]
    model.append(mixer)  # the original once more
    assert fuse(model).swapped == ("3",)
    assert model[3] is model[0]
    assert unfuse(model).restored == ("0", "2", "3")
    assert model[0] is model[2] is model[3] is mixer


def test_one_block_in_two_places():
    block = copies.Block(CopiedMixer(4), 4)
    model = nn.Sequential(block, block)
    assert fuse(model).swapped == ("0.attn",)
    assert type(model[1].attn) is FusedCATM


def test_fuse_again_changes_nothing_but_the_backend():
    model = Net()
    fuse(model)
    fused = [block.attn for block in model.blocks]
    built = model.extra = FusedCATM(4, backend="reference")
    report = fuse(model)
    assert report.swapped == ()
    assert report.already == ("blocks.0.attn", "blocks.1.attn", "extra")
    assert [block.attn for block in model.blocks] == fused
    fuse(model, backend="reference")
    assert [mixer.backend for mixer in fused] == ["reference"] * 2
    fuse(model)
    assert [mixer.backend for mixer in fused] == [None] * 2
    assert built.backend == "reference"


def test_only_this_instance_is_changed():
    model, other = Net(), Net()
    forward = CopiedMixer.forward
    fuse(model)
    assert CopiedMixer.forward is forward
    assert type(other.blocks[0].attn) is CopiedMixer
    assert type(Net().blocks[0].attn) is CopiedMixer


def test_a_mixer_that_was_built_fused_unfuses_to_the_plain_one():
    model = Net(FusedCATM)
    x = images()
    expected = output(model, x)
    fused = model.blocks[0].attn
    keys = list(model.state_dict())
    unfuse(model)
    plain = model.blocks[0].attn
    assert type(plain) is AdditiveTokenMixer
    assert plain.qkv is fused.qkv
    assert not plain.training
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(output(model, x), expected)
    pickle.loads(pickle.dumps(copy.deepcopy(plain)))


def test_from_mixer_shares_and_refuses():
    mixer = RewrittenMixer(4, drop=0.1).eval()
    fused = FusedCATM.from_mixer(mixer, backend="reference")
    assert [id(p) for p in fused.parameters()] == [id(p) for p in mixer.parameters()]
    assert not fused.training
    with pytest.raises(ValueError, match="computes something else"):
        FusedCATM.from_mixer(_Residual(4))
    with pytest.raises(TypeError, match=r"mixer: expected a torch\.nn\.Module, got int"):
        FusedCATM.from_mixer(3)


def test_a_compiled_model_notices_the_swap():
    model = nn.Sequential(CopiedMixer(4)).eval()
    compiled = torch.compile(model, backend="eager")
    x = images(1, 4, 5, 5)
    expected = compiled(x)
    calls = []
    fuse(model)
    model[0].register_forward_hook(lambda m, i, o: calls.append(type(m)))
    torch.testing.assert_close(compiled(x), expected)
    assert calls == [FusedCATM]


@pytest.fixture
def one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("when", ["before", "after"])
def test_ddp(one_process, when):
    model = Net().train()
    keys = list(model.state_dict())
    if when == "before":
        fuse(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    if when == "after":
        assert fuse(ddp).swapped == ("module.blocks.0.attn", "module.blocks.1.attn")
    losses = _train(ddp, optimizer)
    assert all(p.grad is not None for p in model.parameters())
    assert list(ddp.state_dict()) == [f"module.{key}" for key in keys]
    torch.manual_seed(0)
    plain = Net().train()
    assert _train(plain, torch.optim.SGD(plain.parameters(), lr=0.1)) == pytest.approx(
        losses, rel=1e-5
    )


# Arguments


def test_no_mixer_is_no_error():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    report = fuse(model)
    assert (report.swapped, report.refused, report.already) == ((), (), ())
    assert str(report).startswith("no mixer found: looked for a 1x1 convolution from C to 3C")
    assert unfuse(model).restored == ()


def test_the_root_cannot_be_replaced():
    mixer = CopiedMixer(4)
    ((name, reason),) = fuse(mixer).refused
    assert name == ""
    assert "FusedCATM.from_mixer(model)" in reason
    fused = FusedCATM.from_mixer(mixer)
    assert fuse(fused).already == ("",)
    with pytest.raises(ValueError, match="model: expected a module that contains mixers"):
        unfuse(fused)


@pytest.mark.parametrize("call", [fuse, unfuse])
def test_not_a_module(call):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        call([CopiedMixer(4)])


def test_unknown_backend_changes_nothing():
    model = Net()
    with pytest.raises(ValueError, match=r"backend: expected one of .*reference.*got 'cuad'"):
        fuse(model, backend="cuad")
    assert type(model.blocks[0].attn) is CopiedMixer


def test_unusable_backend_changes_nothing():
    unusable = next((s for s in casvit_kernels.backends() if not s.usable), None)
    if unusable is None:
        pytest.skip("every backend is usable here")
    model = Net()
    with pytest.raises(casvit_kernels.BackendUnavailable, match=unusable.name) as raised:
        fuse(model, backend=unusable.name)
    assert unusable.reason in str(raised.value)
    assert type(model.blocks[0].attn) is CopiedMixer


def test_reports_read_well():
    model = nn.ModuleDict({"a": CopiedMixer(4), "b": _Residual(4), "c": FusedCATM(4)})
    lines = str(fuse(model)).splitlines()
    assert lines[:5] == ["1 swapped", "  a", "1 already fused", "  c", "1 refused"]
    assert lines[5].startswith("  b: its forward computes something else in training mode: max")
    assert str(unfuse(model)) == "2 restored\n  a\n  c"


def test_fused_by_native_kernel_computes_the_same(require_native):
    model = Net(dim=16)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    x = images(2, 3, 26, 18)
    expected = output(copy.deepcopy(model).double(), x.double())
    fuse(model, backend="cpu")
    torch.testing.assert_close(output(model, x).double(), expected, rtol=1e-4, atol=1e-5)
