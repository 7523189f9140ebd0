"""Device time, call time and graphs, on a GPU that is made of a clock and a queue."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from casvit_kernels import benchmark
from casvit_kernels.benchmark import gpu

CPU = torch.device("cpu")


class Device:
    """A GPU that runs what is queued one after the other, while the CPU goes on."""

    def __init__(self, patch, launch, kernel):
        self.now = self.free = 0.0  # of the CPU; when the GPU has nothing left to do
        self.launch, self.kernel = launch, kernel
        patch.setattr(gpu.time, "perf_counter", lambda: self.now)
        patch.setattr(torch.cuda, "synchronize", self.synchronize)
        patch.setattr(torch.cuda, "_sleep", lambda cycles: self.run(cycles / gpu.CYCLES_PER_SECOND))
        patch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def synchronize(self, device=None):
        self.now = max(self.now, self.free)

    def run(self, seconds):
        self.free = max(self.free, self.now) + seconds

    def call(self):
        self.now += self.launch
        self.run(self.kernel)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.free, self.device.now)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_device_time_has_no_launches_in_it(cold, count, monkeypatch):
    """A call that takes the CPU five times what it takes the GPU."""
    device = Device(monkeypatch, launch=100e-6, kernel=20e-6)
    watch = benchmark.CudaStopwatch(CPU, False)
    if cold:
        watch._flush = type("Flush", (), {"zero_": lambda self: device.run(30e-6)})()
    assert watch(device.call, count) == pytest.approx(count * 20e-6, rel=1e-6)


def test_what_the_gpu_takes_longer_for_is_measured_too(monkeypatch):
    device = Device(monkeypatch, launch=10e-6, kernel=5e-3)
    assert benchmark.CudaStopwatch(CPU, False)(device.call, 20) == pytest.approx(0.1)


def test_call_time_is_the_cpus_alone(monkeypatch):
    device = Device(monkeypatch, launch=100e-6, kernel=20e-3)
    found = benchmark.call_time(device.call, torch.device("cuda"), clock=lambda: device.now)
    assert found == pytest.approx(100e-6)


def test_call_time_ends_early_where_calls_are_slow(monkeypatch):
    device = Device(monkeypatch, launch=0.3, kernel=0.0)
    benchmark.call_time(device.call, CPU, clock=lambda: device.now)
    assert device.now == pytest.approx(0.6)
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        benchmark.call_time(device.call, CPU, rounds=0)


def test_a_graph_without_a_gpu_is_absent_with_its_reason():
    with pytest.raises(benchmark.Unavailable, match="needs a CUDA device, this is cpu"):
        benchmark.graphed(lambda: None, CPU)


@pytest.fixture
def recorder(monkeypatch):
    """Stands for what of torch.cuda records graphs; a list of what was done."""
    done = []
    stream = SimpleNamespace(wait_stream=lambda other: done.append("wait"))

    @contextlib.contextmanager
    def record(graph):
        done.append("begin")
        yield
        done.append("end")

    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return done


def test_a_graph_is_recorded_once_on_a_warm_call_and_then_replayed(recorder):
    def call():
        recorder.append("call")
        return "out"

    replay = benchmark.graphed(call, torch.device("cuda"))
    warm = ["call"] * gpu.RECORDED_AFTER
    assert recorder == ["wait", *warm, "wait", "begin", "call", "end"]
    recorder.clear()
    assert [replay(), replay()] == ["out", "out"]
    assert recorder == ["replay", "replay"]


def test_what_cannot_be_recorded_is_absent_with_the_reason(recorder):
    def call():
        if "begin" in recorder:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(
        benchmark.Unavailable, match=r"recorded: RuntimeError: operation not .*ing$"
    ):
        benchmark.graphed(call, torch.device("cuda"))
