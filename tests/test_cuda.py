"""The CUDA kernels in the emulation, and what the backend says.

Here no GPU runs them: what these tests cannot show is in tests/cuda_emulation/README.md.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulation import backend as emulated
from cuda_emulation import build

from casvit_kernels import (
    AdditiveTokenMixer,
    BackendUnavailable,
    FusedCATM,
    backends,
    testing,
    use_backend,
)
from casvit_kernels.backends import Problem, cuda, get, native
from casvit_kernels.ops.mixer import cuda as mixer_on_cuda
from casvit_kernels.ops.mixer import kernels, plans
from casvit_kernels.ops.mixer.cuda import padded_product
from casvit_kernels.ops.mixer.schema import Settings
from casvit_kernels.ops.mixer.structure import Structure
from casvit_kernels.ops.mixer.weights import flatten
from casvit_kernels.testing.cases import Case, Target

HERE = Path(__file__).parent
NAME = emulated.NAME
registry = sys.modules["casvit_kernels.backends.registry"]
emulation = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
DEVICES = {  # multiprocessors, shared memory a block may ask for
    "A100": (108, 166912),
    "H100": (132, 232448),
    "RTX 5090": (170, 101376),
}


@pytest.fixture
def operators():
    """The emulated backend, registered for one test."""
    yield emulated.register()
    registry._REGISTRY.pop(NAME)
    kernels._TABLE.pop(NAME)
    testing.BACKENDS.pop(NAME)


@pytest.fixture(params=[2, 1], ids=["two launches", "one launch"])
def either(request, operators):
    """The emulated backend, with as many launches after the qkv product."""
    operators.launches_wanted = request.param
    return operators


def cut_small(operators, shape, multiprocessors):
    """Takes the smallest shared memory that one launch fits into, so that a cluster cuts the maps."""
    for shared in (2048, 4096, 8192, 16384, 32768, 65536, 101376, 232448):
        operators.device_of_mix = (multiprocessors, shared)
        plan = single_pass(operators, shape)
        if plan["rows"]:
            return plan
    raise AssertionError(f"{shape} fits nowhere")


def single_pass(operators, shape):
    return operators.call(shape, torch.bfloat16, operators.device_of_mix).plans()[6]


def parity_cases():
    testing.BACKENDS[NAME] = Target("cpu", emulated.DTYPES)
    registry._REGISTRY[NAME] = emulated.EmulatedBackend()
    try:
        every = testing.cases(NAME)
        quick = set(testing.cover(every, 1))
        # Whole chunks and channels_last take stores of their own.
        quick |= {c for c in every if c.shape == (2, 48, 13, 9) and c.layout == "channels_last"}
    finally:
        testing.BACKENDS.pop(NAME)
        registry._REGISTRY.pop(NAME)
    return [
        pytest.param(c, id=f"{c}-{c.seed}", marks=[] if c in quick else pytest.mark.long)
        for c in every
    ]


@emulation
@pytest.mark.parametrize("case", parity_cases())
def test_parity(case, operators):
    row = testing.check(case)
    assert row.passed, row.failures
    assert operators.sites or 0 in case.shape  # the kernels ran, not the formulas


@emulation
@pytest.mark.parametrize("case", parity_cases())
def test_parity_in_one_launch(case, operators):
    operators.launches_wanted = 1
    if 0 not in case.shape:
        cut_small(operators, case.shape, 1 + case.seed % 4)
    row = testing.check(case)
    assert row.passed, row.failures
    assert any("SinglePass" in kernel for kernel, _ in operators.launches) or 0 in case.shape


CLUSTERS = [  # shape; rows and strips of a block, slices and images of the cluster
    ((2, 12, 19, 5), (4, 1, 1, 1)),  # five bands, the last with three rows
    ((1, 24, 13, 4), (7, 1, 3, 1)),  # two bands x three slices
    ((1, 20, 20, 6), (4, 2, 2, 1)),  # three bands of two strips, two slices of 12 and 8 channels
    ((5, 8, 5, 14), (4, 2, 2, 3)),  # two slices, three images, of which the last cluster has two
    ((3, 36, 7, 7), (7, 1, 1, 3)),  # one block
]


@emulation
@pytest.mark.parametrize(("shape", "cut"), CLUSTERS, ids=str)
def test_parity_of_every_kind_of_cluster(shape, cut, operators):
    operators.launches_wanted, operators.cut = 1, list(cut)
    for dtype, layout, mode in (
        (torch.bfloat16, "channels_last", "train"),
        (torch.float16, "contiguous", "eval"),
    ):
        row = testing.check(Case(NAME, dtype, layout, mode, shape))
        assert row.passed, row.failures


@emulation
@pytest.mark.parametrize(
    "shape", [(1, 48, 56, 56), (1, 56, 28, 28), (1, 112, 14, 14), (2, 220, 7, 7)]
)
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.long
def test_parity_at_real_sizes_as_each_device_cuts_them(name, shape, either):
    """One multiprocessor: cut as for a large batch."""
    either.device = (1, DEVICES[name][1])
    either.cluster = 1 if name == "A100" else 8
    if either.launches_wanted == 1 and not single_pass(either, shape)["rows"]:
        pytest.skip("one launch does not fit")
    for dtype, layout, mode in (
        (torch.bfloat16, "channels_last", "train"),
        (torch.bfloat16, "contiguous", "eval"),
        (torch.float16, "contiguous", "eval"),
    ):
        row = testing.check(Case(NAME, dtype, layout, mode, shape))
        assert row.passed, row.failures


def mixer(c, dtype, **options):
    torch.manual_seed(0)
    return FusedCATM(c, backend=NAME, **options).to(dtype).eval()


@emulation
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
def test_every_schedule_gives_the_same_bits(dtype, either):
    operators = either
    if operators.launches_wanted == 1:
        plan = cut_small(operators, (2, 20, 11, 9), 1)
        assert plan["bands"] > 1
    m, x = mixer(20, dtype), torch.randn(2, 20, 11, 9).to(dtype)
    found = []
    for first in range(3):  # each call takes the next schedule
        operators.schedule = first
        x_train = x.clone().requires_grad_()
        m.train()
        found.append([m(x_train).detach()])
        m.eval()
        with torch.no_grad():
            found[-1].append(m(x))
        m.load_state_dict(mixer(20, dtype).state_dict())
    ran = set(operators.launches)
    assert {s for _, s in ran} == {0, 1, 2}
    kernels_run = {kernel for kernel, _ in ran}
    assert len(kernels_run) == 3 + operators.launches_wanted
    assert len(ran) == 3 * len(kernels_run)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def step(shape, dtype=torch.bfloat16):
    """Output, running statistics and gradients of a training step, which takes every kernel."""
    m = mixer(shape[1], dtype).train()
    torch.manual_seed(1)
    x, grad = torch.randn(2, *shape).to(dtype).unbind()
    x = x.requires_grad_()
    out = m(x)
    out.backward(grad)
    return [out.detach(), x.grad, *m.buffers(), *(p.grad for p in m.parameters())]


@emulation
def test_no_barrier_and_no_wait_can_be_left_out(operators):
    """Each is skipped in turn, in each schedule: an error, or another result."""
    shapes = ((2, 8, 5, 6), (1, 12, 19, 4))  # several images of a block; bands with halos
    expected = [step(shape) for shape in shapes]
    sites = list(operators.sites)
    assert len(sites) >= 8
    unnoticed = []
    for site in sites:
        operators.skip = site
        noticed = False
        for shape, right in zip(shapes, expected, strict=True):
            for first in range(3):
                operators.schedule = first
                try:
                    got = step(shape)
                except RuntimeError as error:
                    noticed |= "never came to" not in str(error)
                else:
                    noticed |= not all(map(torch.equal, got, right))
        unnoticed += [] if noticed else [site]
    assert unnoticed == []


@emulation
def test_no_barrier_of_a_cluster_can_be_left_out(operators):
    """As above, of one launch."""
    operators.launches_wanted = 1

    def outputs():
        found = []
        for shape, cut in CLUSTERS:
            operators.cut = list(cut)
            m, x = mixer(shape[1], torch.bfloat16), torch.randn(shape).bfloat16()
            with torch.no_grad():
                found.append(m(x))
        return found

    def seeded(skip="", first=0):
        torch.manual_seed(2)
        operators.skip, operators.schedule = skip, first
        return outputs()

    expected = seeded()
    sites = [s for s in operators.sites if "single_pass.h" in s]
    assert sum("cluster_sync" in s for s in sites) >= 5
    unnoticed = []
    for site in sites:
        noticed = False
        for first in range(3):
            try:
                got = seeded(site, first)
            except RuntimeError as error:
                noticed |= "never came to" not in str(error)
            else:
                noticed |= not all(map(torch.equal, got, expected))
        unnoticed += [] if noticed else [site]
    assert unnoticed == []


@emulation
def test_two_launches_without_their_buffers_are_refused(operators):
    """A call lacks them where `launches` changes, in another thread, once it has asked how many."""
    call = operators.call((1, 8, 4, 4), torch.bfloat16)
    with pytest.raises(RuntimeError, match="expected buffers for two launches"):
        call.mix(0, 0, 0, 0, 0, 0, 0, True)


@emulation
def test_nothing_chooses_it_and_it_says_what_it_cannot(operators):
    x = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)
    assert registry.select(None, Problem("cpu", torch.bfloat16)).name != NAME
    with use_backend(NAME), torch.no_grad():
        FusedCATM(8).bfloat16().eval()(x)
        assert operators.sites
        with pytest.raises(BackendUnavailable, match="it computes bfloat16 and float16"):
            FusedCATM(8).eval()(x.float())


@emulation
def test_nan_of_one_image_stays_there(either):
    m = mixer(8, torch.bfloat16)
    x = torch.randn(3, 8, 4, 4).bfloat16()
    with torch.no_grad():
        right = m(x)
        x[1, 3, 2, 1] = float("nan")
        got = m(x)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], right[[0, 2]])


@emulation
def test_channels_that_fit_nowhere_are_refused(operators):
    m, x = mixer(2400, torch.bfloat16), torch.randn(1, 2400, 1, 1).bfloat16()
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="does not fit into the device's shared"),
    ):
        m(x)


def call_of(name, *shape):
    return build.module().MixerCall(
        list(shape), False, *DEVICES[name], 8, [0] * 4, 0, 0, True, "", []
    )


@emulation
@pytest.mark.parametrize("name", DEVICES)
def test_what_the_backend_does_not_refuse_fits(name, gpu):
    cuda._shared_memory.cache_clear()
    gpu(optin=DEVICES[name][1])
    largest = max(c for c in range(4, 6000, 4) if cuda._too_large(c, (0,)) is None)
    for height, width in ((1, 1), (5, 19), (56, 56), (3, 2000)):
        assert all(call_of(name, 1, largest, height, width).parts())


@emulation
def test_more_images_than_a_launch_takes(either):
    """A grid's y has 65535 blocks; here 2."""
    operators = either
    shape = (9, 8, 12, 10)
    operators.device = (1, 101376)
    expected = step(shape)
    before = len(operators.launches)
    build.module().set_most_groups(2)
    try:
        operators.launches.clear()
        got = step(shape)
    finally:
        build.module().set_most_groups(65535)
    assert len(operators.launches) > before
    assert all(map(torch.equal, got, expected))


@emulation
def test_statistics_of_nan_are_nan(operators):
    m, x = mixer(8, torch.bfloat16).train(), torch.randn(3, 8, 4, 4).bfloat16()
    x[1, 3, 2, 1] = float("nan")
    with torch.no_grad():
        m(x)
    for name, buffer in m.named_buffers():
        assert buffer.isnan().all() or "num_batches" in name, name


@emulation
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 5e-5), (torch.float16, 5e-6)], ids=str
)
def test_spatial_gates_lose_nothing_to_rounded_taps(dtype, most, operators):
    """Of float32 weights both words count: one alone would be off by a thousandth."""
    c, shape = 12, (1, 12, 9, 8)
    m = FusedCATM(c).double()
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.copy_(torch.randn_like(parameter).float())
    m.eval()
    rows = torch.randn(1, 72, 3 * c).to(dtype)
    w = Structure(copy.deepcopy(m).float(), m._roles, m._inner).weights()
    statistics = torch.stack([torch.zeros(c), torch.ones(c)]).expand(2, 2, c).contiguous()
    packed = operators.pack(w, statistics, (m.oper_q[0].block[1].eps,) * 2, dtype)
    found = operators.mix(rows, packed, shape, True).spatial
    maps = rows.double().view(1, 9, 8, 3, c).permute(3, 0, 4, 1, 2)
    for z, gate in enumerate((m.oper_q, m.oper_k)):
        expected = gate[0].block(maps[z])
        assert (found[:, z : z + 1].double() - expected).abs().max() <= most


@emulation
@pytest.mark.parametrize("steps", range(-2, 3))
def test_divisors_divide(steps):
    """Also where a GPU's reciprocal is off in its last place."""
    assert build.module().first_wrong_quotient(steps) == (0, 0)


@emulation
@pytest.mark.parametrize("name", DEVICES)
def test_plans_cover_the_maps_and_fit(name):
    multiprocessors, shared = DEVICES[name]
    shapes = [c.shape for batch in (1, 256) for c in testing.real_cases("reference", batch)]
    for shape in dict.fromkeys([*shapes, (1, 3, 1, 1), (7, 1, 501, 3), (1, 4, 3, 2000)]):
        b, c, height, width = shape
        call = build.module().MixerCall(
            list(shape), False, multiprocessors, shared, 8, [0] * 4, 0, 0, True, "", []
        )
        for i, plan in enumerate(call.plans()):
            if plan["rows"] == 0:  # none: the backward's tiles have the whole width
                assert width > 200 or i == 6  # in one launch a cluster has a whole map
                continue
            assert plan["shared"] <= shared
            assert plan["bands"] * plan["strips"] * plan["rows"] >= height
            assert plan["columns"] * plan["pairs"] * 2 >= width
            assert plan["halo"] == (plan["bands"] > 1)
            assert plan["images"] <= b
            assert plan["chunks"] < 2 * -(-c // 4)


@emulation
@pytest.mark.parametrize(
    ("shape", "most"),
    [
        ((1, 48, 56, 56), 7.1),
        ((1, 56, 28, 28), 6.3),
        ((1, 112, 14, 14), 6.3),
        ((2, 220, 7, 7), 6.3),
    ],
)
def test_bytes_that_gates_and_combine_ask_for(shape, most, operators):
    """In units of the maps: q and k twice, v and out once are 6; at 56x56 bands read their halos."""
    operators.device = (1, DEVICES["H100"][1])
    with torch.no_grad():
        mixer(shape[1], torch.bfloat16).train()(torch.randn(shape).bfloat16())
    found = dict(operators.traffic)
    unit = 2 * torch.Size(shape).numel()
    moved = sum(
        read + written
        for launch in ("GatesArguments", "CombineArguments")
        for name, read, written in found[launch]
        if name in ("qkv", "out")
    )
    assert 6 <= moved / unit <= most


@emulation
@pytest.mark.parametrize(
    "shape", [(1, 48, 56, 56), (1, 56, 28, 28), (1, 112, 14, 14), (4, 220, 7, 7)], ids=str
)
def test_one_launch_reads_q_k_and_v_once_and_writes_out_once(shape, operators):
    operators.device = (1, DEVICES["H100"][1])
    operators.launches_wanted = 1
    with torch.no_grad():
        mixer(shape[1], torch.bfloat16)(torch.randn(shape).bfloat16())
    found = dict(operators.traffic)["SinglePassArguments"]
    moved = {name: (read, written) for name, read, written in found}
    unit = 2 * torch.Size(shape).numel()
    assert moved["qkv"] == (3 * unit, 0)
    assert moved["out"] == (0, unit)
    assert moved["sums"] == (0, 0)


def test_the_products_rows_are_filled_up_with_zeros():
    m = FusedCATM(6, attn_bias=True)
    w = Structure(m, m._roles, m._inner).weights()
    weight, bias = padded_product(w, torch.bfloat16)
    assert weight.shape == (24, 6)
    assert bias.shape == (24,)
    given = m.qkv.weight.flatten(1).bfloat16()
    for part in range(3):
        assert torch.equal(weight[8 * part :][:6], given[6 * part :][:6])
        assert not weight[8 * part + 6 :][:2].any()
        assert not bias[8 * part + 6 :][:2].any()


@emulation
@pytest.mark.parametrize("shape", [(1, 3, 9, 4), (2, 6, 18, 3), (1, 1, 3, 3)], ids=str)
def test_maps_three_times_as_high_as_they_have_channels(shape, operators):
    """Rows of them are no maps of Triton's, which have 3C channels second."""
    row = testing.check(Case(NAME, torch.bfloat16, "contiguous", "train", shape))
    assert row.passed, row.failures


def test_maps_that_triton_took_stay_tritons(monkeypatch):
    """As wide as they have channels of qkv, too."""
    seen = []
    phases = type("Phases", (), {"project_backward": lambda self, *given: seen.append(given)})()
    monkeypatch.setattr(mixer_on_cuda, "_triton", lambda: phases)
    x, grad_qkv = torch.randn(1, 4, 2, 12), torch.randn(1, 12, 2, 12)
    mixer_on_cuda.CudaPhases(None).project_backward(grad_qkv, x, None, (True, True, True))
    assert seen == [(grad_qkv, x, None, (True, True, True))]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)], ids=str)
def test_gradients_of_the_product(size, layout):
    """Maps of fewer and of more pixels than channels."""
    m = FusedCATM(6, attn_bias=True)
    w = Structure(m, m._roles, m._inner).weights()
    x = torch.randn(3, 6, *size).contiguous(memory_format=layout).requires_grad_()
    rows = mixer_on_cuda.product(x, *padded_product(w, torch.float32))
    rows = rows.reshape(3, -1, 24)
    grad = torch.randn_like(rows)
    rows.backward(grad)
    found = mixer_on_cuda.project_backward(grad, x.detach(), w, (True, True, True))
    assert found.x.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found.x, x.grad)
    torch.testing.assert_close(found.qkv_weight, m.qkv.weight.grad.flatten(1))
    torch.testing.assert_close(found.qkv_bias, m.qkv.bias.grad)


@emulation
def test_nan_reaches_every_gradient_that_plain_pytorch_fills_with_it(operators):
    plain = AdditiveTokenMixer(8).bfloat16().train()
    fused = FusedCATM.from_mixer(copy.deepcopy(plain), backend=NAME).train()
    x = torch.randn(2, 8, 6, 6).bfloat16()
    x[0, 0, 2, 2] = torch.nan
    for m in (plain, fused):
        m(x).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(p.grad.isnan(), q.grad.isnan()), name


@emulation
@pytest.mark.parametrize("images", [2, 4])
@pytest.mark.parametrize("where", ["x", "grad"])
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
def test_with_frozen_statistics_nan_stays_in_its_image_of_the_gradient(
    dtype, where, images, operators
):
    x, grad = torch.randn(2, images, 5, 6, 7).to(dtype).unbind()
    expected = gradient_at(x, grad)
    others = [i for i in range(images) if i != 1]
    {"x": x, "grad": grad}[where][1, 0, 2, 2] = torch.nan
    found = gradient_at(x, grad)
    assert found[1].isnan().any()
    assert torch.equal(found[others], expected[others])


def gradient_at(x, grad):
    x = x.clone().requires_grad_()
    mixer(x.shape[1], x.dtype)(x).backward(grad)
    return x.grad


@emulation
@pytest.mark.parametrize(
    "shape",
    [(2, 6, 5, 4), (0, 6, 3, 3), pytest.param((2, 8, 1, 1), marks=pytest.mark.long)],
    ids=str,
)
@pytest.mark.parametrize(
    "layout",
    [pytest.param(torch.contiguous_format, marks=pytest.mark.long), torch.channels_last],
    ids=str,
)
def test_opcheck(shape, layout, operators):
    m = FusedCATM(shape[1], True).bfloat16()
    w = Structure(m, m._roles, m._inner).weights()
    x = torch.randn(shape).bfloat16().contiguous(memory_format=layout).requires_grad_()
    settings = Settings(1e-5, 1e-5, True, True, None, NAME, "")
    op = torch.ops.casvit_kernels
    torch.library.opcheck(op.mix_training, (x, *flatten(w), *settings))
    out, *saved = op.mix_training(x, *flatten(w), *settings)
    q, k = (g._replace(norm_mean=None, norm_var=None) for g in (w.q, w.k))
    flat = flatten(w._replace(q=q, k=k))
    grad = torch.randn_like(out).detach().requires_grad_()
    saved = [t.detach() for t in saved]
    for needed in (
        [t is not None and t.requires_grad for t in (x, *flat)],
        [i in (1, 9) for i in range(1 + len(flat))],
    ):
        torch.library.opcheck(op.mix_backward, (grad, x, *flat, *settings, *saved, needed))


@emulation
@pytest.mark.parametrize("kind", ["expanded", "turned", "float32", "a part"])
def test_incoming_gradients_of_any_strides(kind, operators):
    x = torch.randn(2, 8, 6, 7).bfloat16()
    grad = {
        "expanded": lambda: torch.randn(2, 8, 1, 1).bfloat16().expand(2, 8, 6, 7),
        "turned": lambda: torch.randn(2, 8, 7, 6).bfloat16().mT,
        "float32": lambda: torch.randn(2, 8, 6, 7).bfloat16().float(),
        "a part": lambda: torch.randn(2, 6, 7, 11).bfloat16()[..., 1:9].permute(0, 3, 1, 2),
    }[kind]()
    m = FusedCATM(8).bfloat16()
    w = Structure(m, m._roles, m._inner).weights()
    settings = Settings(1e-5, 1e-5, True, True, torch.bfloat16, NAME, "")
    needed = [True, *(t is not None and t.requires_grad for t in flatten(w))]
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        op = torch.ops.casvit_kernels
        with torch.no_grad():
            _, *saved = op.mix_training(y, *flatten(w), *settings)
            found, expected = (
                op.mix_backward(g, y, *flatten(w), *settings, *saved, needed)
                for g in (grad, grad.bfloat16().contiguous())
            )
        assert all(map(torch.equal, found, expected))


WIDE = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from cuda_emulation import backend as emulated
from casvit_kernels import testing
from casvit_kernels.testing.cases import Case
operators = emulated.register()
cases = [
    Case(emulated.NAME, torch.bfloat16, layout, mode, (1, 3, 2, 601))
    for layout, mode in (("contiguous", "train"), ("channels_last", "frozen"))
]
assert not operators.backward_fits(torch.empty(0), (1, 3, 2, 601))
print(json.dumps([[str(c), testing.check(c).failures] for c in cases]))
"""


@emulation
@pytest.mark.long
def test_maps_too_wide_for_the_backward_take_tritons():
    """Both on the CPU: the forward emulated, the backward interpreted."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WIDE.format(tests=str(HERE))],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(HERE.parent),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2
    assert [row for row in found if row[1]] == []


# What the backend says of itself.


class Library:
    """Stands for a native library with CUDA kernels."""

    def __init__(self, names=b"sm_80,sm_90a,sm_100,sm_120,compute_80", driver=13000, streams=1):
        answers = {
            "plan": b"[]",
            "architectures": names,
            "version": b"13.0",
            "driver": driver,
            "runtime": 13000,
        }
        answers["streams"] = streams
        for name, value in answers.items():
            setattr(self, f"casvit_cuda_{name}", _Answer(value))


class _Answer:
    def __init__(self, value):
        self.value = value

    def __call__(self):
        return self.value


@pytest.fixture
def gpu(monkeypatch):
    """Sets what is there: `gpu(capability=(9, 0), library=Library())`."""

    def set_up(capability=(9, 0), library=None, optin=232448):
        library = library or Library()
        monkeypatch.setattr(native, "load", lambda: (library, None))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
        properties = type("Properties", (), {"shared_memory_per_block_optin": optin})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)

    return set_up


@pytest.mark.parametrize(
    ("set_up", "problem", "reason"),
    [
        ({}, None, None),
        ({}, Problem("cuda", torch.bfloat16, 220), None),
        ({}, Problem("cuda", torch.float16), None),
        ({}, Problem("cuda", torch.float32), "bfloat16 and float16, not torch.float32"),
        ({}, Problem("cpu", torch.float16), "the tensors are on 'cpu'"),
        ({"capability": None}, None, "no GPU that this PyTorch can use"),
        ({"capability": (7, 5)}, None, r"8.0 or later, the newest here, a GPU \(cuda:0\), has 7.5"),
        (
            {"capability": (11, 0), "library": Library(b"sm_80,sm_90a")},
            None,
            "built for sm_80, sm_90a",
        ),
        ({"library": Library(driver=12080)}, None, "CUDA 13.0, the driver serves up to 12.8"),
        ({"library": Library(streams=0)}, None, "does not find the current CUDA stream"),
        ({"library": object()}, None, "built without CUDA kernels: no nvcc was found"),
        ({}, Problem("cuda", torch.float16, 6000), "6000 channels .* a block may have 232,448"),
    ],
)
def test_reasons(set_up, problem, reason, gpu):
    cuda._device.cache_clear()
    cuda._shared_memory.cache_clear()
    gpu(**set_up)
    got = get("cuda").why_not(problem)
    cuda._device.cache_clear()
    cuda._shared_memory.cache_clear()
    if reason is None:
        assert got is None
    else:
        assert re.search(reason, got or ""), got


def test_of_several_gpus_the_tensors_own_counts(gpu, monkeypatch):
    cuda._device.cache_clear()
    gpu()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (7, 5))[i])
    why = get("cuda").why_not
    assert why() is None
    assert why(Problem("cuda", torch.bfloat16, 48, 0)) is None
    assert "8.0 or later, a GPU (cuda:1), has 7.5" in why(Problem("cuda", torch.bfloat16, 48, 1))
    cuda._device.cache_clear()


@pytest.mark.parametrize(
    ("names", "capability", "runs"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100"], (10, 3), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100"], (12, 0), False),
        (["compute_80"], (12, 1), True),
        (["compute_90a"], (12, 1), False),
        (["compute_120"], (10, 0), False),
    ],
)
def test_which_machine_code_runs_where(names, capability, runs):
    assert cuda.serves(names, *capability) is runs


@pytest.mark.skipif(cuda.build() is None, reason="the library has no CUDA kernels ('make cuda')")
def test_launches_are_asked_for_and_then_planned_again():
    def taken():
        kernels_of = plans.plan((256, 48, 56, 56), plans.DEVICES["sm_90"])
        return {p["kernel"] for p in kernels_of if p.get("chosen")} & {"gates", "single_pass"}

    planned = taken()
    for count, kernel in ((1, "single_pass"), (2, "gates")):
        with cuda.launches(count):
            assert taken() == {kernel}
    assert taken() == planned
    with (
        pytest.raises(ValueError, match="count: expected 1 or 2 launches, got 3"),
        cuda.launches(3),
    ):
        pass


def test_it_stands_before_triton_for_half_precision():
    names = [status.name for status in backends()]
    assert names.index("cuda") < names.index("triton")


@pytest.mark.skipif(cuda.build() is None, reason="the library has no CUDA kernels ('make cuda')")
def test_the_library_loads_without_a_gpu():
    assert "sm_80" in cuda.build()
    # Of torch's CUDA builds, which Python loads with RTLD_LOCAL; without a GPU, too.
    assert bool(native.load()[0].casvit_cuda_streams()) == (torch.version.cuda is not None)
    if not torch.cuda.is_available():
        assert "no GPU" in get("cuda").why_not()
        with pytest.raises(BackendUnavailable, match="the tensors are on 'cpu'"):
            FusedCATM(8, backend="cuda").bfloat16().eval()(torch.randn(1, 8, 4, 4).bfloat16())
