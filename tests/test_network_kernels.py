"""The native kernels of a whole network against its formula: every instruction set, layout, size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import require_native, using_instruction_set
from network_plans import PLANS, outputs, random_weights

from casvit_kernels.backends.cpu import instruction_sets
from casvit_kernels.ops.network import cpu, reference
from casvit_kernels.ops.network.kernels import (
    MOST_CHANNELS,
    MOST_HIDDEN,
    MOST_SIDE,
    MOST_STAGES,
)
from casvit_kernels.ops.network.plan import LOGITS, Plan, Stage
from casvit_kernels.testing.numerics import errors_of, judge

SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
TESTS = Path(__file__).parent


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Each one in turn that this CPU has."""
    with using_instruction_set(request.param):
        yield request.param


class Native:
    """A plan packed for the instruction set in use."""

    def __init__(self, plan, weights, precision=0):
        self.plan, self.ints, self.precision = plan, plan.to_ints(), precision
        self.kernels = cpu.kernels()
        self.packed = self.kernels.pack(weights, self.ints, precision)

    def scratch(self, x, threads):
        size = (x.shape[0], *x.shape[2:])
        count = self.kernels.scratch(self.ints, size, self.precision, threads)
        return torch.full((count,), 255, dtype=torch.uint8)  # NaN, whatever is read as a float

    def __call__(self, x, threads=1, scratch=None, channels_last=False):
        scratch = self.scratch(x, threads) if scratch is None else scratch
        outs = outputs(self.plan, x, channels_last=channels_last)
        self.kernels.infer(x, self.packed, self.ints, self.precision, threads, scratch, outs)
        return outs


def images(plan, *size):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(size[0], plan.in_chans, *size[1:], generator=generator)
    return x if plan.normalized else 2 * x - 1


def assert_near(got, x, weights, plan):
    """The rule of the parity suite: at most twice PyTorch's own errors."""
    wide = x.double() if x.is_floating_point() else x
    truth = reference.compute(wide, weights.double(), plan)
    own = reference.compute(x, weights, plan)
    failures = [
        failure
        for i, (value, exact, plain) in enumerate(zip(got, truth, own, strict=True))
        for failure in judge(
            f"output {i}", value, exact, [errors_of(plain, exact)], torch.float32, exact.shape[1]
        ).failures
    ]
    assert not failures, failures


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "size",
    [
        (1, 32, 32),
        (2, 45, 67),
        pytest.param((3, 96, 33), marks=pytest.mark.long),
        pytest.param((1, 224, 160), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_equals_the_formula(instruction_set, name, size):
    plan = PLANS[name]
    weights = random_weights(plan)
    run = Native(plan, weights)
    x = images(plan, *size)
    for threads in (1, 2):
        assert_near(run(x, threads), x, weights, plan)


@pytest.mark.parametrize("name", PLANS)
def test_bf16_is_near(instruction_set, name):
    if not cpu.has_precision("bf16"):
        pytest.skip(f"{instruction_set}: no bf16")
    plan = PLANS[name]
    weights = random_weights(plan)
    x = images(plan, 2, 70, 53)
    got = Native(plan, weights, 1)(x, 2)
    for value, exact in zip(
        got, reference.compute(x.double(), weights.double(), plan), strict=True
    ):
        assert (value - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["maps", "logits"])
def test_every_layout_of_input_and_output(instruction_set, name):
    """Channels last, a cut out of a larger map, flipped strides' copies: the same bits."""
    plan = PLANS[name]
    run = Native(plan, random_weights(plan))
    x = images(plan, 2, 41, 58)
    expected = run(x)
    large = torch.full((2, plan.in_chans + 2, 50, 70), float("nan"))
    large[:, 1:-1, 3:44, 5:63] = x
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        large[:, 1:-1, 3:44, 5:63],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.flip(0).flip(0),
    ):
        for last in (False, True):
            for value, wanted in zip(run(other, channels_last=last), expected, strict=True):
                assert torch.equal(value, wanted)


def test_bytes_are_images_of_0_to_1(instruction_set):
    plan = PLANS["normalized"]
    weights = random_weights(plan)
    run = Native(plan, weights)
    x = torch.randint(0, 256, (2, 3, 47, 64), dtype=torch.uint8)
    assert_near(run(x), x, weights, plan)
    for layout in (x.contiguous(memory_format=torch.channels_last), x[:, :, ::1, :]):
        assert torch.equal(run(layout)[0], run(x)[0])


@pytest.mark.parametrize("precision", [0, 1])
@pytest.mark.parametrize(
    "size",
    [
        (5, 45, 66),  # small maps: images of a thread go together
        (3, 104, 125),  # the first stage image by image, the second together
        pytest.param((3, 170, 182), marks=pytest.mark.long),  # image by image
    ],
    ids=str,
)
def test_results_depend_on_nothing_but_the_image(instruction_set, precision, size):
    """Not on threads, on the rest of the batch, nor on what the scratch holds from before."""
    if precision and not cpu.has_precision("bf16"):
        pytest.skip(f"{instruction_set}: no bf16")
    plan = PLANS["map"]
    run = Native(plan, random_weights(plan), precision)
    x = images(plan, *size)
    alone = [run(image[None]) for image in x]
    for threads in (1, 2, 3, 7):
        scratch = run.scratch(x, threads)
        for _ in range(2):  # the second call finds what the first one left
            for value, *each in zip(run(x, threads, scratch), *alone, strict=True):
                assert torch.equal(value, torch.cat(each))


def test_a_larger_scratch_of_another_size_serves(instruction_set):
    """A network keeps one piece of scratch for calls of all sizes."""
    plan = PLANS["logits"]
    run = Native(plan, random_weights(plan))
    large, small = images(plan, 3, 96, 96), images(plan, 1, 64, 33)
    scratch = run.scratch(large, 2)
    for x in (large, small, large, small[:, :, :, :32], large):
        assert torch.equal(run(x, 2, scratch)[0], run(x, 1)[0])


def test_nan_stays_in_its_image(instruction_set):
    plan = PLANS["logits"]
    run = Native(plan, random_weights(plan))
    x = images(plan, 3, 64, 64)
    clean = run(x)[0]
    x[1, 0, 5, 5] = float("nan")
    for threads in (1, 2):
        got = run(x, threads)[0]
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], clean[[0, 2]])


def test_deep_sums_keep_their_digits():
    """Errors grow with the depth of the sums, not with the number of layers' widths: t's widths."""
    require_native()
    plan = Plan(3, 48, False, (Stage(96, (), False), Stage(512, (2048,), False)), LOGITS, 100)
    weights = random_weights(plan) * 0.3
    x = images(plan, 1, 32, 32)
    assert_near(Native(plan, weights)(x, 2), x, weights, plan)


@pytest.mark.parametrize("isa", SETS)
def test_no_access_outside_of_the_arrays(isa):
    """Between pages without access, once up to the front and once up to the back of each array."""
    require_native()
    reason = instruction_sets().get(isa, "not in this build")
    if reason is not None:
        pytest.skip(f"{isa}: {reason}")
    done = subprocess.run(
        [sys.executable, str(TESTS / "guarded_network.py")],
        env={
            **os.environ,
            "CASVIT_KERNELS_CPU_ISA": isa,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.strip() == "ok"


def test_a_forked_child_computes():
    """The threads of the parent are not there any more; PyTorch's own operations would wait for them."""
    require_native()
    plan = PLANS["logits"]
    run = Native(plan, random_weights(plan))
    x = images(plan, 1, 64, 64)
    expected = run(x, 2)[0]
    scratch, outs = run.scratch(x, 2), outputs(plan, x)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        run.kernels.infer(x, run.packed, run.ints, 0, 2, scratch, outs)
        os.write(write, b"done")
        os.write(write, bytes(outs[0].untyped_storage()))
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        assert file.read() == b"done" + bytes(expected.untyped_storage())
    os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("name", "most", "plan"),
    [
        ("channels", MOST_CHANNELS, lambda n: Plan(1, 1, False, (Stage(n, (), False),), LOGITS, 1)),
        ("in_chans", MOST_CHANNELS, lambda n: Plan(n, 1, False, (Stage(1, (), False),), LOGITS, 1)),
        ("hidden", MOST_HIDDEN, lambda n: Plan(1, 1, False, (Stage(1, (n,), False),), LOGITS, 1)),
        ("stages", MOST_STAGES, lambda n: Plan(1, 1, False, (Stage(1, (), False),) * n, LOGITS, 1)),
    ],
)
def test_the_most_that_python_names_is_what_the_kernels_take(name, most, plan):
    require_native()
    at_most = plan(most)
    cpu.kernels().pack(random_weights(at_most), at_most.to_ints(), 0)
    more = plan(most + 1)
    with pytest.raises(RuntimeError, match=f"{name}: expected 1 to {most}, got {most + 1}"):
        cpu.kernels().pack(random_weights(more), more.to_ints(), 0)


def test_the_longest_side_that_python_names_is_what_the_kernels_take():
    require_native()
    plan = Plan(1, 1, False, (Stage(1, (), False),), LOGITS, 1)
    run = Native(plan, random_weights(plan))
    assert run(images(plan, 1, 32, MOST_SIDE))[0].isfinite().all()
    with pytest.raises(RuntimeError, match=f"1 to {MOST_SIDE} rows and columns"):
        run(images(plan, 1, 32, MOST_SIDE + 1))


def test_what_is_no_plan_is_refused():
    require_native()
    plan = PLANS["logits"]
    weights = random_weights(plan)
    kernels, ints = cpu.kernels(), plan.to_ints()
    with pytest.raises(RuntimeError, match=f"expected {plan.weight_count()} for the plan, got 7"):
        kernels.pack(weights[:7], ints, 0)
    for bad, text in (
        (ints[:5], "ends before"),
        ([*ints, 1], "longer than a plan"),
        ([0, *ints[1:]], "in_chans: expected 1 to"),
        ([*ints[:3], 9, *ints[4:]], "stages: expected 1 to 8, got 9"),
    ):
        with pytest.raises(RuntimeError, match=text):
            kernels.pack(weights, bad, 0)
    packed = kernels.pack(weights, ints, 0)
    x = images(plan, 1, 32, 32)
    scratch = torch.empty(kernels.scratch(ints, (1, 32, 32), 0, 1), dtype=torch.uint8)
    good = {"x": x, "packed": packed, "scratch": scratch, "outs": outputs(plan, x)}
    for name, value, text in (
        ("x", x[:, :2], "expected 3 channels, got 2"),
        ("x", x.double(), "expected float32"),
        ("x", (x * 9).to(torch.uint8), "expected float32"),
        ("packed", packed[:-64].clone(), "packed: expected weights packed for the plan"),
        ("packed", torch.zeros_like(packed), "packed: expected weights packed for the plan"),
        ("scratch", scratch[1:], "scratch: expected at least"),
        ("outs", [], "outs: expected 1, got 0"),
        ("outs", [torch.empty(1, 36)], "outs: expected 37"),
        ("outs", [torch.empty(1, 37, dtype=torch.float64)], "outs: expected float32"),
        ("outs", [torch.empty(1, 74)[:, ::2]], "outs: expected dense"),
    ):
        given = {**good, name: value}
        with pytest.raises(RuntimeError, match=text):
            kernels.infer(given["x"], given["packed"], ints, 0, 1, given["scratch"], given["outs"])
