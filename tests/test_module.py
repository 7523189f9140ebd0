"""FusedCATM as a module: the published interface, modes, and the cache of packed weights."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from conftest import require_backend
from mixers import assert_right, filled, plain_copy
from torch import nn
from torch.nn.utils import prune

from casvit_kernels import AdditiveTokenMixer, FusedCATM, catm
from casvit_kernels.module import mixer_weights
from casvit_kernels.ops.mixer import cpu
from casvit_kernels.ops.mixer.weights import GateWeights, MixerWeights

KEYS = [
    "qkv.weight",
    "qkv.bias",
    *(
        f"oper_{z}.{key}"
        for z in "qk"
        for key in (
            "0.block.0.weight",
            "0.block.0.bias",
            "0.block.1.weight",
            "0.block.1.bias",
            "0.block.1.running_mean",
            "0.block.1.running_var",
            "0.block.1.num_batches_tracked",
            "0.block.3.weight",
            "1.block.1.weight",
        )
    ),
    "dwc.weight",
    "dwc.bias",
    "proj.weight",
    "proj.bias",
]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    require_backend(request.param)
    return request.param


@pytest.fixture
def mixer(backend):
    return filled(FusedCATM(19, True, backend=backend)).eval()


@pytest.fixture
def x():
    return torch.randn(2, 19, 6, 5) + 0.3


def norms(mixer):
    return mixer.oper_q[0].block[1], mixer.oper_k[0].block[1]


# The published interface


@pytest.mark.parametrize("bias", [False, True])
def test_keys_in_the_published_order(bias):
    keys = [k for k in KEYS if bias or k != "qkv.bias"]
    assert list(FusedCATM(5, bias).state_dict()) == keys


@pytest.mark.parametrize("bias", [False, True])
def test_same_seed_same_initialisation(bias):
    torch.manual_seed(5)
    plain = AdditiveTokenMixer(7, bias, 0.1)
    torch.manual_seed(5)
    fused = FusedCATM(7, bias, 0.1)
    for (name, a), (other, b) in zip(
        plain.state_dict().items(), fused.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in fused.named_parameters()]
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in fused.named_modules()]


def test_defaults_are_the_published_ones():
    mixer = FusedCATM()
    assert mixer.qkv.weight.shape == (1536, 512, 1, 1)
    assert mixer.qkv.bias is None
    assert mixer.proj_drop.p == 0.0
    assert mixer.backend is None


def test_strict_loading_both_ways():
    plain, fused = filled(AdditiveTokenMixer(7), 1), filled(FusedCATM(7), 2)
    state = copy.deepcopy(fused.state_dict())
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain.qkv.weight, state["qkv.weight"])
    with pytest.raises(RuntimeError, match=r"qkv\.bias"):
        FusedCATM(7, True).load_state_dict(plain.state_dict(), strict=True)


def test_batch_norm_stays_a_batch_norm():
    found = [m for m in FusedCATM(5).modules() if isinstance(m, nn.BatchNorm2d)]
    assert [type(m) for m in found] == [nn.BatchNorm2d, nn.BatchNorm2d]


def test_repr_names_the_backend():
    assert "backend='reference'" in repr(FusedCATM(3, backend="reference"))


# Training: batch statistics, momentum, norms with parts missing


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_and_gradients_over_several_steps(mixer, x, momentum):
    mixer.train()
    for norm in norms(mixer):
        norm.momentum = momentum
        norm.num_batches_tracked.zero_()
    plain = plain_copy(mixer)
    for step in range(3):
        batch = x + step
        mixer(batch).square().mean().backward()
        plain(batch.double()).square().mean().backward()
    for norm, expected in zip(norms(mixer), norms(plain), strict=True):
        assert norm.num_batches_tracked.item() == 3
        torch.testing.assert_close(
            norm.running_mean.double(), expected.running_mean, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            norm.running_var.double(), expected.running_var, rtol=1e-5, atol=1e-6
        )
    for (name, p), q in zip(mixer.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None, name
        scale = q.grad.abs().max().item()
        assert (p.grad - q.grad).abs().max().item() <= 1e-4 * max(scale, 1e-2), name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("tracking", [False, True])
def test_norms_with_parts_missing(mixer, x, training, affine, tracking):
    for gate in (mixer.oper_q, mixer.oper_k):
        gate[0].block[1] = nn.BatchNorm2d(19, affine=affine, track_running_stats=tracking)
    filled(mixer).train(training)
    assert_right(mixer, x)


def test_one_norm_frozen_and_one_training(mixer, x):
    mixer.train()
    frozen, training = norms(mixer)
    frozen.eval()
    before = frozen.running_mean.clone(), training.running_mean.clone()
    assert_right(mixer, x)
    assert torch.equal(frozen.running_mean, before[0])
    assert not torch.equal(training.running_mean, before[1])


def test_one_value_per_channel_is_refused_as_by_batch_norm():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        FusedCATM(3).train()(torch.randn(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("proj", "proj_weight"),
        ("oper_k.1.block.1", r"k\.channel_weight"),
        ("oper_q.0.block.1", r"q\.norm_weight"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_one_weight_of_another_dtype_in_training(mixer, x, part, name, dtype):
    mixer.train().get_submodule(part).to(dtype)
    before = copy.deepcopy(mixer.state_dict())
    message = rf"weights\.{name}: expected the dtype of weights\.qkv_weight, .* got {dtype}"
    with pytest.raises(TypeError, match=message):
        mixer(x)
    for training in (False, True):
        with pytest.raises(TypeError, match=message):
            catm(x, weights_of(mixer), training=training, backend=mixer.backend)
    assert all(torch.equal(v, before[k]) for k, v in mixer.state_dict().items())


def test_an_empty_batch_in_training(backend):
    mixer = FusedCATM(3, backend=backend).train()
    x = torch.empty(0, 3, 4, 5, requires_grad=True)
    out = mixer(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 3, 4, 5)
    assert all(p.grad is not None for p in mixer.parameters())


def test_dropout_is_active_in_training_only(backend):
    mixer = filled(FusedCATM(19, proj_drop=0.5, backend=backend))
    x = torch.randn(2, 19, 8, 8)
    mixer.eval()
    whole = assert_right(mixer, x)
    assert (whole == 0).sum() == 0
    mixer.train()
    for norm in norms(mixer):
        norm.eval()  # frozen: the fused path, with dropout after it
    dropped = mixer(x)
    zero = dropped == 0
    assert 0.4 < zero.float().mean() < 0.6
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero], rtol=1e-4, atol=1e-4)
    assert not torch.equal(mixer(x) == 0, zero)


def test_modes_may_alternate(mixer, x):
    for training in (False, True, False, True, False):
        mixer.train(training)
        assert_right(mixer, x + training)


def test_synchronised_batch_norm_in_eval(mixer, x):
    expected = mixer(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(mixer)
    assert isinstance(norms(converted)[0], nn.SyncBatchNorm)
    assert torch.equal(converted(x), expected)
    converted.train()
    for norm in norms(converted):
        norm.eval()
    assert torch.equal(converted(x), expected)


# The packed weights follow the parameters. Every edit below changes the output visibly.


def _optimizer(make):
    def edit(mixer):
        optimizer = make(mixer.parameters())
        for p in mixer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    return edit


def _in_place(mixer):
    with torch.no_grad():
        mixer.dwc.weight[0, 0, 1, 1] += 3.0


def _one_element_of_the_product(mixer):
    with torch.no_grad():
        mixer.qkv.weight[3, 2] += 3.0


def _ema(mixer):
    with torch.no_grad():
        torch._foreach_lerp_(
            list(mixer.parameters()), [torch.ones_like(p) for p in mixer.parameters()], 0.3
        )


def _load(mixer):
    mixer.load_state_dict(filled(FusedCATM(19, True), 9).state_dict())


def _assign(mixer):
    mixer.load_state_dict(filled(FusedCATM(19, True), 9).state_dict(), assign=True)


def _replace_parameter(mixer):
    mixer.proj.weight = nn.Parameter(2 * mixer.proj.weight.detach())


def _replace_module(mixer):
    new = nn.Conv2d(19, 19, 3, 1, 1, groups=19)
    mixer.dwc = new


def _round_trip(mixer):
    mixer.to(torch.bfloat16).to(torch.float32)


def _vector(mixer):
    vector = nn.utils.parameters_to_vector(mixer.parameters())
    nn.utils.vector_to_parameters(0.7 * vector, mixer.parameters())


def _swap_tensors(mixer):
    torch.utils.swap_tensors(mixer.proj.bias, nn.Parameter(mixer.proj.bias.detach() + 1))


def _statistics(mixer):
    mixer.oper_k[0].block[1].running_var.mul_(3)


def _statistics_replaced(mixer):
    mixer.oper_q[0].block[1].running_mean = mixer.oper_q[0].block[1].running_mean + 1


def _reset_statistics(mixer):
    mixer.oper_q[0].block[1].reset_running_stats()


def _training_step(mixer):
    mixer.train()
    mixer(torch.randn(4, 19, 6, 5))
    mixer.eval()


def _eps(mixer):
    mixer.oper_q[0].block[1].eps = 0.5


def _data(name):
    def edit(mixer):
        mixer.get_parameter(name).data.mul_(1.5).add_(0.1)

    edit.__name__ = f"data {name}"
    return edit


def _data_statistics(mixer):
    mixer.oper_k[0].block[1].running_mean.data.add_(1.0)


def _turned(mixer):
    weight = mixer.oper_k[1].block[1].weight  # at the same address
    weight.data = weight.data.transpose(0, 1)


def _negative(mixer):
    weight = mixer.oper_k[1].block[1].weight
    weight.data = torch._neg_view(weight.data.clone())  # what kernels are given is made for them


EDITS = {
    "sgd": _optimizer(lambda p: torch.optim.SGD(p, lr=0.1)),
    "adam foreach": _optimizer(lambda p: torch.optim.Adam(p, lr=0.1, foreach=True)),
    "adamw fused": _optimizer(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "in place": _in_place,
    "one element of qkv": _one_element_of_the_product,
    "ema": _ema,
    "load_state_dict": _load,
    "load_state_dict assign": _assign,
    "parameter replaced": _replace_parameter,
    "module replaced": _replace_module,
    "dtype round trip": _round_trip,
    "vector_to_parameters": _vector,
    "swap_tensors": _swap_tensors,
    "statistics": _statistics,
    "statistics replaced": _statistics_replaced,
    "statistics reset": _reset_statistics,
    "training step": _training_step,
    "eps": _eps,
    "data statistics": _data_statistics,
    "data turned": _turned,
    "data negative": _negative,
    **{f"data {name}": _data(name) for name, _ in FusedCATM(1, True).named_parameters()},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_results_follow_an_edit(mixer, x, edit):
    first = assert_right(mixer, x)
    assert torch.equal(mixer(x), first)
    edit(mixer)
    second = assert_right(mixer, x)
    assert torch.equal(mixer(x), second)  # also from the cache
    # The edit was big enough for a stale cache to fail assert_right.
    assert (second - first).abs().max() > 1e-4 * first.abs().max()


def test_single_elements_written_through_data_follow_after_refresh(mixer, x):
    assert_right(mixer, x)
    mixer.qkv.weight.data[3, 2] += 3.0
    mixer.refresh()
    assert_right(mixer, x)


def test_a_write_while_weights_are_packed_is_seen(x, monkeypatch):
    require_backend("cpu")
    mixer = filled(FusedCATM(19, backend="cpu")).eval()
    real = cpu.CpuKernels.pack
    before = mixer.dwc.weight.data  # stays where it was, with its values

    def meanwhile(*arguments):
        made = real(*arguments)
        mixer.dwc.weight.data = 2 * before  # another thread
        monkeypatch.undo()
        return made

    monkeypatch.setattr(cpu.CpuKernels, "pack", meanwhile)
    with torch.no_grad():
        mixer(x)
    assert_right(mixer, x)


def test_repeated_calls_without_gradients_take_the_short_operator(x, monkeypatch):
    require_backend("cpu")
    mixer = filled(FusedCATM(19, backend="cpu")).eval()
    expected = mixer(x)
    monkeypatch.setattr(cpu.schema, "project_and_mix", None)
    with torch.no_grad():
        assert torch.equal(mixer(x), expected)
    with torch.inference_mode():
        assert torch.equal(mixer(x), expected)


def test_the_short_operator_refuses_what_was_packed_for_something_else(x):
    require_backend("cpu")
    operators = torch.ops.casvit_kernels
    flat = cpu.schema.flatten(mixer_weights(filled(FusedCATM(19)).eval()))
    packed = operators.pack(*flat, 1e-5, 1e-5, torch.float32)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="packed: expected weights packed for x"):
            operators.cpu_infer(x, packed)  # nothing remembered
        with pytest.raises(RuntimeError, match="packed: expected weights packed on this machine"):
            operators.cpu_remember(packed[:100], *flat, 1e-5, 1e-5)
        operators.cpu_remember(packed, *flat, 1e-5, 1e-5)
        for other in (x.bfloat16(), x[:, :5], x.new_zeros(1, 33, 2, 2)):
            with pytest.raises(RuntimeError, match="packed: expected weights packed for x"):
                operators.cpu_infer(other, packed)
        assert operators.cpu_infer(x, packed).shape == x.shape


def test_weights_are_packed_once_for_each_change(x, monkeypatch):
    require_backend("cpu")
    packed = []
    real = cpu.schema.pack
    monkeypatch.setattr(cpu.schema, "pack", lambda *args: packed.append(1) or real(*args))
    mixer = filled(FusedCATM(19, backend="cpu")).eval()
    for _ in range(3):
        mixer(x)
    mixer.train().eval()
    mixer(x)
    mixer(x[:1, :, :2])
    assert len(packed) == 1
    _in_place(mixer)
    for _ in range(3):
        mixer(x)
    assert len(packed) == 2
    mixer.dwc.weight.data.mul_(1.5)
    for _ in range(4):
        mixer(x)
    assert len(packed) == 3
    mixer.refresh()
    mixer(x)
    assert len(packed) == 4


def test_each_dtype_is_packed_once_when_calls_alternate(x, monkeypatch):
    require_backend("cpu")
    packed = []
    real = cpu.CpuKernels.pack
    monkeypatch.setattr(
        cpu.CpuKernels, "pack", lambda *args: packed.append(args[-1]) or real(*args)
    )
    mixer = filled(FusedCATM(19, backend="cpu")).eval()

    def alternate(half):
        expected = mixer(x)
        for _ in range(3):
            with torch.autocast("cpu", half):
                low = mixer(x)
            assert low.dtype is half
            assert torch.equal(mixer(x), expected)
        return low

    alternate(torch.bfloat16)
    assert packed == [torch.float32, torch.bfloat16]
    alternate(torch.float16)
    alternate(torch.bfloat16)
    assert packed == [torch.float32, torch.bfloat16, torch.float16]
    before = alternate(torch.bfloat16)
    _in_place(mixer)
    after = alternate(torch.bfloat16)
    assert packed[3:] == [torch.float32, torch.bfloat16]
    assert not torch.equal(before, after)


def test_few_sets_of_packed_weights_are_kept(x):
    require_backend("cpu")
    mixer = filled(FusedCATM(19, backend="cpu")).eval()
    for i in range(10):
        mixer.oper_q[0].block[1].eps = 1e-3 * (i + 1)
        assert_right(mixer, x)
    assert len(mixer._packed._entries) == 3
    _in_place(mixer)  # what the others were packed from is no more
    assert_right(mixer, x)
    assert len(mixer._packed._entries) == 1


def test_the_cache_is_no_part_of_the_state(mixer, x):
    mixer(x)
    assert set(mixer.state_dict()) == set(KEYS)
    assert {n for n, _ in mixer.named_buffers()} == {
        k for k in KEYS if "running" in k or "num_" in k
    }


def test_a_copy_is_independent(mixer, x):
    first = mixer(x)
    twin = copy.deepcopy(mixer)
    assert torch.equal(twin(x), first)
    with torch.no_grad():
        twin.proj.weight.mul_(2)
    assert_right(twin, x)
    assert torch.equal(mixer(x), first)
    with torch.no_grad():
        mixer.dwc.weight.mul_(3)
    assert_right(mixer, x)
    assert_right(twin, x)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle_round_trip(mixer, x, how):
    first = mixer(x)
    if how == "pickle":
        data = pickle.dumps(mixer)
        twin = pickle.loads(data)
    else:
        file = io.BytesIO()
        torch.save(mixer, file)
        data = file.getvalue()
        twin = torch.load(io.BytesIO(data), weights_only=False)
    assert torch.equal(twin(x), first)
    assert twin.backend == mixer.backend
    # The parameters, and no packed copy of them beside.
    plain = len(pickle.dumps(AdditiveTokenMixer(19, True)))
    if how == "pickle":
        assert len(data) < plain + 1000
    with torch.no_grad():
        twin.proj.weight.mul_(2)
    assert_right(twin, x)


def test_weights_that_are_computed_from_others(mixer, x):
    first = mixer(x)
    nn.utils.parametrizations.weight_norm(mixer.dwc)
    torch.testing.assert_close(mixer(x), first, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        mixer.dwc.parametrizations.weight.original0.mul_(2)
    second = assert_right(mixer, x)
    assert (second - first).abs().max() > 0.01
    mixer(x).sum().backward()
    assert mixer.dwc.parametrizations.weight.original1.grad is not None


def test_pruning_follows_its_parameter(mixer, x):
    first = mixer(x)
    prune.l1_unstructured(mixer.dwc, "weight", amount=0.5)
    second = mixer(x)
    assert (second - first).abs().max() > 0.01
    with torch.no_grad():
        mixer.dwc.weight_orig.mul_(2)  # dwc.weight is renewed from it by a forward pre-hook
    third = mixer(x)
    assert (third - second).abs().max() > 0.01
    mixer.dwc.weight = mixer.dwc.weight.detach()
    prune.remove(mixer.dwc, "weight")
    assert torch.allclose(assert_right(mixer, x), third, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qkv", "oper_q.0.block.1", "oper_k.1.block.1", "proj"])
def test_hooks_of_children_with_weights_run(mixer, x, name):
    expected = mixer(x)
    seen = []
    handle = mixer.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)
    assert seen == [1]
    handle.remove()
    assert torch.equal(mixer(x), expected)
    assert seen == [1]


@pytest.mark.parametrize("training", [False, True])
def test_backward_hooks_of_children_with_weights_run(mixer, x, training):
    mixer.train(training)
    seen = []
    mixer.dwc.register_full_backward_hook(lambda *_: seen.append("after"))
    mixer.oper_q[0].block[0].register_full_backward_pre_hook(lambda *_: seen.append("before"))
    mixer(x).sum().backward()
    assert sorted(seen) == ["after", "before"]
    assert_right(mixer, x)


def test_computed_weights_are_not_kept(mixer, x):
    nn.utils.parametrizations.weight_norm(mixer.dwc)
    made = []
    mixer.dwc.parametrizations.weight.register_forward_hook(
        lambda _, __, weight: made.append(weakref.ref(weight))
    )
    mixer(x)
    gc.collect()
    assert made
    assert all(weight() is None for weight in made)


def test_weights_of_any_strides(mixer, x):
    first = mixer(x)
    mixer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(mixer(x), first)
    for name, p in list(mixer.named_parameters()):
        spread = torch.full((*p.shape, 3), torch.nan)[..., 1].copy_(p.detach())
        owner, _, leaf = name.rpartition(".")
        setattr(mixer.get_submodule(owner), leaf, nn.Parameter(spread))
    assert not mixer.qkv.weight.is_contiguous()
    torch.testing.assert_close(mixer(x), first)


def test_dtypes_may_alternate(mixer, x):
    expected = assert_right(mixer, x)
    half = copy.deepcopy(mixer).to(torch.bfloat16)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert mixer(x).dtype is torch.bfloat16
        assert torch.equal(mixer(x), expected)
    assert half(x.to(torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_norm_may_stay_float32_in_a_mixer_of_half_precision(mixer, x, half):
    mixer.to(half)
    for norm in norms(mixer):
        norm.float()
    out = mixer(x.to(half))
    assert out.dtype is half
    expected = plain_copy(mixer)(x.to(half).double())
    eps = torch.finfo(half).eps
    assert (out.double() - expected).abs().max() < 8 * eps * expected.abs().max()


def test_mixers_do_not_mix_up_their_weights(backend, x):
    mixers = [filled(FusedCATM(19, backend=backend), seed).eval() for seed in range(3)]
    for _ in range(2):
        outputs = [assert_right(m, x) for m in mixers]
    assert not torch.equal(outputs[0], outputs[1])


# Sharing


def test_from_mixer_shares_parameters_and_follows_them(backend, x):
    plain = filled(AdditiveTokenMixer(19, True)).eval()
    fused = FusedCATM.from_mixer(plain, backend=backend)
    assert not fused.training
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert a is b
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_right(fused, x)
    with torch.no_grad():
        plain.qkv.weight.mul_(0.5)
    assert_right(fused, x)


def weights_of(mixer):
    def gate(operation):
        conv, norm, _, spatial, _ = operation[0].block
        return GateWeights(
            conv.weight,
            conv.bias,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            spatial.weight,
            operation[1].block[1].weight,
        )

    return MixerWeights(
        mixer.qkv.weight,
        mixer.qkv.bias,
        gate(mixer.oper_q),
        gate(mixer.oper_k),
        mixer.dwc.weight,
        mixer.dwc.bias,
        mixer.proj.weight,
        mixer.proj.bias,
    )


def test_the_function_equals_the_module(mixer, x):
    weights = weights_of(mixer)
    assert torch.equal(catm(x, weights, backend=mixer.backend), mixer(x))
    norms(mixer)[0].eps, norms(mixer)[1].eps = 0.1, 0.4
    assert torch.equal(catm(x, weights, eps=(0.1, 0.4), backend=mixer.backend), mixer(x))
    # In training it updates the running statistics that it is given.
    twin = copy.deepcopy(mixer)
    out = catm(x, weights_of(twin), eps=(0.1, 0.4), training=True, backend=mixer.backend)
    torch.testing.assert_close(out, mixer.train()(x), rtol=1e-5, atol=1e-6)
    for norm, own in zip(norms(twin), norms(mixer), strict=True):
        torch.testing.assert_close(norm.running_mean, own.running_mean)
        torch.testing.assert_close(norm.running_var, own.running_var)


@pytest.mark.parametrize("dim", [64, 220])
@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.dwc.weight.data[:, :, 1, 1].mul_(3),
        lambda m: m.proj.weight.data.clamp_(-0.1, 0.1),
        lambda m: m.qkv.weight.data[:, 5].zero_(),
        lambda m: m.oper_k[0].block[1].weight.data[7].mul_(3),
        lambda m: m.dwc.weight.detach().numpy()[:, :, 2, 0].fill(0.5),
    ],
    ids=["one tap", "clamp", "one input channel", "one norm weight", "numpy"],
)
def test_edits_that_autograd_does_not_see_are_noticed(dim, edit):
    torch.manual_seed(0)
    mixer, x = FusedCATM(dim).eval(), torch.randn(1, dim, 7, 7)
    with torch.no_grad():
        mixer(x)
        edit(mixer)
        torch.testing.assert_close(mixer(x), copy.deepcopy(mixer)(x))


def test_any_nan_stays_nan():
    x = torch.full((1, 64, 7, 7), -1, dtype=torch.int32).view(torch.float32)
    mixer = FusedCATM(64).eval()
    with torch.no_grad():
        assert mixer(x).isnan().all()
        with torch.autocast("cpu"):
            assert mixer(x).isnan().all()


def test_weights_of_another_rank_are_refused():
    require_backend("cpu")
    w = weights_of(FusedCATM(8).eval())
    w = w._replace(dwc_weight=w.dwc_weight.squeeze(1))
    with pytest.raises(
        ValueError, match=r"dwc_weight: expected shape \(8, 1, 3, 3\), got \(8, 3, 3\)"
    ):
        catm(torch.randn(1, 8, 5, 5), w, backend="cpu")
