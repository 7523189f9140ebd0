"""The CUDA planner over thousands of shapes on every device: cuts fit, cover the maps, and cost what is
sensible; where there is none, none fits."""

import functools
import random

import pytest

from casvit_kernels.backends import cuda
from casvit_kernels.ops.mixer.plans import DEVICES, plan

pytestmark = pytest.mark.skipif(
    cuda.build() is None, reason="the library has no CUDA kernels ('make cuda')"
)
# Blocks for q and for k, or for both at once.
GATES = {
    "gates": 2,
    "statistics": 2,
    "combine": 1,
    "backward_combine": 1,
    "backward_gate": 2,
    "backward_depthwise": 2,
}
WHOLE_WIDTH = ("backward_combine", "backward_depthwise")
ALL_CHANNELS = ("gates", "backward_gate")
MOST = (
    2**31 - 1,
    65535,
)  # blocks of a grid: in x, and in y and z each; images go in launches apart
NAMES = list(DEVICES)


@functools.cache
def shapes():
    """Edges, and between them as many small sizes as large ones."""
    edges = [
        (b, c, height, width)
        for b in (1, 4096)
        for c in (1, 3, 4, 5, 48, 220, 1021, 2048)
        for height in (1, 4, 8, 9, 56, 512)
        for width in (1, 2, 15, 16, 57, 512)
    ]
    chance = random.Random(0)

    def size(most):
        return int((most + 1) ** chance.random())

    return [*edges, *((size(4096), size(2048), size(512), size(512)) for _ in range(2000))]


def plans(shape, name):
    """By kernel."""
    return {p["kernel"]: p for p in plan(shape, DEVICES[name])}


def up(a, b):
    return -(-a // b)


@pytest.mark.parametrize("name", NAMES)
def test_cuts_fit_and_cover_the_maps(name):
    device = DEVICES[name]
    for shape in shapes():
        b, c, height, width = shape
        found = plans(shape, name)
        assert found.keys() >= GATES.keys()
        for kernel, gates in GATES.items():
            p = found[kernel]
            if "reason" in p:
                assert set(p) == {"kernel", "reason"}, (shape, p)
                continue
            assert 0 < p["shared_bytes"] <= device.shared_per_block, (shape, p)
            assert 1 <= p["images"] <= b, (shape, p)
            assert 1 <= p["channels"] <= up(c, 4) * 4, (shape, p)
            assert p["rows"] % p["sweep_rows"] == 0, (shape, p)
            assert p["halo"] == (p["rows"] < height), (shape, p)
            assert p["columns"] <= width + 1, (shape, p)
            assert kernel not in WHOLE_WIDTH or p["columns"] >= width, (shape, p)
            assert kernel not in ALL_CHANNELS or p["channels"] >= c, (shape, p)
            x = up(height, p["rows"]) * up(width, p["columns"])
            z = gates * up(c, p["channels"])
            assert x <= MOST[0], (shape, p)
            assert z <= MOST[1], (shape, p)
            # As many as cover all of it, once.
            assert p["blocks"] == x * z * up(b, p["images"]), (shape, p)
            assert p["warp_instructions"] > 0, (shape, p)


@pytest.mark.parametrize("name", NAMES)
def test_one_launch_or_two(name):
    """One where a cluster holds an image and the planner expects it to be faster; never neither."""
    device = DEVICES[name]
    taken = set()
    for shape in shapes():
        b, c, height, width = shape
        found = plans(shape, name)
        p, gates, combine = found["single_pass"], found["gates"], found["combine"]
        single = "reason" not in p and p["chosen"]
        taken.add(single)
        for other in (gates, combine):
            assert "reason" in other or other["chosen"] is not single, (shape, p)
        if "reason" in p:
            continue
        assert 0 < p["shared_bytes"] <= device.shared_per_block, (shape, p)
        assert 1 <= p["cluster"] <= device.cluster, (shape, p)
        assert p["cluster"] == up(height, p["rows"]) * up(c, p["channels"]), (shape, p)
        assert p["blocks"] == p["cluster"] * up(b, p["images"]), (shape, p)
        assert p["images"] == 1 or not p["halo"], (shape, p)
        assert p["columns"] >= width, (shape, p)
    assert taken == {True, False}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_whose_tiles_have_more_than_32_bits(name):
    device = DEVICES[name]
    for shape in (
        (1, 4, 1, 2**29),
        (1, 4, 1, 2**30),
        (1, 8, 1, 2**28),
        (1, 32, 4, 2**28),
        (1, 4, 2**30, 1),
        (2**30, 4, 1, 1),
        (1, 2**20, 1, 1),
        (1, 2**28, 1, 1),
    ):
        found = plans(shape, name)
        for p in found.values():
            if "reason" not in p:
                assert 0 < p["shared_bytes"] <= device.shared_per_block, (shape, p)
                assert p["blocks"] > 0, (shape, p)
                assert p["warp_instructions"] > 0, (shape, p)
        if 4 * shape[1] * shape[3] > device.cluster * device.shared_per_block:  # a row of q and k
            assert "reason" in found["single_pass"], (shape, found)


def test_a_shape_has_one_plan():
    """Also when what was looked up before is forgotten: it is, past 4096 shapes."""
    some = shapes()[:: len(shapes()) // 50]
    first = [plan(shape, DEVICES[name]) for shape in some for name in NAMES]
    for shape in shapes():
        for name in NAMES:
            plan(shape, DEVICES[name])
    assert [plan(shape, DEVICES[name]) for shape in some for name in NAMES] == first


@pytest.mark.parametrize("name", NAMES)
def test_there_is_no_cut_only_where_the_smallest_tile_does_not_fit(name):
    """What a block keeps for each value of its tiles; what else there is are some KB."""
    most = 0.9 * DEVICES[name].shared_per_block
    for shape in shapes():
        _, c, height, width = shape
        found = plans(shape, name)
        rows = 4 if height <= 4 else 8  # of a block: one strip, or two
        inner = (rows + 2) * (width + 2)
        outer = (rows + (2 if height <= rows else 4)) * (width + 4)
        sums = width * 16 * 4  # of columns: in the place of a tile where that is large enough
        least = {  # four channels of the whole width; or all channels of two pixels across
            "backward_combine": (2 * outer + 2 * inner) * 4 * 2 + sums * (sums > inner * 4 * 2),
            "backward_depthwise": (outer + inner) * 4 * 2 + inner * 4,
            "backward_gate": 6 * 4 * up(c, 4) * 4 * 2 + 3 * up(c, 4) * 4 * 4,
        }
        for kernel in GATES:
            if "reason" in found[kernel]:
                assert "shared memory" in found[kernel]["reason"], (shape, kernel)
                assert least.get(kernel, 0) > most, (shape, kernel)


@pytest.mark.parametrize("name", NAMES)
def test_what_fits_still_does_with_fewer_channels_and_narrower(name):
    for height in (1, 7, 56, 512):
        for width in (1, 14, 200, 300, 400, 512):
            told = [plans((2, c, height, width), name) for c in (*range(1, 2049, 89), 2048)]
            for kernel in GATES:
                fits = ["reason" not in p[kernel] for p in told]
                assert fits == sorted(fits, reverse=True), (kernel, height, width)
                assert kernel not in WHOLE_WIDTH or len(set(fits)) == 1, (kernel, height, width)
        for c in (1, 48, 2048):
            told = [plans((2, c, height, width), name) for width in (*range(1, 513, 13), 512)]
            for kernel in GATES:
                fits = ["reason" not in p[kernel] for p in told]
                assert fits == sorted(fits, reverse=True), (kernel, c, height)


def cheaper_when_doubled(name, counts):
    """Of the launches that `counts` takes."""
    found = []
    for shape in shapes():
        once, twice = plans(shape, name), plans((2 * shape[0], *shape[1:]), name)
        for kernel in GATES:
            p, q = once[kernel], twice[kernel]
            if "reason" in p or "reason" in q or not counts(p):
                continue
            if q["warp_instructions"] < p["warp_instructions"]:
                found.append((shape, p, q))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_twice_the_images_are_never_cheaper_where_launches_fill_the_device(name):
    """Two blocks for each multiprocessor."""
    device = DEVICES[name]
    assert cheaper_when_doubled(name, lambda p: p["blocks"] >= 2 * device.multiprocessors) == []


@pytest.mark.parametrize("name", NAMES)
def test_twice_the_images_are_never_cheaper(name):
    assert cheaper_when_doubled(name, lambda p: True) == []
