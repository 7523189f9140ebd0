"""What only a GPU can show of the GPU backends: streams, devices, graphs, compilers. `make gpu` runs it.

Values are `casvit_kernels parity`'s: here a result is compared with another of the same backend.
"""

import copy
import json
from pathlib import Path

import pytest
import torch

from casvit_kernels import FusedCATM, backends, testing, use_backend
from casvit_kernels.backends import cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPE = torch.bfloat16


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    status = next(s for s in backends() if s.name == request.param)
    if not status.usable:
        pytest.skip(f"{status.name}: {status.reason}")
    return request.param


def mixer_of(backend, device="cuda", dim=48):
    return FusedCATM(dim, backend=backend).to(device)


def step(mixer, x):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    mixer.zero_grad()
    with torch.autocast("cuda", DTYPE):
        out = mixer(x)
        out.float().square().mean().backward()
    return [out.detach(), x.grad, *(p.grad for p in mixer.parameters())]


def images(size=28, batch=8, device="cuda"):
    return torch.randn(batch, 48, size, size, device=device)


def test_the_same_bits_again(backend):
    mixer, x = mixer_of(backend), images()
    first = step(copy.deepcopy(mixer), x)
    for _ in range(3):
        for a, b in zip(first, step(copy.deepcopy(mixer), x), strict=True):
            assert torch.equal(a, b)


def test_the_current_stream(backend):
    """Work queued on a stream before the call is waited for, and work after it waits."""
    mixer, x = mixer_of(backend).eval(), images(56, 32)
    with torch.no_grad():
        expected = mixer(x * 2)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            found = mixer(x * 2) + 0
        stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize(
    "shape", [(33, 48, 56, 56), (9, 56, 28, 28), (7, 112, 14, 14), (5, 220, 7, 7)], ids=str
)
def test_parity_in_one_launch_and_in_two(shape, launches):
    """Both at the sizes of RCViT-xs, whichever the planner takes."""
    status = next(s for s in backends() if s.name == "cuda")
    if not status.usable:
        pytest.skip(status.reason)
    with cuda.launches(launches):
        for mode in ("eval", "train"):
            case = testing.Case("cuda", DTYPE, "channels_last", mode, shape, device="cuda")
            try:
                row = testing.check(case)
            except RuntimeError as error:
                assert launches == 1
                pytest.skip(str(error))
            assert row.passed, row.failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one(backend):
    mixer, x = mixer_of(backend, "cuda:1"), images(device="cuda:1")
    assert torch.cuda.current_device() == 0
    found = step(mixer, x)
    assert all(t.device.index == 1 for t in found)
    with torch.cuda.device(1):
        for a, b in zip(found, step(mixer, x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("training", [False, True])
def test_cuda_graph(backend, training):
    """Captured once, replayed on new input. In training with frozen norms: statistics stay."""
    mixer = mixer_of(backend).eval().requires_grad_(training)
    static, new = images(), images()
    static.requires_grad_(training)

    def run():
        with torch.autocast("cuda", DTYPE, cache_enabled=False), torch.set_grad_enabled(training):
            out = mixer(static)
        if training:
            return [out.detach(), *torch.autograd.grad(out.float().square().mean(), [static])]
        return [out]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        static.copy_(new)
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


def test_a_whole_step_captured(backend, capsys, monkeypatch):
    """The example: with warm-up, optimizer, a gradient scaler and inference."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import captured_step

    with use_backend(backend):
        ways = ["--way", "plain", "--way", "graph"]
        assert captured_step.main([*ways, "--amp", "fp16", "--steps", "20", "--json"]) == 0
    plain, graph = json.loads(capsys.readouterr().out)["ways"]
    assert graph["how"] == captured_step.WAYS["graph"]
    # Libraries around the mixers may choose other algorithms.
    assert graph["losses"] == pytest.approx(plain["losses"], rel=2e-2)


def test_replays_are_seen_by_inference_that_is_not_captured(backend):
    """A replayed step moves no version counter."""
    mixer, x = mixer_of(backend), images()
    optimizer = torch.optim.SGD(mixer.parameters(), 0.05)

    def train():
        with torch.autocast("cuda", DTYPE, cache_enabled=False):
            mixer(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer(m):
        with torch.no_grad(), torch.autocast("cuda", DTYPE):
            return m(x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    mixer.eval()
    infer(mixer)
    graph.replay()
    assert torch.equal(infer(mixer), infer(copy.deepcopy(mixer)))


def test_at_most_four_launches_in_inference(backend):
    mixer, x = mixer_of(backend).to(DTYPE).eval(), images().to(DTYPE)
    with torch.no_grad():
        mixer(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            mixer(x)
            torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type.name == "CUDA"]
    names = [k.name for k in kernels if "Memcpy" not in k.name and "Memset" not in k.name]
    assert 1 <= len(names) <= 4, names


@pytest.mark.parametrize("training", [False, True])
def test_compiled_for_all_sizes(backend, training):
    mixer = mixer_of(backend).train(training)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True)
    for size in (28, 20, 36):
        x = images(size)
        for a, b in zip(step(compiled, x), step(mixer, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_kernels_are_compiled_once_for_all_sizes(backend):
    if backend != "triton":
        pytest.skip("compiled ahead of time")
    from casvit_kernels.ops.mixer.triton import backward, forward

    kernels = [v for m in (forward, backward) for k, v in vars(m).items() if k.endswith("_kernel")]

    def compiled():
        return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())

    mixer = mixer_of(backend)
    step(mixer, images(56, 8))
    before = compiled()
    for size, batch in ((40, 4), (96, 2), (7, 1), (12, 64), (1, 3)):
        step(mixer, images(size, batch))
    assert compiled() == before > 0


def test_a_mixer_on_another_device_than_its_input(backend):
    with pytest.raises(ValueError, match="x: expected the device of the parameters"):
        mixer_of(backend)(images(device="cpu"))
