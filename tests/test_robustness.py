"""Several threads, other numbers of threads, fork, and hundreds of calls."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import require_backend, require_native
from mixers import assert_right, filled

from casvit_kernels import FusedCATM
from casvit_kernels.backends import cpu

SHAPES = [(1, 24, 9, 7), (3, 24, 14, 14), (2, 24, 1, 5), (5, 24, 28, 28)]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    require_backend(request.param)
    return request.param


def inputs(dtype=torch.float32):
    found = [torch.randn(s).to(dtype) for s in SHAPES]
    return found + [x.contiguous(memory_format=torch.channels_last) for x in found]


def together(tasks, repeats=15):
    """Run every task in a thread of its own, all at once, `repeats` times; their results."""
    start = threading.Barrier(len(tasks))
    results = [[] for _ in tasks]
    errors = []

    def work(task, out):
        try:
            torch.set_grad_enabled(False)  # of this thread
            for _ in range(repeats):
                start.wait(60)
                out.append(task())
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(tasks, results, strict=True)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_module_called_by_several_threads(backend, dtype):
    mixer = filled(FusedCATM(24, backend=backend)).eval().to(dtype)
    xs = inputs(dtype)
    with torch.no_grad():
        expected = [mixer(x) for x in xs]
    results = together([lambda x=x: mixer(x) for x in xs])
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(out, right) for out in found)


def test_first_calls_of_one_module_by_several_threads(backend):
    x = torch.randn(2, 24, 7, 7)
    for seed in range(5):  # each time with nothing packed yet
        mixer = filled(FusedCATM(24, backend=backend), seed).eval()
        results = together([lambda m=mixer: m(x)] * 4, repeats=1)
        right = assert_right(mixer, x)
        assert all(torch.equal(found[0], right) for found in results)


def test_different_modules_called_by_several_threads(backend):
    mixers = [
        filled(FusedCATM(dim, bias, backend=backend)).eval()
        for dim, bias in ((24, False), (3, True), (40, False), (65, True))
    ]
    xs = [torch.randn(2, m.qkv.in_channels, 10, 9) for m in mixers]
    with torch.no_grad():
        expected = [m(x) for m, x in zip(mixers, xs, strict=True)]
    tasks = [lambda m=m, x=x: m(x) for m, x in zip(mixers, xs, strict=True)]
    for found, right in zip(together(tasks), expected, strict=True):
        assert all(torch.equal(out, right) for out in found)


def test_a_module_edited_while_another_thread_calls_it(backend):
    """Each result is that of the old or of the new weights of `qkv`, never of freed memory."""
    mixer = filled(FusedCATM(24, backend=backend)).eval()
    x = torch.randn(2, 24, 14, 14)
    weights = [mixer.qkv.weight.detach().clone(), 2 * mixer.qkv.weight.detach()]
    expected = []
    for w in weights:
        mixer.load_state_dict({**mixer.state_dict(), "qkv.weight": w})
        expected.append(assert_right(mixer, x))
    turn = iter(range(1000))

    def replace():
        mixer.qkv.weight = torch.nn.Parameter(weights[next(turn) % 2])

    outs, _ = together([lambda: mixer(x), replace], repeats=40)
    assert all(any(torch.equal(out, e) for e in expected) for out in outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    require_native()
    mixer = filled(FusedCATM(24, backend="cpu")).eval().to(dtype)
    found = {}
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        with torch.no_grad():
            found[threads] = [mixer(x) for x in _fixed_inputs(dtype)]
    for threads in (2, 3):
        for a, b in zip(found[1], found[threads], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_right_with_any_number_of_threads(backend, threads):
    torch.set_num_threads(threads)
    mixer = filled(FusedCATM(24, backend=backend)).eval()
    for x in inputs():
        assert_right(mixer, x)


@pytest.mark.long
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_with_two_threads(name):
    """The images that are left when each thread has as many as the others are computed in phases."""
    require_native()
    reason = cpu.instruction_sets().get(name, "not in this version for this CPU")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    # The library reads the variable when it loads, so each needs a process of its own.
    script = (
        "import json, torch\n"
        "from casvit_kernels import testing\n"
        "from casvit_kernels.backends import cpu\n"
        "torch.set_num_threads(2)\n"
        "cases = [testing.Case('cpu', dtype, layout, 'eval', shape)\n"
        "         for dtype in (torch.float32, torch.bfloat16)\n"
        "         for layout in ('contiguous', 'channels_last')\n"
        "         for shape in ((1, 48, 28, 28), (3, 33, 13, 9), (1, 220, 7, 7), (5, 65, 9, 9))]\n"
        "failures = [row.failures for row in map(testing.check, cases) if not row.passed]\n"
        "print(json.dumps([cpu.active_instruction_set(), torch.get_num_threads(), failures]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "CASVIT_KERNELS_CPU_ISA": name},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [name, 2, []]


def _fixed_inputs(dtype):
    torch.manual_seed(1)
    return inputs(dtype)


FORK = """
import ctypes, os, sys, torch
sys.path.insert(0, {tests!r})
from mixers import filled
from casvit_kernels import FusedCATM
torch.set_num_threads({threads})
def bits(t):  # torch.equal itself would start a team in the child, and hang
    return ctypes.string_at(t.data_ptr(), t.nbytes)
mixer = filled(FusedCATM(24, backend={backend!r})).eval()
x = torch.randn(5, 24, 28, 28)
with torch.no_grad():
    expected = bits(mixer(x))
    for _ in range(2):
        child = os.fork()
        if child == 0:
            other = filled(FusedCATM(9, True, backend={backend!r})).eval()
            other(torch.randn(3, 9, 17, 16))
            same = all(bits(mixer(x)) == expected for _ in range(3))
            os._exit(0 if same else 7)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
    assert bits(mixer(x)) == expected
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_computes_the_same(threads):
    require_native()
    # GNU OpenMP, which torch uses on Linux, cannot start a team in a child of a process that has one:
    # there the kernel computes serially, and does not hang.
    script = FORK.format(
        tests=os.path.dirname(__file__),
        threads=threads,
        backend="cpu",
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"


def _resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
@pytest.mark.parametrize("what", ["eval", "changing weights", "changing sizes", "frozen gradients"])
def test_memory_is_steady_over_hundreds_of_calls(backend, what):
    mixer = filled(FusedCATM(48, backend=backend)).eval()
    sizes = [(b, s) for b in (1, 2, 3) for s in (5, 17, 28)]

    def call(i):
        b, s = sizes[i % len(sizes)] if what == "changing sizes" else (2, 28)
        x = torch.randn(b, 48, s, s)
        if what == "changing weights":
            with torch.no_grad():
                mixer.proj.weight.mul_(1.0)
        if what == "frozen gradients":
            mixer.requires_grad_(True)
            mixer(x).sum().backward()
            return
        with torch.no_grad():
            mixer(x)

    for i in range(60):
        call(i)
    before = _resident_bytes()
    for i in range(400):
        call(i)
    grown = _resident_bytes() - before
    # One output of 0.3 MB, or one set of packed weights of 40 KB, kept per call would be far more.
    assert grown < 8 * 2**20


def test_scratch_is_freed_with_its_thread():
    require_native()
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("reads Linux's /proc")
    mixer = filled(FusedCATM(64, backend="cpu")).eval()
    x = torch.randn(1, 64, 56, 56)

    def one_thread():
        def work():
            with torch.no_grad():
                mixer(x)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    for _ in range(20):
        one_thread()
    before = _resident_bytes()
    for _ in range(100):
        one_thread()
    # The scratch of one such call is some 2 MB.
    assert _resident_bytes() - before < 40 * 2**20
