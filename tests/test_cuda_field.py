"""What training scripts do to a model, on the CUDA kernels in the emulation, under autocast.

Values are held to float64: at most four times the error of plain PyTorch under the same autocast. What
shall change no value is held to the bit.
"""

import copy
import random
import sys

import pytest
import torch
from cuda_emulation import backend as emulated
from cuda_emulation import build
from mixers import filled, plain_copy
from test_field import Net as PlainNet
from test_field import NetWithFrozenNorms, batches, gradients, loss_of, pair, sgd

from casvit_kernels import FusedCATM, fuse, testing, unfuse
from casvit_kernels.ops.mixer import kernels

NAME = emulated.NAME
pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
both = pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)


@pytest.fixture(autouse=True)
def operators():
    yield emulated.register()
    sys.modules["casvit_kernels.backends.registry"]._REGISTRY.pop(NAME)
    kernels._TABLE.pop(NAME)
    testing.BACKENDS.pop(NAME)


def backward(model, batch, dtype, scaler=None):
    """The loss of a batch; its gradients are added to those of the parameters."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = loss_of(model, batch)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach()


def train(model, data, dtype, scaler=None):
    """The loss of each step."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    optimizer, losses = sgd(model), []
    for batch in data:
        optimizer.zero_grad()
        losses.append(backward(model, batch, dtype, scaler))
        scaler.step(optimizer)
        scaler.update()
    return losses


def three(cls=PlainNet):
    """The same model plain, fused, and plain in float64."""
    plain, fused = pair(cls, NAME)
    return plain, fused, copy.deepcopy(plain).double()


def wide(data):
    return [(x.double(), y) for x, y in data]


def assert_as_exact(found, plain, truth, dtype):
    """Of dictionaries of tensors."""
    assert found.keys() == plain.keys() == truth.keys()
    for name, right in truth.items():
        own = (plain[name].double() - right).abs().max().item()
        least = torch.finfo(dtype).eps * right.abs().max().item()
        error = (found[name].double() - right).abs().max().item()
        assert error <= 4 * max(own, least), f"{name}: {error:.3g}, plain {own:.3g}"


def assert_same_training(models, data, dtype):
    losses = [train(m, data, dtype) for m in models[:2]]
    losses.append(train(models[2], wide(data), None))
    plain, fused, truth = (dict(enumerate(of)) for of in losses)
    assert_as_exact(fused, plain, truth, dtype)
    assert max(truth.values()) - min(truth.values()) > 1e-2  # something was trained


@both
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts(layout, dtype, operators):
    plain, fused, truth = three()
    (batch,) = batches(1)
    given = (batch[0].contiguous(memory_format=layout), batch[1])
    fused.to(memory_format=layout)
    seen = []
    fused.blocks[1].attn.register_forward_hook(lambda _, __, out: seen.append(out))
    backward(plain, batch, dtype), backward(fused, given, dtype)
    backward(truth, wide([batch])[0], None)
    assert_as_exact(gradients(fused), gradients(plain), gradients(truth), dtype)
    of = [dict(m.named_buffers()) for m in (fused, plain, truth)]
    assert_as_exact(*of, dtype)
    assert seen[0].is_contiguous(memory_format=layout)
    assert {name for name, _ in operators.launches} >= {"GatesArguments", "CombineArguments"}


@both
def test_sizes_that_change_from_batch_to_batch(dtype):
    assert_same_training(three(), batches(5, (48, 120, 64, 40, 88), 3), dtype)


@both
def test_norms_frozen_by_train(dtype):
    models = three(NetWithFrozenNorms)
    before = copy.deepcopy(dict(models[1].named_buffers()))
    assert_same_training(models, batches(3), dtype)
    assert all(g is not None for g in gradients(models[1]).values())
    for name, buffer in models[1].named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_gradients_of_batches_add_up():
    _, fused, _ = three()
    data, alone = batches(3), []
    for batch in data:
        fused.zero_grad()
        backward(fused, batch, torch.bfloat16)
        alone.append(gradients(fused))
    fused.zero_grad()
    for batch in data:
        backward(fused, batch, torch.bfloat16)
    for name, g in gradients(fused).items():
        a, b, c = (of[name] for of in alone)
        assert torch.equal(g, a + b + c), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    _, fused, _ = three()
    (batch,) = batches(1)
    again = copy.deepcopy(fused)
    again.checkpointing = reentrant
    losses = [backward(m, batch, torch.bfloat16) for m in (fused, again)]
    assert torch.equal(*losses)
    for name, g in gradients(fused).items():
        assert torch.equal(g, again.get_parameter(name).grad), name
    # The second forward updates the running statistics once more, as in plain PyTorch.
    assert again.blocks[1].attn.oper_q[0].block[1].num_batches_tracked == 2


@pytest.mark.parametrize("seed", range(1, 8))
def test_any_subset_of_parameters_frozen(seed):
    _, fused, _ = three()
    (batch,) = batches(1)
    backward(fused, batch, torch.bfloat16)
    expected = gradients(fused)
    fused.zero_grad()
    names = [n for n in expected if n != "head.weight"]
    frozen = random.Random(seed).sample(names, len(names) * seed // 8)
    for name in frozen:
        fused.get_parameter(name).requires_grad_(False)
    backward(fused, batch, torch.bfloat16)
    for name, g in gradients(fused).items():
        assert g is None if name in frozen else torch.equal(g, expected[name]), name


@pytest.mark.parametrize("when", ["before", "after"])
def test_ema_by_deepcopy(when):
    _, fused, _ = three()
    if when == "before":
        unfuse(fused)
    average = copy.deepcopy(fused)
    if when == "before":
        fuse(fused, NAME), fuse(average, NAME)
    assert isinstance(average.blocks[0].attn, FusedCATM)
    average.eval()

    def infer(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(x)

    data = batches(3)
    x, before = data[0][0], None
    for batch in data:
        train(fused, [batch], torch.bfloat16)
        with torch.no_grad():
            for a, b in zip(
                average.state_dict().values(), fused.state_dict().values(), strict=True
            ):
                a.copy_(0.7 * a + 0.3 * b if a.is_floating_point() else b)
        found = infer(average)  # its packed weights follow
        _, fresh = pair(backend=NAME)
        fresh.load_state_dict(average.state_dict())
        assert torch.equal(found, infer(fresh.eval()))
        assert before is None or not torch.equal(found, before)
        before = found


# float16 with a gradient scaler


def test_a_scaled_training_is_the_same():
    """Over steps whose scale is changed by a power of two, where nothing overflows."""
    plain, fused, truth = three()
    data, scaler = batches(4), torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    losses = [
        train(plain, data, torch.float16, copy.deepcopy(scaler)),
        train(fused, data, torch.float16, scaler),
        train(truth, wide(data), None),
    ]
    assert scaler.get_scale() == 256
    plain, fused, truth = (dict(enumerate(of)) for of in losses)
    assert_as_exact(fused, plain, truth, torch.float16)


@pytest.mark.parametrize("why", ["the scale", "inf", "nan"])
def test_a_step_whose_gradients_are_not_finite_is_skipped(why):
    _, fused, _ = three()
    data = batches(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30 if why == "the scale" else 64.0)
    if why != "the scale":
        # Of the gradient at a mixer's output: the loss is finite.
        fused.blocks[0].attn.register_full_backward_pre_hook(
            lambda _, grads: (torch.full_like(grads[0], float(why)),)
        )
    before = {name: p.clone() for name, p in fused.named_parameters()}
    scale = scaler.get_scale() or scaler._init_scale
    (loss,) = train(fused, data[:1], torch.float16, scaler)
    assert loss.isfinite()
    assert not fused.blocks[0].attn.qkv.weight.grad.isfinite().all()
    assert scaler.get_scale() == scale / 2
    assert all(torch.equal(p, before[name]) for name, p in fused.named_parameters())
    if why == "the scale":
        scaler.update(64.0)
        train(fused, data[1:], torch.float16, scaler)
        assert scaler.get_scale() == 64
        assert not all(torch.equal(p, before[name]) for name, p in fused.named_parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_large_activations_in_float16(autocast):
    """x, q and k near 6e4: sums inside, of the gates and their statistics, have the range of float32.

    What is kept in float16 between two convolutions (a, and l times v) overflows as in plain PyTorch.
    """
    mixer = filled(FusedCATM(16, True, backend=NAME)).train()
    with torch.no_grad():
        mixer.qkv.weight[:32].mul_(0.2)
        mixer.qkv.weight[32:].zero_()  # v is its bias
        for gate in (mixer.oper_q, mixer.oper_k):
            gate[0].block[0].weight.mul_(8)
    x = torch.randn(2, 16, 8, 8).clamp(-1, 1) * 6e4
    wide, plain = plain_copy(mixer), plain_copy(mixer, torch.float16)
    if not autocast:
        mixer, x = mixer.half(), x.half()
    y, z = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        out = mixer(y)
    expected = wide(z)
    assert wide.oper_q[0].block[0](wide.qkv(z)[:, :16]).abs().max() > 2 * 65504
    assert not plain(x.half()).isfinite().all()
    assert (out.double() - expected).abs().max() <= 5e-3 * expected.abs().max()
    out.float().mean().backward()
    expected.mean().backward()
    found = {"x": y.grad, **gradients(mixer), **dict(mixer.named_buffers())}
    truth = {"x": z.grad, **gradients(wide), **dict(wide.named_buffers())}
    finite = [name for name, value in truth.items() if value.abs().max() < 6e4]
    assert len(finite) > 20
    for name in finite:
        assert found[name].isfinite().all(), name
