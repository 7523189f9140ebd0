"""The Triton backend: in the interpreter here, in processes of their own; what it says where it cannot.

TRITON_INTERPRET must be set before triton is imported, and what is interpreted cannot be compiled.
"""

import itertools
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from test_training import weights
from torch._subclasses import FakeTensorMode

from casvit_kernels import BackendUnavailable, FusedCATM, backends, testing
from casvit_kernels.backends import Problem, get, triton
from casvit_kernels.module import mixer_weights
from casvit_kernels.ops.mixer.autograd import mix_training
from casvit_kernels.ops.mixer.schema import Settings
from casvit_kernels.ops.mixer.triton import tuning

triton_itself = pytest.importorskip("triton")
from casvit_kernels.ops.mixer.triton import launch, plan  # noqa: E402

backends_module = sys.modules["casvit_kernels.backends.registry"]
HERE = Path(__file__).parent
INTERPRETED = {
    **os.environ,
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
}


def interpret(script):
    """Start Python on a script in the interpreter; `result` waits for it."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", f"import interpreted\n{script}"],
        env=INTERPRETED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    """What the script printed last, as JSON."""
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("choice", ["cover", pytest.param("cases", marks=pytest.mark.long)])
def test_parity(choice):
    """Each half of the cases in a process. Each takes the interpreter seconds.

    Quick: each dtype, layout, mode and shape once, and training in both layouts in every dtype.
    """
    chosen = testing.cases("triton")
    if choice == "cover":
        small = [c for c in chosen if c.shape == (3, 3, 7, 9) and c.mode == "train"]
        chosen = list(dict.fromkeys(testing.cover(chosen, 1) + small))
    numbers = [testing.cases("triton").index(case) for case in chosen]
    script = f"""
import json
from casvit_kernels import testing
every = testing.cases("triton")
rows = [testing.check(every[i]) for i in {numbers}[{{start}}::2]]
print(json.dumps([len(rows), [[str(r[:5]), r.failures] for r in rows if not r.passed]]))
"""
    found = [result(p) for p in [interpret(script.format(start=i)) for i in range(2)]]
    assert [failures for _, failures in found] == [[], []]
    assert sum(count for count, _ in found) == len(chosen)


TRAINING = (
    "compiled_step or gradient_scaler or frozen_parts or nothing_but or "
    "the_same_bits or synchronised_batch_norm or nan or test_ddp"
)


@pytest.mark.long
def test_training_tests():
    """Those of the training suites that could differ between backends, on this one."""
    suites = [str(HERE / f"test_{name}.py") for name in ("training", "field")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", TRAINING, *suites],
        env={**INTERPRETED, "CASVIT_KERNELS_TEST_BACKEND": "triton"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_inference():
    """Launches, what is kept between calls, and when it is made anew."""
    found = result(
        interpret(
            """
import json
import torch
from casvit_kernels import FusedCATM, catm, use_backend
from casvit_kernels.backends import Problem, select
from casvit_kernels.module import mixer_weights
from casvit_kernels.ops.mixer.triton import launch, packed, phases

calls = []
def counting(name, kernel):
    class Counted:
        def __getitem__(self, grid):
            calls.append(name)
            return kernel[grid]
    return Counted()
launch.KERNELS = {name: counting(name, kernel) for name, kernel in launch.KERNELS.items()}
product, vectors = phases.product, packed.vectors
phases.product = lambda *a: calls.append("product") or product(*a)
packed.vectors = lambda *a: calls.append("vectors") or vectors(*a)

mixer, x = FusedCATM(5, True).eval(), torch.randn(2, 5, 4, 6)
for p in mixer.parameters():
    torch.nn.init.normal_(p)
def run(*, backend="triton"):
    calls.clear()
    with use_backend(backend), torch.no_grad():
        return mixer(x)
def error():
    return float((run() - run(backend="reference")).abs().max())

document = {"automatic": select(None, Problem("cpu", torch.float32)).name}
document["error"] = error()
run()
document["calls"] = list(calls)
with torch.no_grad():
    mixer.oper_q[0].block[1].running_var.mul_(3)
run()
document["changed"] = "vectors" in calls
document["error after a change"] = error()
calls.clear()
with torch.no_grad():  # what a captured graph has, too, where nothing is kept
    out = catm(x, mixer_weights(mixer), backend="triton")
document["calls without packed weights"] = list(calls)
document["error without packed weights"] = float((out - run()).abs().max())
with torch.autocast("cpu", torch.bfloat16):
    document["autocast"] = str(run().dtype)
    run()
    document["kept under autocast"] = list(calls)
with torch.inference_mode():
    document["error in inference mode"] = error()
with use_backend("triton"):
    out = mixer(x.requires_grad_())
    out.square().sum().backward()
    document["gradient"] = bool(x.grad.isfinite().all() and mixer.qkv.weight.grad is not None)
    document["empty"] = list(mixer(x[:0]).shape)
print(json.dumps(document))
"""
        )
    )
    assert found["automatic"] == "cpu"  # interpreted, it must be asked for
    four = ["product", "gates", "channel_gates", "combine"]
    assert found["calls"] == found["kept under autocast"] == four
    assert found["calls without packed weights"] == ["vectors", *four]
    assert found["changed"]
    assert found["autocast"] == "torch.bfloat16"
    assert max(found[k] for k in found if "error" in k) < 1e-3
    assert found["gradient"]
    assert found["empty"] == [0, 5, 4, 6]


@pytest.mark.long
def test_compiled_before_anything_ran():
    """The first call of a process is a compiled one, in training and in eval."""
    script = """
import torch
from casvit_kernels import FusedCATM
mixer, x = FusedCATM(3, backend="triton").train({training}), torch.randn(1, 3, 3, 4)
compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
compiled(x).sum().backward()
print("{{}}")
"""
    for process in [interpret(script.format(training=training)) for training in (True, False)]:
        result(process)


def test_a_graph_packs_the_weights_it_reads():
    """Compiled inference follows what is written to weights and statistics, without compiling anew."""
    found = result(
        interpret(
            """
import json
import torch
from torch._dynamo.backends.common import aot_autograd
from casvit_kernels import FusedCATM

graphs, document = [], []
def keep(graph, inputs):
    graphs.append(graph)
    return graph

mixer, x = FusedCATM(5, True, backend="triton").eval(), torch.randn(2, 5, 4, 6)
for p in mixer.parameters():
    torch.nn.init.normal_(p)
compiled = torch.compile(mixer, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
for autocast in (False, True):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = [(compiled(x), mixer(x))]
        mixer.oper_q[0].block[1].running_var.mul_(3)
        mixer.proj.weight.mul_(2)
        results.append((compiled(x), mixer(x)))
    targets = [str(n.target).split(".")[1] for n in graphs[-1].graph.nodes if n.op == "call_function"]
    document.append({
        "graphs": len(graphs),
        "equal": [bool((a == b).all()) for a, b in results],
        "changed": bool((results[0][0] != results[1][0]).any()),
        "dtype": str(results[0][0].dtype),
        "work": [t for t in targets if t not in ("view", "slice", "_to_copy")],
    })
print(json.dumps(document))
"""
        )
    )
    for number, (each, dtype) in enumerate(zip(found, ("float32", "bfloat16"), strict=True), 1):
        assert each == {
            "graphs": number,
            "equal": [True, True],
            "changed": True,
            "dtype": f"torch.{dtype}",
            "work": ["cat", "triton_infer"],
        }


def test_opcheck():
    """The operators with this backend behind them."""
    result(
        interpret(
            """
import torch
from test_training import EPS, requires_grad, weights
from casvit_kernels.ops.mixer.autograd import mix_training
from casvit_kernels.ops.mixer.schema import Settings
from casvit_kernels.ops.mixer.triton import TritonKernels
from casvit_kernels.ops.mixer.weights import flatten

x, w = torch.randn(2, 3, 3, 4).requires_grad_(), requires_grad(weights(3))
settings = Settings(*EPS, True, True, None, "triton", "")
torch.library.opcheck(torch.ops.casvit_kernels.mix_training.default, (x, *flatten(w), *settings))
with torch.no_grad():
    packed = TritonKernels().pack(w, EPS, x.dtype)
given = (x.detach(), *packed, *EPS, x.dtype)
torch.library.opcheck(torch.ops.casvit_kernels.triton_infer.default, given)
print("{}")
"""
        )
    )


def test_offsets_past_two_gigaelements():
    """k begins 2^31 elements into the tensor; nothing but the few pixels read is ever touched."""
    found = result(
        interpret(
            """
import json
import phases
import torch
from casvit_kernels.ops.mixer.triton import forward

H, W, C, TILE = 2, 2**28 + 64, 4, 32
qkv = torch.empty(3 * C * H * W, dtype=torch.float16)
small = torch.randn(C, H, TILE).half()
qkv.as_strided((C, H, TILE), (H * W, W, 1), C * H * W).copy_(small)
taps, bias = torch.randn(C, 9), torch.randn(C)
vectors = torch.cat([torch.zeros(13 * C), taps.flatten(), bias, torch.zeros(36 * C)])
number, partial = torch.empty(1), torch.zeros(2, 2, C)
# The first program alone: its tile owns the 31 columns on the left.
forward.statistics_kernel[(1, 1, 2)](
    qkv, vectors, number, partial, 1, H, W, H, 1, C, True, TILE, 16, 1
)
d = phases.convolve(small[None].double(), taps.view(C, 1, 3, 3).double(), bias.double())
own = d[0, :, :, : TILE - 2].flatten(1)
print(json.dumps([C * H * W > 2**31, (partial[1, 0] - own.mean(1)).abs().max().item(), number.item()]))
"""
        )
    )
    assert found[0]
    assert found[1] < 1e-5
    assert found[2] == 2 * 30


def test_images_too_large_are_refused():
    x = torch.empty(1, 8, 2**13, 2**14, device="meta")
    with pytest.raises(ValueError, match=r"fewer than 2\^31 elements"):
        plan.plan("statistics", plan.maps_of(x, x.dtype))


@pytest.mark.long
def test_rows_and_images_of_a_program_only_change_rounding():
    """Bands of rows and groups of images, however they are cut, give the same results."""
    found = result(
        interpret(
            """
import json
import torch
from casvit_kernels import FusedCATM
from casvit_kernels.ops.mixer.triton import plan, tuning

mixer = FusedCATM(3, True, backend="triton").train()
x = torch.randn(4, 3, 5, 6)
results = []
for few, many, band in ((1, 1, 8), (10**6, 10**6, 1), (10**6, 1, 2)):
    tuning.FEW_PROGRAMS, tuning.MULTIPROCESSORS, tuning.SMALLEST_BAND = few, many, band
    plan.plan.cache_clear()
    cut = tuning.cut("combine", 3, *x.shape[:1], *x.shape[2:], many)
    y = x.clone().requires_grad_()
    mixer.zero_grad()
    mixer(y).square().sum().backward()
    results.append((list(cut), [y.grad, *(p.grad.clone() for p in mixer.parameters())]))
errors = [
    max(float((a - b).abs().max() / b.abs().max().clamp(min=0.1)) for a, b in zip(r, results[0][1]))
    for _, r in results
]
print(json.dumps([[cut for cut, _ in results], errors]))
"""
        )
    )
    cuts, errors = found
    assert len({tuple(c) for c in cuts}) == 3
    assert max(errors) < 1e-4


def test_fake_tensors_of_a_gpu():
    """What torch.compile sees of a call on CUDA, here without a GPU."""
    with FakeTensorMode(), torch.device("cuda"):
        w = weights(6, dtype=torch.bfloat16)
        x = torch.empty(2, 6, 8, 9, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        settings = Settings(1e-5, 1e-5, True, True, None, "triton", "")
        out, saved = mix_training(x, w, settings)
        assert out.device.type == saved.spatial.device.type == "cuda"
        assert out.dtype is torch.bfloat16
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert saved.spatial.shape == (2, 2, 8, 9)


# Where it cannot run.


@pytest.fixture
def fresh():
    """The backend as on a first call."""
    for cached in (triton._triton, triton._device):
        cached.cache_clear()
    yield get("triton")
    for cached in (triton._triton, triton._device):
        cached.cache_clear()


def reason_of(backend):
    reason = backend.why_not()
    assert next(s.reason for s in backends() if s.name == "triton") == reason
    mixer, x = FusedCATM(3, backend="triton"), torch.randn(1, 3, 4, 4)
    with pytest.raises(BackendUnavailable) as caught:
        mixer(x)
    assert backend.why_not(Problem("cpu", torch.float32)) in str(caught.value)
    return reason


def test_without_triton(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in reason_of(fresh)
    assert "pip install" in reason_of(fresh)


def test_triton_too_old(fresh, monkeypatch):
    monkeypatch.setattr(triton_itself, "__version__", "3.5.1+git")
    assert "needs triton 3.6 or later, found 3.5.1+git" in reason_of(fresh)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(fresh):
    assert "no GPU" in reason_of(fresh)
    assert "TRITON_INTERPRET=1" in reason_of(fresh)


def test_gpu_too_old(fresh, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = [(7, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", ("V100", "T4").__getitem__)
    reason = fresh.why_not(Problem("cuda", torch.float32))
    assert "capability 8.0 or later, the newest here, T4 (cuda:1), has 7.5" in reason
    assert reason == reason_of(fresh)
    capabilities[0] = (9, 0)
    triton._device.cache_clear()
    assert fresh.why_not() is None


def test_what_it_does_not_compute(fresh, monkeypatch):
    monkeypatch.setattr(triton, "_device", lambda count: None)
    assert fresh.why_not() is None
    assert fresh.why_not(Problem("cuda", torch.bfloat16)) is None
    assert "not torch.float64" in fresh.why_not(Problem("cuda", torch.float64))
    assert "tensors are on 'cpu'" in fresh.why_not(Problem("cpu", torch.float32))


def test_the_reference_on_a_gpu_is_said_once(fresh, monkeypatch):
    monkeypatch.setattr(backends_module, "_warned", False)
    monkeypatch.setattr(triton, "_device", lambda count: "no such GPU")
    with pytest.warns(UserWarning, match="no such GPU"):
        assert backends_module.select(None, Problem("cuda", torch.float32)).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends_module.select(None, Problem("cuda", torch.float32))


@pytest.mark.parametrize("channels", [1, 16, 17, 48, 130, 220, 256, 512, 1000])
def test_tiles(channels):
    """Powers of two that hold all channels where they must; programs that cover every image."""
    for kernel, halo in tuning.HALO.items():
        tile = tuning.tile(kernel, channels)
        assert tile.pixels & (tile.pixels - 1) == tile.channels & (tile.channels - 1) == 0
        assert tile.pixels > 2 * halo
        if kernel in ("gates", "backward_gate"):
            assert tile.channels >= channels
        for images, height, width in (
            (1, 1, 1),
            (256, 7, 7),
            (3, 56, 56),
            (64, 96, 96),
            (2, 9, 33),
        ):
            cut = tuning.cut(kernel, channels, images, height, width, tuning.MULTIPROCESSORS)
            owned = tile.pixels if width <= tile.pixels else tile.pixels - 2 * halo
            together = (tile.pixels + 1) // (width + 1) or 1
            columns = -(-width // owned)
            assert cut.parts == columns * -(-height // cut.rows)
            groups = cut.programs // cut.parts * cut.repeat
            assert groups * together >= images > (groups - cut.repeat) * together


@pytest.mark.parametrize(("channels", "edge"), [(48, 56), (56, 28), (112, 14), (220, 7), (512, 7)])
def test_no_multiprocessor_is_idle(channels, edge):
    """At batch 256, on GPUs with as many as an A100, an H100 and an MI300X, nine in ten have work."""
    for count, kernel in itertools.product((108, 132, 304), tuning.HALO):
        tile = tuning.tile(kernel, channels)
        cut = tuning.cut(kernel, channels, 256, edge, edge, count)
        gates = 2 if kernel in tuning.PER_GATE else 1
        programs = cut.programs * -(-channels // tile.channels) * gates
        assert programs > 0.79 * -(-programs // count) * count, (count, kernel, programs)


def test_the_multiprocessors_of_the_gpu_count(monkeypatch):
    """Not those of the GPU that is current; and a constant where there is none."""
    properties = {torch.device("cuda", 0): 64, torch.device("cuda", 1): 10**6}
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: types.SimpleNamespace(multi_processor_count=properties[device]),
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    shape, devices = torch.Size((256, 112, 14, 14)), [*properties, torch.device("cpu")]
    repeats = [plan.plan("gates", plan.Maps(shape, False, 2, d)).sizes[-1] for d in devices]
    cuts = [tuning.cut("gates", 112, 256, 14, 14, n) for n in (64, 10**6, tuning.MULTIPROCESSORS)]
    assert repeats == [c.repeat for c in cuts]
    assert len(set(repeats)) == 3, repeats
    plan.plan.cache_clear()  # of GPUs that are not there


def test_a_call_is_planned_once():
    """Again for another shape, layout, width of elements or device; no tensor is kept."""
    kinds = [
        plan.maps_of(torch.empty(shape).contiguous(memory_format=layout), dtype)
        for shape in ((2, 6, 8, 8), (3, 6, 8, 8))
        for layout in (torch.channels_last, torch.contiguous_format)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    kinds.append(kinds[0]._replace(device=torch.device("meta")))
    plan.plan.cache_clear()
    found = [plan.plan("combine", maps) for maps in kinds]
    assert plan.plan.cache_info().misses == len(kinds)
    again = torch.ones(2, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    again = plan.maps_of(again, torch.float32)
    assert plan.plan("combine", again) is found[0]
    assert plan.plan.cache_info().maxsize == plan.MOST
    assert not [
        v for p in found for v in (*p, *p.sizes, *p.constants.values()) if torch.is_tensor(v)
    ]


def test_a_step_is_planned_once():
    mixer = FusedCATM(6, True)
    x = torch.randn(2, 6, 7, 7, requires_grad=True)
    settings = Settings(1e-5, 1e-5, True, True, None, "triton", "")

    def step():
        with launch.recorded() as record:
            mix_training(x, mixer_weights(mixer), settings)[0].sum().backward()
        return [it[:2] for it in record]

    plan.plan.cache_clear()
    first, planned = step(), plan.plan.cache_info().misses
    assert step() == first
    assert plan.plan.cache_info().misses == planned == len(launch.KERNELS)
