"""Whole networks, each candidate in a process of its own: what is timed, refused, absent, counted."""

import contextlib
import importlib.util
import io
import json
import os
import threading
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from casvit_kernels import UnfusedWarning, benchmark, fuse_network
from casvit_kernels.benchmark import network_speed, peak, processes, worker
from casvit_kernels.benchmark.network import candidate, names_for
from casvit_kernels.models import CONFIGS, Config, RCViT, rcvit_xs

FAST = ("eager", "eager channels_last", "fused")


def tiny():
    torch.manual_seed(0)
    model = RCViT(Config((1, 1, 1, 1), (8, 8, 8, 8)), num_classes=5)
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))  # statistics of a batch
    return model.eval()


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def x():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


QUICK = {"rounds": 2, "starts": 2, "min_round_seconds": 0.0, "pause_seconds": 0.0}


class Untrusty(nn.Module):
    """Ends the process of a worker in the call with the number `dies`."""

    def __init__(self, dies):
        super().__init__()
        self.inner, self.dies, self.parent, self.calls = nn.Linear(2, 2), dies, os.getpid(), 0

    def forward(self, x):
        self.calls += 1
        if os.getpid() != self.parent and self.calls == self.dies:
            os.write(2, b"about to end\n")
            os._exit(3)
        return x.mean((2, 3))


@pytest.mark.long
def test_candidates_of_a_race_compute_the_model_and_are_timed(model, x):
    found = processes.race(model, x, FAST, batch=2, **QUICK)
    assert list(found.timings) == list(FAST)
    with torch.no_grad():
        expected = model(x)
    for name in FAST:
        torch.testing.assert_close(found.outputs[name], expected)
        timing = found.timings[name]
        assert timing.rounds == 2
        assert 0 < timing.p25 <= timing.median <= timing.p75
    assert found.failed == {}
    assert found.refused is None


@pytest.mark.long
@pytest.mark.parametrize(
    ("dies", "timed"), [(2, False), (6, False), (10**9, True)], ids=["built", "timed", "never"]
)
def test_a_process_that_ends_costs_itself_alone(x, monkeypatch, dies, timed):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    model = Untrusty(dies).eval()
    found = processes.race(model, x, ["eager"], batch=2, **{**QUICK, "rounds": 4})
    assert (found.failed == {}) == timed
    assert ("eager" in found.timings) == timed
    if not timed:
        assert found.failed == {"eager": "its process ended with status 3: about to end"}


@pytest.mark.long
def test_what_cannot_be_built_is_absent_with_its_reason(model, x):
    found = processes.race(model, x, ["openvino"], batch=4, **QUICK)
    if importlib.util.find_spec("openvino"):
        assert found.timings.absent == {"openvino": "openvino reads an ONNX file, there is none"}
    else:
        assert "casvit-kernels[bench]" in found.timings.absent["openvino"]
    assert found.timings == {}


@pytest.mark.usefixtures("log")
def test_the_gate_sees_ours_before_a_rival_is_built(model, x):
    seen, said = [], []

    def gate(outputs):
        seen.append(sorted(outputs))
        return "not exact"

    names = ["onnxruntime", "fused", "eager"]
    found = processes.race(model, x, names, batch=4, gate=gate, progress=said.append, **QUICK)
    assert found.refused == "not exact"
    assert found.timings == {}
    assert seen == [["eager", "fused"]]
    assert said == ["building fused", "building eager"]


class FakeWorkers(dict):
    """Writes down what a race asks for, and in which life of the processes."""

    log: ClassVar[list] = []

    def __init__(self, folder, threads, backend):
        self.threads = threads

    def __enter__(self):
        self.log.append("start")
        return self

    def __exit__(self, *error):
        self.log.append("end")

    def begin(self, name):
        self[name] = None
        self.log.append(f"build {name}")
        return {"facts": {}}

    def ask(self, name, line):
        self.log.append(name)
        return {"seconds": float(len(self.log)), "calls": 3}

    def output(self, name):
        return torch.zeros(1)


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(processes, "_Workers", FakeWorkers)
    monkeypatch.setattr(FakeWorkers, "log", [])
    return FakeWorkers.log


def test_rounds_rotate_and_are_shared_out_among_the_starts(model, x, log):
    """Nobody works beside the one whose turn it is, and what comes between comes after a round."""
    found = processes.race(
        model,
        x,
        ["onnxruntime", "eager", "fused"],
        batch=4,
        rounds=3,
        starts=2,
        pause_seconds=0.0,
        between=lambda: log.append("|"),
    )
    built = ["start", "build eager", "build fused", "build onnxruntime"]
    first = ["eager", "fused", "onnxruntime", "|", "onnxruntime", "eager", "fused", "|", "end"]
    second = ["fused", "onnxruntime", "eager", "|", "end"]
    assert log == [*built, *first, *built, *second]
    turns = {name: [i + 1.0 for i, e in enumerate(log) if e == name] for name in found.timings}
    assert {name: list(t.samples) for name, t in found.timings.items()} == turns


def test_processes_end_with_the_race_whatever_happens(model, x, monkeypatch):
    started = []
    popen = processes.subprocess.Popen

    def kept(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(processes.subprocess, "Popen", kept)

    def interrupt(what):
        if what.startswith("round"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes.race(model, x, ["eager"], batch=4, progress=interrupt, **QUICK)
    assert [process.returncode is None for process in started] == [False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"starts": 0}, "starts: expected at least 1, got 0"),
        ({"batch": 3}, r"x: expected \(N, 3, H, W\) with N a multiple of 3, got \(4, 3, 64, 64\)"),
    ],
)
def test_wrong_arguments_of_a_race_are_named(model, x, options, said):
    with pytest.raises(ValueError, match=said):
        processes.race(model, x, ["eager"], **{"batch": 1, **options})


def test_every_rival_of_a_precision_has_a_name():
    assert "onnxruntime bf16" not in names_for("bf16")
    assert {"openvino bf16", "compile frozen bf16", "fused network bf16"} <= set(names_for("bf16"))
    assert {"openvino", "onnxruntime", "compile frozen", "fused network"} <= set(names_for("fp32"))
    assert all(name.startswith(("eager", "fused")) for name in names_for("bf16", quick=True))


@pytest.fixture
def onnx(model, x, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from casvit_kernels.export import to_onnx

    to_onnx(model, tmp_path / "tiny.onnx", example_input=x, verify=False)
    return tmp_path / "tiny.onnx"


def outputs_of(made, x):
    with torch.inference_mode():
        return torch.as_tensor(made.run(made.prepare(x)))


def test_readers_of_files_compute_the_model(model, x, onnx):
    """And OpenVINO says which precision it computed in."""
    pytest.importorskip("openvino")
    with torch.no_grad():
        expected = model(x)
    for name in ("onnxruntime", "openvino"):
        made = candidate(name, model, x, onnx)
        torch.testing.assert_close(outputs_of(made, x), expected, atol=1e-4, rtol=1e-3)
        assert made.facts["version"]
        if name == "openvino":
            assert made.facts["precision"] == "f32"
    try:
        made = candidate("openvino bf16", model, x, onnx)
    except benchmark.Unavailable as reason:
        said = str(reason)
        made = None
    if made is None:
        assert said == "as it comes OpenVINO computes in f32 on this CPU"
    else:
        assert made.facts["precision"] == "bf16"
        torch.testing.assert_close(outputs_of(made, x), expected, atol=0.1, rtol=0.1)


def test_a_package_that_is_missing_is_named_with_the_extra(model, x, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name)
    )
    with pytest.raises(benchmark.Unavailable, match=r"openvino \(pip install '.*\[bench\]'\)"):
        candidate("openvino", model, x, Path("model.onnx"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_in_one_call_computes_the_model(model, x, precision):
    if precision not in benchmark.precisions():
        pytest.skip(f"there are no kernels for whole networks in {precision} here")
    made = candidate("fused network" + (" bf16" if precision == "bf16" else ""), tiny(), x)
    off = 0.1 if precision == "bf16" else 1e-4
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(made, x), model(x), atol=off, rtol=off)


def test_a_network_that_runs_unfused_is_not_timed_as_fused(model, x, tmp_path, monkeypatch):
    """The worker takes the warning for an error."""
    torch.save(model, tmp_path / processes.MODEL)
    torch.save({"x": x, "batch": 4}, tmp_path / processes.IMAGES)
    answers = io.StringIO()
    monkeypatch.setattr(worker, "_private_stdout", lambda: contextlib.nullcontext(answers))

    def candidate(*_):
        warnings.warn("a fused network runs its model", UnfusedWarning, stacklevel=1)

    monkeypatch.setattr(worker, "candidate", candidate)
    with warnings.catch_warnings():
        worker.main([str(tmp_path), "fused network", "1"])
    assert json.loads(answers.getvalue()) == {
        "failed": "UnfusedWarning: a fused network runs its model"
    }


@pytest.mark.long
@pytest.mark.parametrize("name", ["compile frozen", "compile channels_last", "compile frozen bf16"])
def test_compiled_candidates_compute_the_model(model, x, name):
    made = candidate(name, tiny(), x)
    off = 0.1 if name.endswith("bf16") else 1e-4
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(made, x).float(), model(x), atol=off, rtol=off)


def test_frozen_weights_are_constants_of_the_compiled_code(x, monkeypatch):
    seen = []

    def compile(module, **options):
        return lambda images: seen.append(torch._inductor.config.freezing)

    monkeypatch.setattr(torch, "compile", compile)
    for name in ("compile frozen", "compile"):
        candidate(name, tiny(), x)
    assert seen == [True, False]


def test_names_that_are_not_known_are_refused(model, x):
    for name in ("fastest", "onnxruntime bf16"):
        with pytest.raises(ValueError, match=f"name: expected one of .*, got '{name}'"):
            candidate(name, model, x)


def by_hand(layers, dims, classes, size):
    """Multiply-adds of RCViT, layer by layer, with its two heads."""
    total, side = 0, size // 2
    total += side**2 * 9 * 3 * dims[0] // 2
    side //= 2
    total += side**2 * 9 * dims[0] // 2 * dims[0]
    for stage, (depth, c) in enumerate(zip(layers, dims, strict=True)):
        if stage:
            side = (side + 1) // 2
            total += side**2 * 9 * dims[stage - 1] * c
        pixels = side**2
        local = 2 * c * c + 9 * c
        # qkv; of q and of k a depthwise convolution, a map of one channel; dwc and proj.
        mixer = 3 * c * c + 2 * (9 * c + c) + 2 * 9 * c
        mlp = 2 * 4 * c * c
        total += depth * (pixels * (local + mixer + mlp) + 2 * c * c)
    return total + 2 * dims[3] * classes


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("made", ["plain", "fused mixers", "one call", "one call of fused mixers"])
def test_multiply_adds_are_those_counted_by_hand(made):
    model = rcvit_xs(fused="mixers" in made).eval()
    if "call" in made:
        model = fuse_network(model)
    before = [p.data_ptr() for p in model.parameters()]
    expected = by_hand(*CONFIGS["rcvit_xs"], 1000, 224)
    assert benchmark.macs(model, (1, 3, 224, 224)) == expected
    assert benchmark.macs(model, (4, 3, 224, 224)) == 4 * expected
    assert [p.data_ptr() for p in model.parameters()] == before
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_without_multiply_adds_is_refused():
    with pytest.raises(ValueError, match="model: expected convolutions or linear layers"):
        benchmark.macs(nn.ReLU(), (1, 3, 8, 8))


class Clock:
    def __init__(self):
        self.now = threading.local()

    def perf_counter(self):
        return getattr(self.now, "value", 0.0)

    def pass_by(self, seconds):
        self.now.value = self.perf_counter() + seconds


def test_the_peak_is_that_of_the_best_window_and_of_all_threads(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(peak.time, "perf_counter", clock.perf_counter)
    together, most, lock = [0], [0], threading.Lock()
    inside = threading.Barrier(2, timeout=60)
    rates = iter([4e9, 4e9, 5e9, 5e9, 3e9, 3e9])

    def loop(precision, repetitions):
        assert precision == 1
        work = 1000 * repetitions
        if threading.current_thread() is threading.main_thread():
            clock.pass_by(work / 4e9)
            return work
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
            rate = next(rates)
        inside.wait()  # only where both are in it at once
        with lock:
            together[0] -= 1
        clock.pass_by(work / rate)
        return work

    found = benchmark.fma_peak("bf16", threads=2, windows=3, loop=loop)
    assert found == pytest.approx(1e10)
    assert most[0] == 2


def test_the_peak_of_a_precision_that_is_not_there_is_none():
    assert benchmark.fma_peak("bf16", loop=lambda precision, repetitions: 0) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int8"}, "precision: expected one of fp32, bf16, got 'int8'"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"windows": 0}, "windows: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_of_the_peak_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        benchmark.fma_peak(**options, loop=lambda precision, repetitions: 1)


def speed(**medians):
    """Of 2 images at once, with a peak of 1 GMAC/s and 1 MMAC an image."""
    race = processes.Race()
    for name, seconds in medians.items():
        sample = benchmark.Timing(seconds, seconds, seconds, 1, 1, (seconds,))
        race.timings[name.replace("_", " ")] = sample
    return benchmark.NetworkSpeed(2, "fp32", 8, 10**6, race, {}, [0.9e9, 1e9])


def test_ratios_are_to_the_best_rival_and_shares_of_the_best_peak():
    found = speed(eager=0.008, openvino=0.006, fused=0.005, fused_network=0.004)
    assert found.ratio("fused network") == pytest.approx(1.5)
    assert found.ratio("eager") == pytest.approx(0.75)
    assert found.share("fused network") == pytest.approx(0.5)
    found.peaks.clear()
    assert found.share("fused network") is None
    assert speed(fused_network=0.004).ratio("fused network") is None


@pytest.mark.parametrize(
    ("wrong", "passes"),
    [
        (lambda y: y * (1 + 1e-6), True),
        (lambda y: y * 1.001, False),
        (lambda y: y * float("nan"), False),
        (lambda y: y[:1], False),
    ],
    ids=["rounding", "scaled", "nan", "shape"],
)
def test_ours_must_be_as_exact_as_eager(wrong, passes):
    truth = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    eager = (truth * (1 + 1e-6)).float()
    outputs = {"eager": eager, "openvino": eager * 2, "fused network": wrong(eager)}
    reason = network_speed.refusal(outputs, truth, "fp32")
    assert (reason is None) == passes
    if not passes:
        assert "parity failed, nothing was timed: fused network: max error" in reason
    assert "eager is missing" in network_speed.refusal({}, truth, "fp32")


def test_top_classes_are_compared_with_float64():
    truth = torch.eye(4, dtype=torch.float64)
    found = network_speed.exactness_of(truth[[0, 1, 2, 0]].float(), truth)
    assert found == (1.0, 3)


@pytest.mark.long
def test_a_network_is_measured(model, x):
    found = benchmark.time_network(model, x, batch=2, names=FAST, **QUICK)
    assert found.race.refused is None
    assert found.images == 4
    assert found.macs == benchmark.macs(model, (1, 3, 64, 64))
    for name in FAST:
        assert found.exactness[name].max_error < 1e-5
        assert found.exactness[name].same_top1 == 4
    with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, got 'fp16'"):
        benchmark.time_network(model, x, batch=2, precision="fp16")
