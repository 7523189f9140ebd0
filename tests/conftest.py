"""What all tests share: seeds, thread limits, and the demand for the native library."""

import os
from contextlib import contextmanager

import pytest
import torch

import casvit_kernels
from casvit_kernels.backends import cpu, native
from casvit_kernels.ops.network import cpu as network_cpu
from casvit_kernels.ops.network import dispatch as network_dispatch
from casvit_kernels.ops.network import kernels as network_kernels

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreted  # noqa: F401

REQUIRE_NATIVE = "CASVIT_KERNELS_REQUIRE_NATIVE"

# The backend whose training test_training.py and test_field.py look at; tests/test_triton.py runs
# them again, in a process of its own, with another one.
BACKEND = os.environ.get("CASVIT_KERNELS_TEST_BACKEND", "cpu")


def require_backend(name):
    """Skip the calling test unless backend `name` is usable, with the backend's own reason.

    A missing native CPU kernel fails instead where CASVIT_KERNELS_REQUIRE_NATIVE=1 is set.
    """
    status = next(s for s in casvit_kernels.backends() if s.name == name)
    if status.usable:
        return
    if name == "cpu" and os.environ.get(REQUIRE_NATIVE) == "1":
        pytest.fail(f"{REQUIRE_NATIVE}=1 is set and the cpu backend is not usable: {status.reason}")
    pytest.skip(f"{name}: {status.reason}")


def require_native():
    """Skip (or fail, see `require_backend`) the calling test without the native CPU kernel."""
    require_backend("cpu")


@contextmanager
def using_instruction_set(name):
    """Within the context the native kernels are those of `name`; skips where this CPU has it not."""
    require_native()
    reason = cpu.instruction_sets().get(name, "not in this build")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    library, before = native.load()[0], cpu.active_instruction_set()
    library.casvit_cpu_isa_select(name.encode())
    try:
        yield
    finally:
        library.casvit_cpu_isa_select(before.encode())


@pytest.fixture(name="require_native")
def _require_native():
    """The same for a test that names it as an argument."""
    require_native()


@pytest.fixture(params=["cpu", "reference"])
def road(request):
    """Of token clustering: the native kernels, and the formulas that serve every other device."""
    require_backend(request.param)
    with casvit_kernels.use_backend(request.param):
        yield request.param


class Served:
    """The kernels of a whole network, counting the calls that they serve."""

    def __init__(self, inner):
        self._inner, self.calls, self.packs = inner, 0, 0
        self.scratch = inner.scratch

    def pack(self, *arguments):
        self.packs += 1
        return self._inner.pack(*arguments)

    def infer(self, *arguments):
        self.calls += 1
        self._inner.infer(*arguments)


@pytest.fixture
def served(monkeypatch):
    """Counts what kernels serve: the native ones, or the formulas behind the same contract without."""
    inner = network_cpu.kernels() or network_kernels.FormulaKernels()
    counting = Served(inner)
    monkeypatch.setattr(network_dispatch, "_instead", counting)
    return counting


def pytest_terminal_summary(terminalreporter):
    """Under the failures: how to run each of them alone."""
    failed = [r.nodeid for kind in ("failed", "error") for r in terminalreporter.getreports(kind)]
    if failed:
        terminalreporter.section("again, alone")
        for nodeid in dict.fromkeys(failed):
            terminalreporter.write_line(f"""make test ARGS="'{nodeid}' -n 0 -m ''" """.rstrip())


def pytest_configure():
    # Small tensors: more threads only make the tests slower. A test may set its own number.
    if "PYTEST_XDIST_WORKER" in os.environ:  # one process for each core
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
        torch.set_num_threads(1)
        # A pytest that a test starts is no worker: pytest-benchmark would not measure in one.
        for name in [n for n in os.environ if n.startswith("PYTEST_XDIST_")]:
            del os.environ[name]
    else:
        torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state and leaves the number of threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
