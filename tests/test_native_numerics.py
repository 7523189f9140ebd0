"""Where the native kernels' float arithmetic could leave PyTorch's: the edges of its range."""

import os
import signal

import pytest
import torch
from conftest import using_instruction_set

from casvit_kernels import AdditiveTokenMixer, FusedCATM
from casvit_kernels.backends import native

OPS = torch.ops.casvit_kernels


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def instruction_set(request):
    """Each one in turn that this CPU has."""
    with using_instruction_set(request.param):
        yield request.param


def closed_by(gate, v):
    """A mixer of one channel whose q is 1e36 times x, whose k is 0, and where one of q's gates shuts."""
    mixer = AdditiveTokenMixer(1).eval()
    with torch.no_grad():
        for p in mixer.parameters():
            p.fill_(0.0)
        mixer.qkv.weight.copy_(torch.tensor([1e6, 0.0, v]).view(3, 1, 1, 1))
        mixer.oper_q[0].block[0].weight[0, 0, 1, 1] = 1.0
        mixer.oper_q[0].block[1].weight.fill_(1.0)
        if gate == "spatial":
            mixer.oper_q[0].block[3].weight.fill_(-1.0)
        else:
            mixer.oper_q[1].block[1].weight.fill_(-1.0)
        mixer.dwc.weight[0, 0, 1, 1] = 1.0
        mixer.dwc.bias.fill_(1e-3)
        mixer.proj.weight[0, 0, 1, 1] = 1.0
    return mixer


@pytest.mark.parametrize("gate", ["spatial", "channel"])
def test_a_closed_gate_is_zero(gate, instruction_set):
    """It must let nothing of 1e36 through: exp(-88) times that is 1e-2."""
    plain = closed_by(gate, 1e-28)
    fused = FusedCATM(1).eval()
    fused.load_state_dict(plain.state_dict())
    x = torch.full((1, 1, 3, 3), 1e30)
    expected = plain(x)
    torch.testing.assert_close(fused(x), expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gate", ["spatial", "channel"])
def test_gradients_past_a_closed_gate(gate, instruction_set):
    """In eval mode, where the statistics do not depend on x; v is 1, so that nothing overflows."""
    plain = closed_by(gate, 1e-30)
    fused = FusedCATM(1).eval()
    fused.load_state_dict(plain.state_dict())
    found = []
    for mixer in (plain, fused):
        x = torch.full((1, 1, 3, 3), 1e30, requires_grad=True)
        mixer(x).sum().backward()
        found.append([x.grad, *(p.grad for p in mixer.parameters())])
    for f, e in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=0)


def spatial_gates(logits):
    """The spatial gates of q that the kernels compute for these logits, all of them at most 0."""
    C, W = 1, logits.numel()
    x = -logits.view(1, C, 1, W)
    one, zero = torch.ones(C), torch.zeros(C)
    centre = torch.zeros(C, 1, 3, 3)
    centre[:, :, 1, 1] = 1.0
    gate = (centre, zero, None, None, None, None, -torch.ones(1, C, 1, 1), torch.zeros(C, C, 1, 1))
    w = (torch.ones(3 * C, C, 1, 1), None, *gate, *gate, centre, zero, centre, zero)
    arguments = (*w, 0.0, 0.0)
    library, _ = native.load()
    planes = torch.zeros(library.casvit_cpu_qkv_floats(1, C, 1, W))
    OPS.cpu_project(x, w[0], None, torch.float32, planes)
    statistics = torch.stack((zero, one)).expand(2, 2, C).contiguous()
    return OPS.cpu_mix(x, planes, *arguments, statistics, torch.float32)[1][0, 0, 0]


def test_gates_down_to_the_last_subnormal_number(instruction_set):
    logits = torch.cat((-torch.linspace(0, 110, 4001), torch.tensor([-1e5, -1e10, -1e38])))
    found, expected = spatial_gates(logits), torch.sigmoid(logits)
    overflows = -logits.double() > 88.7228394 - 1e-5  # exp(-logit) does, or may by its last bit
    assert torch.equal(found[-3:], torch.zeros(3))
    assert (found[overflows & (logits < -88.7229)] == 0.0).all()
    torch.testing.assert_close(found[~overflows], expected[~overflows], rtol=4e-7, atol=3e-45)
    assert torch.equal(found[logits > -1e-3], expected[logits > -1e-3])


def step(mixer, x, grad):
    """The gradients of x and of everything that a step trains."""
    mixer.zero_grad()
    x = x.detach().requires_grad_()
    mixer(x).backward(grad)
    return [x.grad, *(p.grad for p in mixer.parameters() if p.grad is not None)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("attn_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_training_step_in_a_forked_child(layout, dtype, attn_bias, frozen, instruction_set):
    """PyTorch's threads do not survive a fork: whoever asks OpenMP for them in the child, hangs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    mixer = FusedCATM(96, attn_bias=attn_bias, backend="cpu").to(dtype).train()
    for module in mixer.modules():
        if frozen and isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    x = torch.randn(4, 96, 20, 20).to(dtype).contiguous(memory_format=layout)
    # Of the same layout as x, of another one, and without any.
    grads = [torch.randn(x.shape).to(dtype), torch.randn(1, 96, 1, 1).to(dtype).expand(x.shape)]
    expected = [t for grad in grads for t in step(mixer, x, grad)]
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        found = [t for grad in grads for t in step(mixer, x, grad)]
        torch.set_num_threads(1)  # the comparison is PyTorch's, and must not hang either
        close = [
            torch.allclose(f.float(), e.float(), rtol=1e-2, atol=1e-3 * e.abs().max().item())
            for f, e in zip(found, expected, strict=True)
        ]
        os._exit(0 if all(close) else 1)
    _, status = os.waitpid(child, 0)
    torch.set_num_threads(threads)
    assert status == 0, "it hung" if status == signal.SIGALRM else f"status {status}"
