"""Which backends there are, and which one serves a call."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import require_native
from mixers import filled

import casvit_kernels
from casvit_kernels import BackendUnavailable, FusedCATM, backends, use_backend
from casvit_kernels.backends import ENVIRONMENT, Problem, cpu, get, select
from casvit_kernels.ops.mixer.cpu import CpuKernels

CALL = Problem("cpu", torch.float32)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def choice(requested=None, problem=CALL):
    return select(requested, problem).name


def native_is_usable():
    return next(s.usable for s in backends() if s.name == "cpu")


def test_every_backend_is_listed_with_its_reason():
    rows = backends()
    assert [r.name for r in rows] == ["cpu", "cuda", "triton", "reference"]
    for row in rows:
        assert row.usable == (row.reason is None)
        assert row.reason is None or len(row.reason) > 10
    assert rows[-1].usable


def test_the_native_library_is_demanded_where_it_must_be():
    require_native()


# Precedence: argument, use_backend, environment, automatic


def test_precedence(monkeypatch):
    require_native()
    assert choice() == "cpu"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert choice() == "reference"
    with use_backend("cpu"):
        assert choice() == "cpu"
        assert choice("reference") == "reference"
    assert choice() == "reference"
    assert choice("cpu") == "cpu"
    monkeypatch.setenv(ENVIRONMENT, "")  # as if unset
    assert choice() == "cpu"


def test_the_module_follows_the_choice(monkeypatch):
    require_native()
    called = []
    real = CpuKernels.project_and_mix
    monkeypatch.setattr(CpuKernels, "project_and_mix", lambda *a: called.append(1) or real(*a))
    x = torch.randn(1, 4, 3, 3)
    mixer = FusedCATM(4).eval()
    mixer(x)
    assert len(called) == 1
    with use_backend("reference"):
        mixer(x)
    monkeypatch.setenv(ENVIRONMENT, "reference")
    mixer(x)
    FusedCATM(4, backend="reference").eval()(x)
    assert len(called) == 1
    FusedCATM(4, backend="cpu").eval()(x)
    assert len(called) == 2


def test_none_lifts_an_outer_choice():
    automatic = choice()
    with use_backend("reference"):
        with use_backend(None):
            assert choice() == automatic
        assert choice() == "reference"


def test_nesting_and_exceptions_restore():
    automatic = choice()
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert choice() == "reference"
    assert choice() == automatic


def test_use_backend_is_of_one_thread():
    automatic = choice()
    seen = {}
    inside, outside = threading.Event(), threading.Event()

    def other():
        inside.wait(60)
        seen["other"] = choice()
        outside.set()

    thread = threading.Thread(target=other)
    thread.start()
    with use_backend("triton"):
        inside.set()
        assert outside.wait(60)
    thread.join()
    assert seen["other"] == automatic


def test_use_backend_is_of_one_task():
    automatic = choice()

    async def one():
        with use_backend("triton"):
            await asyncio.sleep(0)
            with pytest.raises(BackendUnavailable):
                choice()

    async def two():
        await asyncio.sleep(0)
        return choice()

    async def both():
        return await asyncio.gather(one(), two())

    assert asyncio.run(both())[1] == automatic


# Refusals


def test_unknown_names_list_the_known(monkeypatch):
    for call in (lambda: choice("metal"), lambda: use_backend("metal").__enter__()):
        with pytest.raises(ValueError, match="cpu, cuda, triton, reference, got 'metal'"):
            call()
    monkeypatch.setenv(ENVIRONMENT, "metal")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT}: expected one of .*got 'metal'"):
        choice()
    assert choice("reference") == "reference"  # the argument comes first


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_impossible_requests_say_who_asked_and_why(monkeypatch, name):
    reason = next(s.reason for s in backends() if s.name == name)
    if reason is None:
        pytest.skip(f"{name} is usable here")
    with pytest.raises(BackendUnavailable, match=f"backend='{name}' .*float32 on cpu") as caught:
        choice(name)
    assert get(name).why_not(Problem("cpu", torch.float32)) in str(caught.value)
    with use_backend(name), pytest.raises(BackendUnavailable, match=f"use_backend='{name}'"):
        choice()
    monkeypatch.setenv(ENVIRONMENT, name)
    with pytest.raises(BackendUnavailable, match=f"{ENVIRONMENT}='{name}'"):
        choice()


def test_the_cpu_backend_refuses_float64_and_says_what_it_computes():
    require_native()
    mixer = filled(FusedCATM(4, backend="cpu")).eval().double()
    with pytest.raises(
        BackendUnavailable, match=r"float32, bfloat16 and float16, not torch\.float64"
    ):
        mixer(torch.randn(1, 4, 3, 3).double())


def test_the_cpu_backend_refuses_other_devices():
    require_native()
    with pytest.raises(BackendUnavailable, match="the tensors are on 'cuda'"):
        choice("cpu", Problem("cuda", torch.float32))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu", "meta"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_the_automatic_choice_never_raises(device, dtype):
    name = choice(problem=Problem(device, dtype))
    native = native_is_usable() and device == "cpu" and dtype is not torch.float64
    assert name == ("cpu" if native else "reference")


def test_the_automatic_choice_computes_float64():
    mixer = filled(FusedCATM(4)).eval().double()
    assert mixer(torch.randn(1, 4, 3, 3).double()).dtype is torch.float64


# Without the native library, and with an instruction set that was asked for


def python(script, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "CASVIT_KERNELS_CPU_ISA"}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_without_the_native_library_it_says_so_once_and_computes():
    script = (
        "from casvit_kernels.backends import native\n"
        "native.load = lambda: (None, 'no library, said the test')\n"
        "import torch, casvit_kernels\n"
        "for _ in range(3):\n"
        "    print(casvit_kernels.FusedCATM(4).eval()(torch.randn(1, 4, 3, 3)).shape)\n"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([1, 4, 3, 3])") == 3
    assert done.stderr.count("no library, said the test") == 1
    assert done.stderr.count("reference path") == 1


@pytest.mark.parametrize(
    "call",
    [
        "casvit_kernels.FusedCATM(4).eval()(torch.randn(1, 4, 3, 3))",
        "casvit_kernels.tokens.cluster_tokens(torch.randn(1, 9, 4), (3, 3), (2, 2))",
    ],
)
def test_an_unknown_instruction_set_is_refused(call):
    require_native()
    script = f"import torch, casvit_kernels, casvit_kernels.tokens\n{call}\n"
    done = python(script, CASVIT_KERNELS_CPU_ISA="mmx")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "mmx" in last
    assert all(name in last for name in cpu.instruction_sets())


def test_an_instruction_set_this_cpu_lacks_is_refused():
    require_native()
    missing = [n for n, reason in cpu.instruction_sets().items() if reason is not None]
    if not missing:
        pytest.skip("this CPU has every instruction set of the build")
    script = (
        "import torch, casvit_kernels\n"
        "casvit_kernels.FusedCATM(4).eval()(torch.randn(1, 4, 3, 3))\n"
    )
    done = python(script, CASVIT_KERNELS_CPU_ISA=missing[0])
    assert done.returncode != 0
    assert missing[0] in done.stderr.strip().splitlines()[-1]


def test_the_instruction_set_in_use_is_the_best_usable_one(monkeypatch):
    require_native()
    if "CASVIT_KERNELS_CPU_ISA" in os.environ:
        assert cpu.active_instruction_set() == os.environ["CASVIT_KERNELS_CPU_ISA"]
        return
    usable = [n for n, reason in cpu.instruction_sets().items() if reason is None]
    assert "portable" in usable
    assert cpu.active_instruction_set() == usable[0]


def test_importing_needs_torch_alone():
    script = (
        "import sys\n"
        "for name in ('numpy', 'timm', 'onnx', 'onnxruntime', 'coremltools', 'sklearn', 'skimage',\n"
        "             'matplotlib', 'tqdm', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "import torch, casvit_kernels, casvit_kernels.testing, casvit_kernels.models\n"
        "print(casvit_kernels.FusedCATM(4).eval()(torch.randn(1, 4, 3, 3)).shape)\n"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr


def test_public_names():
    for name in casvit_kernels.__all__:
        assert hasattr(casvit_kernels, name)
    wanted = {"FusedCATM", "catm", "fuse", "unfuse", "backends", "use_backend"}
    assert wanted <= set(casvit_kernels.__all__)
