"""Training steps and inference as CUDA graphs: the example, and what a capture asks of the library.

No GPU captures here: tests/tape.py stands for one, tests/test_gpu.py has a real one.
"""

import contextlib
import copy
import json
import re
import sys
import threading
from pathlib import Path

import pytest
import tape
import torch
import torch.nn.functional as F
from conftest import require_backend
from cuda_emulation import backend as emulated
from cuda_emulation import build
from mixers import filled
from torch import nn

import casvit_kernels
from casvit_kernels import FusedCATM, testing, use_backend
from casvit_kernels.models import Config, RCViT
from casvit_kernels.ops.mixer import kernels, packed

EXAMPLES = Path(casvit_kernels.__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not installed with the package", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import captured_step  # noqa: E402

CPU = torch.device("cpu")
TINY = [
    *("--device", "cpu", "--input-size", "32", "--dims", "8,8,8,8"),
    *("--batch-size", "4", "--lr", "0.01", "--steps", "7"),
]
CUDA = emulated.NAME


@pytest.fixture
def graphs(monkeypatch):
    """What the example and the library take for a GPU's graphs."""
    monkeypatch.setattr(captured_step, "capture", tape.capture)
    monkeypatch.setattr(captured_step, "side_stream", contextlib.nullcontext)
    with tape.set_up(monkeypatch):
        yield


@pytest.fixture(params=["cpu", CUDA])
def backend(request):
    if request.param == "cpu":
        require_backend("cpu")
        yield "cpu"
        return
    if build.why_not() is not None:
        pytest.skip(build.why_not())
    emulated.register(tape.Taped(emulated.Emulated()))
    yield CUDA
    sys.modules["casvit_kernels.backends.registry"]._REGISTRY.pop(CUDA)
    kernels._TABLE.pop(CUDA)
    testing.BACKENDS.pop(CUDA)


def learn(way, *arguments, graphs=False):
    return captured_step.learn(captured_step.parse([*TINY, *arguments]), CPU, way, graphs)


# The example


def plain_losses(options):
    """Of the loop that everybody writes."""
    torch.manual_seed(options.seed)
    model = RCViT(
        Config(options.layers, options.dims), options.classes, distillation=False, fused=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), options.lr)
    scaler = torch.amp.GradScaler("cpu", enabled=options.amp == "fp16")
    dtype = captured_step.DTYPES.get(options.amp, torch.bfloat16)
    losses = []
    for i, (images, labels) in enumerate(captured_step.batches(options, options.steps, 1)):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (1 - i / options.steps)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=options.amp != "none"):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("amp", "most"), [("none", 1e-5), ("bf16", 5e-3), ("fp16", 5e-3)])
def test_its_step_trains_as_a_plain_loop_does(amp, most):
    found = learn("plain", "--amp", amp)["losses"]
    assert found == pytest.approx(
        plain_losses(captured_step.parse([*TINY, "--amp", amp])), rel=most
    )
    assert max(found) - min(found) > 0.02


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_replayed_it_is_the_same_training(amp, backend, graphs, monkeypatch):
    """To the last bit; and nothing in the step or in inference asks for a value."""
    if backend == CUDA and amp == "none":
        pytest.skip("it computes bfloat16 and float16")
    calls, step = [], captured_step.Training.step
    monkeypatch.setattr(captured_step.Training, "step", lambda self: calls.append(step(self)))
    with use_backend(backend):
        called = learn("graph", "--amp", amp)
        replayed = learn("graph", "--amp", amp, graphs=True)
    assert replayed["losses"] == called["losses"]
    assert replayed["top1"] == called["top1"]
    assert len(calls) == 7 + captured_step.WARM_UP + 1
    assert "not captured" in called["how"]
    assert replayed["how"] == captured_step.WAYS["graph"]


def test_without_a_gpu_it_says_that_nothing_is_captured(capsys):
    arguments = [*TINY, "--way", "plain", "--way", "graph"]
    assert captured_step.main(arguments) == 0
    said = capsys.readouterr().out
    assert "graph: no GPU: the step is run as it is, not captured" in said
    assert captured_step.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    plain, graph = document["ways"]
    assert graph["how"] == "no GPU: the step is run as it is, not captured"
    assert graph["losses"] == plain["losses"]
    assert len(plain["losses"]) == 7
    assert document["options"]["device"] == "cpu"


@pytest.mark.long
def test_compiled_it_is_the_same_training():
    called = learn("plain", "--amp", "none")
    compiled = learn("compile", "--amp", "none")
    assert compiled["losses"] == pytest.approx(called["losses"], rel=1e-4)
    assert "no GPU: compiled, not captured" in compiled["how"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "4"], r"--steps: expected an integer >= 5, got '4'"),
        (["--lr", "-1"], r"--lr: expected a number >= 0, got '-1'"),
        (["--dims", "8,8"], r"--dims: expected four integers N,N,N,N, got '8,8'"),
        (["--dims", "1,8,8,8"], r"config\.dims\[0\]: expected an integer >= 2, got 1"),
        (["--batch-size", "1"], r"--batch-size: expected an integer >= 2, got '1'"),
        (["--way", "fast"], r"--way: invalid choice: 'fast'"),
        (["--lr", "1e30"], r"plain, step \d: expected a finite loss, got nan; .* --lr"),
        (["--device", "cuda"], r"--device: expected one that is there, got cuda"),
    ],
)
def test_what_does_not_fit_is_said(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        status = captured_step.main([*TINY, "--way", "plain", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err)


# What a capture asks of the library


def mixer_of(backend, dim=8):
    return filled(FusedCATM(dim, backend=backend)).eval()


def half():
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


@pytest.mark.parametrize("parameter", ["qkv.weight", "oper_q.0.block.1.running_mean", "proj.bias"])
def test_weights_written_between_replays_are_seen(parameter, backend, graphs):
    mixer, x, out = mixer_of(backend), torch.randn(2, 8, 6, 5), torch.zeros(2, 8, 6, 5)

    @torch.no_grad()
    def infer():
        with half():
            out.copy_(mixer(x))

    infer()  # packed, and kept
    replay = tape.capture(infer)
    for _ in range(2):
        with torch.no_grad():
            mixer.state_dict()[parameter].add_(0.5)
        before = out.clone()
        replay()
        assert not torch.equal(out, before)
        with torch.no_grad(), half():
            assert torch.equal(out, copy.deepcopy(mixer)(x).float())


@pytest.mark.parametrize("frozen", [False, True])
def test_replayed_training_is_seen_by_inference_that_is_not_captured(frozen, backend, graphs):
    """No version counter tells of it, in the mixer as in an average that the graph keeps."""
    mixer = mixer_of(backend)
    average = copy.deepcopy(mixer)
    optimizer = torch.optim.SGD(mixer.parameters(), 0.05)
    x = torch.randn(2, 8, 6, 5)

    def step():
        with half():
            mixer(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for a, b in zip(average.parameters(), mixer.parameters(), strict=True):
                a.lerp_(b, 0.5)

    def infer(m):
        with torch.no_grad(), half():
            return m(x)

    mixer.train(not frozen)
    step()
    replay = tape.capture(step)
    mixer.eval()  # once: replays do not need train()
    for m in (mixer, average):
        infer(m)
    for _ in range(2):
        before = infer(mixer), infer(average)
        replay()
        for m, old in zip((mixer, average), before, strict=True):
            assert not torch.equal(infer(m), old)
            assert torch.equal(infer(m), infer(copy.deepcopy(m)))


@pytest.mark.parametrize(
    "asks",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.sum() > 0),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
        lambda t: t.numpy(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.masked_select(t > 0),
        lambda t: torch.equal(t, t),
        lambda t: t + torch.tensor([1.0, 2.0]),
    ],
)
def test_the_tape_refuses_what_a_capture_does(asks):
    with pytest.raises(tape.NotCapturable):
        tape.capture(lambda: asks(torch.ones(2)))
    leaf = nn.Parameter(torch.ones(2))

    def hook(grad):
        asks(grad)

    leaf.register_hook(hook)
    with pytest.raises(tape.NotCapturable):  # in a backward, too
        tape.capture(lambda: (leaf * 2).sum().backward())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_capture_is_noted_when_a_compiled_step_runs_too(compiled, monkeypatch):
    """Of what was compiled before the capture only the operators run in it."""
    require_backend("cpu")
    m = FusedCATM(8, backend="cpu").train()
    run = torch.compile(m, backend="aot_eager", fullgraph=True) if compiled else m
    x = torch.randn(2, 8, 4, 4)
    noted = threading.Event()
    monkeypatch.setattr(packed, "_unseen_writes", noted)
    run(x).sum().backward()
    assert not noted.is_set()
    monkeypatch.setattr(packed, "capturing", lambda t: True)
    run(x)
    assert noted.is_set()
