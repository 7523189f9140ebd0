"""What training scripts in the field do to a model: a fused one behaves as the plain one."""

import copy
import io
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKEND, require_backend
from mixers import filled
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from casvit_kernels import AdditiveTokenMixer, FusedCATM, fuse, unfuse

DIM = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(DIM)
        self.attn = AdditiveTokenMixer(DIM)
        self.mlp = nn.Conv2d(DIM, DIM, 1)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Net(nn.Module):
    """A stem, two blocks with a mixer and a head: (B, 3, H, W) to 5 classes."""

    checkpointing = None  # or the argument use_reentrant

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, 8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(DIM, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        return self.head(x.mean((2, 3)))


class NetWithFrozenNorms(Net):
    """As detection code freezes BatchNorm."""

    def train(self, mode=True):
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        return self


@pytest.fixture(autouse=True)
def _setup():
    require_backend(BACKEND)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(cls=Net, backend=BACKEND):
    """The same model plain and fused, in training mode."""
    plain = cls()
    for block in plain.blocks:
        filled(block.attn)
        with torch.no_grad():
            block.attn.proj.weight.mul_(0.3)
    fused = copy.deepcopy(plain)
    assert len(fuse(fused, backend).swapped) == 2
    return plain.train(), fused.train()


def batches(count=4, sizes=(48,), images=4):
    return [
        (torch.randn(images, 3, sizes[i % len(sizes)], sizes[i % len(sizes)]), torch.arange(images))
        for i in range(count)
    ]


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model, data, optimizer=None, after=lambda: None):
    """The loss of each step."""
    optimizer = optimizer or sgd(model)
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


def gradients(model):
    return {k: p.grad for k, p in model.named_parameters()}


def assert_close(found, expected, tolerance=1e-4):
    """Of dictionaries of tensors; None stays None."""
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        if e is None:
            assert found[name] is None, name
        else:
            bound = tolerance * max(e.abs().max().item(), 0.1)
            error = (found[name].double() - e.double()).abs().max().item()
            assert error <= bound, f"{name}: {error:.3g}"


def assert_same_training(plain, fused, data, optimizer=sgd):
    losses = train(plain, data, optimizer(plain))
    assert train(fused, data, optimizer(fused)) == pytest.approx(losses, rel=1e-5)
    assert max(losses) - min(losses) > 1e-2  # something was trained


@pytest.mark.parametrize("when", ["before", "after"])
def test_ema_by_deepcopy(when):
    plain, fused = pair()
    if when == "before":
        unfuse(fused)
    averages = [copy.deepcopy(plain), copy.deepcopy(fused)]
    if when == "before":
        fuse(fused, BACKEND)
        fuse(averages[1], BACKEND)
    assert isinstance(averages[1].blocks[0].attn, FusedCATM)
    data = batches()
    for model, average in zip((plain, fused), averages, strict=True):

        def update(model=model, average=average):
            with torch.no_grad():
                for a, b in zip(
                    average.state_dict().values(), model.state_dict().values(), strict=True
                ):
                    a.copy_(0.7 * a + 0.3 * b if a.is_floating_point() else b)

        train(model, data, after=update)
    assert_close(averages[1].state_dict(), averages[0].state_dict())
    x = data[0][0]
    with torch.no_grad():
        a, b, trained = (m.eval()(x) for m in (*averages, fused))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert (trained - b).abs().max() > 1e-3


def test_gradient_accumulation():
    plain, fused = pair()
    for model in (plain, fused):
        torch.manual_seed(1)
        for batch in batches(3):
            (loss_of(model, batch) / 3).backward()
    assert_close(gradients(fused), gradients(plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    plain, fused = pair()
    plain.checkpointing = fused.checkpointing = reentrant
    (batch,) = batches(1)
    for model in (plain, fused):
        loss_of(model, batch).backward()
    assert_close(gradients(fused), gradients(plain))
    # The second forward updates the running statistics once more, as in plain PyTorch.
    assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()))
    assert fused.blocks[1].attn.oper_q[0].block[1].num_batches_tracked == 2


def test_optimizer_groups_by_name_and_ndim():
    plain, fused = pair()

    def groups(model):
        named = dict(model.named_parameters())
        small = [n for n, p in named.items() if p.ndim <= 1 or n.endswith(".bias")]
        return small, [n for n in named if n not in small]

    assert groups(fused) == groups(plain)

    def optimizer(model):
        small, large = groups(model)
        return torch.optim.SGD(
            [
                {"params": [model.get_parameter(n) for n in small], "lr": 0.02},
                {"params": [model.get_parameter(n) for n in large], "weight_decay": 0.1},
            ],
            lr=0.05,
        )

    assert_same_training(plain, fused, batches(), optimizer)


def test_norms_frozen_by_train():
    plain, fused = pair(NetWithFrozenNorms)
    before = copy.deepcopy(dict(fused.named_buffers()))
    assert_same_training(plain, fused, batches())
    assert_close(gradients(fused), gradients(plain), 1e-3)
    assert all(g is not None for g in gradients(fused).values())
    for name, buffer in fused.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_sizes_that_change_from_batch_to_batch():
    plain, fused = pair()
    assert_same_training(plain, fused, batches(6, (160, 384, 224, 192, 320, 288), 3))


@pytest.mark.parametrize("direction", ["fused to plain", "plain to fused"])
def test_checkpoint_between_fused_and_plain(direction):
    plain, fused = pair()
    source, target = (fused, plain) if direction == "fused to plain" else (plain, fused)
    data = batches(6)
    optimizer = torch.optim.AdamW(source.parameters(), 1e-2)
    train(source, data[:3], optimizer)
    file = io.BytesIO()
    torch.save({"model": source.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(source, data[3:], optimizer)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    target.load_state_dict(state["model"], strict=True)
    optimizer = torch.optim.AdamW(target.parameters(), 1e-2)
    optimizer.load_state_dict(state["optimizer"])
    assert train(target, data[3:], optimizer) == pytest.approx(expected, rel=1e-5)


def test_clip_grad_norm():
    plain, fused = pair()
    (batch,) = batches(1)
    found = []
    for model in (plain, fused):
        loss_of(model, batch).backward()
        found.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01).item())
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0] > 0.02
    assert_close(gradients(fused), gradients(plain))


@pytest.mark.parametrize("seed", range(8))
def test_any_subset_of_parameters_frozen(seed):
    plain, fused = pair()
    names = [n for n, _ in plain.named_parameters() if n != "head.weight"]
    frozen = random.Random(seed).sample(names, len(names) * seed // 8)
    (batch,) = batches(1)
    for model in (plain, fused):
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        loss_of(model, batch).backward()
    assert_close(gradients(fused), gradients(plain))


def test_fused_adamw():
    assert_same_training(
        *pair(), batches(), lambda m: torch.optim.AdamW(m.parameters(), 1e-2, fused=True)
    )


@pytest.mark.parametrize(("compiler", "sizes"), [("aot_eager", (48, 64, 80)), ("inductor", (48,))])
def test_compiled_model(compiler, sizes):
    plain, fused = pair()
    data = batches(4, sizes)
    losses = train(plain, data)
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)
    assert train(compiled, data, sgd(fused)) == pytest.approx(losses, rel=1e-5)
    assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()), 1e-3)


def test_channels_last_models():
    plain, fused = pair()
    fused.to(memory_format=torch.channels_last)
    data = batches()
    losses = train(plain, data)
    seen = []
    fused.blocks[1].attn.register_forward_hook(lambda _, __, out: seen.append(out))
    data = [(x.to(memory_format=torch.channels_last), y) for x, y in data]
    assert train(fused, data) == pytest.approx(losses, rel=1e-5)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)


@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_synchronised_before_or_after_the_swap(when):
    plain, fused = pair()
    if when == "before":
        unfuse(fused)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    if when == "before":
        report = fuse(fused, BACKEND)
        assert len(report.swapped) == 2
        assert not report.refused
    assert isinstance(fused.blocks[0].attn.oper_q[0].block[1], nn.SyncBatchNorm)
    assert_same_training(plain, fused, batches())


# DistributedDataParallel over two processes


def _process(rank, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = {}
        for how in ("fused before", "fused after", "synchronised"):
            torch.manual_seed(0)
            plain, fused = pair()
            model = plain if how == "fused after" else fused
            if how == "synchronised":
                model = _mixers_only(model)
            parallel = DistributedDataParallel(model, find_unused_parameters=False)
            if how == "fused after":
                fuse(model, BACKEND)
            if how == "synchronised":  # before, DistributedDataParallel refuses it on the CPU
                nn.SyncBatchNorm.convert_sync_batchnorm(model)
            x, y = _batch()
            for _ in range(2):  # the second time its buckets are in the order of use
                parallel.zero_grad()
                part = slice(2 * rank, 2 * rank + 2)
                loss_of(parallel, (x[part], y[part])).backward()
            found[how] = gradients(model)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def _batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 3, 48, 48, generator=generator), torch.arange(4)


def _mixers_only(model):
    """PyTorch's own SyncBatchNorm refuses CPU tensors: leave out the norms between the mixers."""
    for block in model.blocks:
        block.norm = nn.Identity()
    return model


@pytest.mark.long
def test_ddp(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    x, y = _batch()

    torch.manual_seed(0)
    plain, _ = pair()
    for part in (slice(0, 2), slice(2, 4)):  # each half with its own batch statistics
        (loss_of(plain, (x[part], y[part])) / 2).backward()
    for how in ("fused before", "fused after"):
        assert_close(first[how], gradients(plain))

    torch.manual_seed(0)
    whole = _mixers_only(pair()[0])
    loss_of(whole, (x, y)).backward()
    assert_close(first["synchronised"], gradients(whole))
    for how, found in first.items():
        assert all(torch.equal(g, second[how][name]) for name, g in found.items())
