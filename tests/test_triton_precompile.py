"""`precompile`: what it compiles is what calls ask for; what it says where it cannot."""

import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from casvit_kernels import BackendUnavailable, precompile
from casvit_kernels.backends import triton as backend

ROOT = Path(__file__).parents[1]
# A GPU that is not there: Triton compiles for it and is never asked to launch.
CALLS = """
import contextlib
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from casvit_kernels import FusedCATM, precompile
from casvit_kernels.backends import triton as backend
from casvit_kernels.module import mixer_weights
from casvit_kernels.ops.mixer.autograd import mix_training
from casvit_kernels.ops.mixer.schema import Settings
from casvit_kernels.ops.mixer.triton import TritonKernels, launch, plan

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
backend._device = lambda count: None
torch.cuda.device = contextlib.nullcontext
options = dict(dtypes=[torch.bfloat16], memory_formats=[torch.channels_last], training=True)
done = precompile([5], **options)
assert len(done) == len(launch.KERNELS)
assert [d.hash for d in precompile([5], target="sm_90", **options)] == [d.hash for d in done]

def compiles(*_):
    raise AssertionError("a call compiled a kernel")

JITFunction._do_compile = compiles
mixer, eps = FusedCATM(5).bfloat16(), (1e-5, 1e-5)
x = torch.randn(3, 5, 9, 40).bfloat16().contiguous(memory_format=torch.channels_last)
w = mixer_weights(mixer)
with launch.recorded() as record:
    settings = Settings(*eps, True, True, x.dtype, "triton", "")
    mix_training(x.requires_grad_(), w, settings)[0].sum().backward()
    with torch.no_grad():
        kernels = TritonKernels()
        kernels.project_and_mix(x, w, eps, kernels.pack(w, eps, x.dtype))
asked = {
    launch.KERNELS[it.name].warmup(
        *it.arguments, grid=it.grid, **it.constants, **it.options(plan.warp_size())
    ).hash
    for it in record
}
assert len(record) == 8 + 3
assert asked == {d.hash for d in done}
"""


@pytest.mark.long
def test_calls_find_everything_compiled(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CALLS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def compiler(monkeypatch):
    """Triton as if it could compile, without doing it: the module."""
    pytest.importorskip("triton")
    module = sys.modules[precompile.__module__]
    monkeypatch.setattr(backend, "_triton", lambda: (False, None))
    monkeypatch.setattr(module, "compile_for", lambda it, target: types.SimpleNamespace(hash=""))
    return module


def test_what_is_shared_is_compiled_once(compiler):
    found = precompile(
        [48, 56], dtypes=[torch.float32, torch.bfloat16], training=True, target="sm_90"
    )
    names = [(f.kernel, f.channels) for f in found]
    for channels in (48, 56):
        assert names.count(("gates", channels)) == 2
        assert names.count(("merge_statistics", channels)) == 1
    assert len(precompile([48], target="sm_90")) == 3


def test_kernels_are_compiled_at_the_same_time(compiler, monkeypatch):
    meet = threading.Barrier(3)

    def compile_for(it, target):
        meet.wait(timeout=60)
        return types.SimpleNamespace(hash="")

    monkeypatch.setattr(compiler, "compile_for", compile_for)
    assert len(precompile([48], target="sm_90", threads=3)) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": [0]}, ValueError, "channels: expected numbers of at least 1, got 0"),
        ({"channels": [4.0]}, TypeError, "channels: expected integers, got 4.0"),
        ({"channels": 48}, TypeError, "channels: expected integers, got 48"),
        ({"dtypes": torch.bfloat16}, TypeError, "dtypes: expected .*got torch.bfloat16"),
        ({"memory_formats": torch.channels_last}, TypeError, "memory_formats: expected"),
        ({"target": 90}, TypeError, "target: expected a string, got 90"),
        ({"threads": "2"}, TypeError, "threads: expected an integer, got '2'"),
        ({"dtypes": [torch.float64]}, ValueError, "dtypes: expected .*got torch.float64"),
        ({"memory_formats": [torch.preserve_format]}, ValueError, "memory_formats: expected"),
        ({"target": "h100"}, ValueError, "target: expected 'sm_90'.*got 'h100'"),
        ({"target": "sm_90", "device": 0}, ValueError, "device: expected None with target"),
        ({"device": "cpu"}, ValueError, "device: expected a GPU, got 'cpu'"),
        ({"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        precompile(**{"channels": [48], **arguments})


def test_where_it_cannot(monkeypatch):
    monkeypatch.setattr(backend, "_triton", lambda: (False, "no triton"))
    with pytest.raises(BackendUnavailable, match="precompile: no triton"):
        precompile([48], target="sm_90")
    monkeypatch.setattr(backend, "_triton", lambda: (True, None))
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET is set"):
        precompile([48], target="sm_90")
    monkeypatch.setattr(backend, "_triton", lambda: (False, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match=r"no GPU.*target='sm_90' compiles"):
        precompile([48])
