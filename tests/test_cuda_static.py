"""The committed table of the CUDA kernels' machine code: is it of these sources, does it hold what it
should, and is what it counts with right."""

import copy
import json
import sys

import pytest
import torch
from cuda_emulation import backend as emulated
from cuda_emulation import build
from cuda_static import bench, counts, single_pass, tables, work

from casvit_kernels import FusedCATM, testing
from casvit_kernels.ops.mixer import kernels

emulation = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture(scope="module")
def document():
    return json.loads(bench.RESULTS.read_text())


def numbers(document):
    return tables.Numbers(document, bench.TARGETS, bench.STAGES, bench.BATCH)


def test_the_committed_table_is_of_these_sources(document):
    assert document["source"] == bench.source_hash(), "run python bench/static/cuda_kernels.py"
    assert bench.TABLE.read_text() == bench.text(document)
    wanted = {
        (target, dtype, shape.channels, kernel)
        for target in bench.TARGETS
        for dtype, shape in bench.shapes(target)
        for kernel in counts.KERNELS
    }
    found = [(r["target"], r["dtype"], r["channels"], r["kernel"]) for r in document["rows"]]
    assert len(found) == len(set(found))
    assert set(found) <= wanted
    # A cluster may not hold an image.
    assert {kernel for *_, kernel in wanted - set(found)} <= {"single_pass"}
    assert all(key in found for key in wanted if key[0] == tables.JUDGED)


def test_check_fails_for_other_sources_and_another_table(monkeypatch, tmp_path):
    assert bench.main(["--check"]) == 0
    table = tmp_path / "table.md"
    table.write_text(
        bench.TABLE.read_text().replace("missed", "met", 1).replace("| 48 |", "| 47 |")
    )
    monkeypatch.setattr(bench, "TABLE", table)
    assert bench.main(["--check"]) == 1
    monkeypatch.undo()
    for name in ("gates.h", "mixer.cu", "toolkit.txt"):
        (tmp_path / name).write_text((bench.SOURCES / name).read_text())
    monkeypatch.setattr(bench, "SOURCES", tmp_path)
    before = bench.source_hash()
    (tmp_path / "gates.h").write_text(f"// A comment.\n\n{(tmp_path / 'gates.h').read_text()}")
    assert bench.source_hash() == before
    (tmp_path / "gates.h").write_text((tmp_path / "gates.h").read_text() + "int x;\n")
    assert bench.source_hash() != before
    assert bench.main(["--check"]) == 1


def test_no_spills_and_no_barrier_where_tensor_cores_work(document):
    for row in document["rows"]:
        assert row["spilled"] == 0, row
        assert tables.barriers_with_mma(row) == 0, row
        shared = bench.TARGETS[row["target"]].shared
        plan = work.Plan(*row["plan"])
        assert plan.shared <= shared, row
        assert counts.blocks_together(row["registers"], plan.shared, shared, 1536) >= 1, row
        # Of loops with a barrier there is one, beside that with mma.
        barriers = {p[0]: p[6] for p in row["phases"] if p[6]}
        assert barriers == ({"turns": 1} if row["kernel"] == "single_pass" else {}), row


def test_verdicts_follow_from_the_numbers(document):
    """The same table with fewer and with more of everything."""

    def verdicts(factor, barriers):
        changed = copy.deepcopy(document)
        for row in changed["rows"]:
            row["loops"] = {name: n * factor for name, n in row["loops"].items()}
            for key in ("straight", "mma", "maps"):
                row[key] *= factor
            row["spilled"] = barriers
            row["phases"] = [[*p[:6], barriers, *p[7:]] for p in row["phases"]]
        return [met for *_, met in numbers(changed).goals()], bench.text(changed)

    few, text = verdicts(0.1, 0)
    assert all(few)
    assert "missed" not in text
    many, text = verdicts(10.0, 4)
    assert not any(many)
    assert "| met |" not in text


@emulation
def test_rows_are_of_the_plans_that_the_library_makes(document):
    for shape in numbers(document).shapes:
        for target in bench.TARGETS:
            rows = [
                r
                for r in document["rows"]
                if (r["channels"], r["target"]) == (shape.channels, target)
            ]
            plans, one_launch = bench.plans(shape, target)
            assert {r["kernel"] for r in rows} == plans.keys()
            for row in rows:
                assert row["plan"] == list(plans[row["kernel"]]), row
            forward = {r["kernel"] for r in rows if r["chosen"]} & {*bench.FORWARD}
            assert forward == ({"single_pass"} if one_launch else {"gates", "combine"})


@emulation
def test_devices_without_clusters_take_no_launch_of_them():
    shape = work.Shape(256, 48, 56, 56)
    assert "single_pass" not in bench.plans(shape, "sm_80")[0]
    assert bench.plans(shape, "sm_90a")[0]["single_pass"].bands > 1


def test_what_blocks_do_covers_the_maps(document):
    """Pieces of work times what each makes: all outputs, and not much more, of halos and edges."""
    shapes = {s.channels: s for s in numbers(document).shapes}
    granules, mma = 32 * 4, 16 * 8  # of a warp's granules; positions or units x pixels and channels
    walks = ("copy", "copy q", "copy k", "copy v", "copy gradient", "store", "make a")
    makes = dict.fromkeys(walks, granules)
    makes |= {"sweep u": mma / 3, "sweep out": mma / 3, "sweep": mma / 6, "pooled sums": mma}
    makes |= {"sweep l, gu": mma / 6, "sweep ga": mma / 3, "sweep gd": mma / 6, "sweep gz": mma / 3}
    for row in document["rows"]:
        shape, plan = shapes[row["channels"]], work.Plan(*row["plan"])
        launch, kernel = work.Launch(shape, plan, 1), counts.KERNELS[row["kernel"]]
        done, alone = dict.fromkeys(row["loops"], 0), dict.fromkeys(row["loops"], 0)
        for chunks in plan.slices(shape):
            for name, n in kernel.rounds(launch, chunks).items():
                done[name] += n.items * plan.blocks(shape)
                alone[name] += n.other * plan.blocks(shape)  # rows one by one
        both = row["kernel"] == "backward_combine"  # convolutions' taps
        own = makes | {"taps": mma / 6 if both else mma / 3}
        # A pixel's sigmoid, and its sum over chunks.
        own["pixels"] = 32 * (4 if row["kernel"] == "backward_gate" else shape.channels)
        if row["kernel"] == "single_pass":  # whole units; q and k in one block
            units = plan.own_rows * (plan.pairs + 1)  # of an image, summed by 32
            summed = units / (work.up(units, 32) * 32)
            own |= {"make a": 2 * granules, "logits": mma / 6 / 2, "pooled sums": mma / 2 * summed}
        for name, n in done.items():
            if name in own and (name, row["kernel"]) != ("logits", "backward_depthwise"):
                outputs = shape.unit / 2
                assert (n + alone[name]) * own[name] >= outputs, (row, name)
                assert n * own[name] <= 2.7 * outputs, (row, name)


SHOWN = ["images", "bands", "columns", "slices", "last images", "bands of the backward"]
CASES = [  # batch, C, H, W; multiprocessors; what it has to show
    ((3, 12, 9, 7), 1, lambda p, s: all(p[k].images > 1 for k in p)),
    ((2, 10, 19, 4), 16, lambda p, s: p["combine"].halo and s.channels % 4),
    ((1, 20, 9, 40), 64, lambda p, s: p["gates"].columns > 1),
    ((1, 20, 9, 40), 64, lambda p, s: len(p["combine"].slices(s)) > 1),
    ((5, 5, 7, 7), 1, lambda p, s: all(s.batch % p[k].images for k in p)),
    (
        (1, 34, 27, 8),
        64,
        lambda p, s: all(p[k].halo and len(p[k].slices(s)) > 1 for k in IN_SLICES),
    ),
]
IN_SLICES = ("backward_combine", "backward_depthwise")


@pytest.fixture
def emulate():
    """The emulated backend on a device of so many multiprocessors, registered for one test."""
    registry = sys.modules["casvit_kernels.backends.registry"]
    yield lambda multiprocessors: emulated.register(emulated.Emulated(multiprocessors, 101376))
    registry._REGISTRY.pop(emulated.NAME, None)
    kernels._TABLE.pop(emulated.NAME, None)
    testing.BACKENDS.pop(emulated.NAME, None)


@emulation
@pytest.mark.parametrize(("shape", "multiprocessors", "shows"), CASES, ids=SHOWN)
def test_bytes_are_those_that_the_emulation_counts(shape, multiprocessors, shows, emulate):
    """In a training step in two launches, which takes every kernel but that of one."""
    operators = emulate(multiprocessors)
    call = operators.call(shape, torch.bfloat16)
    plans = plans_of(call)
    del plans["single_pass"]
    shape = work.Shape(*shape)
    assert shows(plans, shape), plans
    x = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)
    mixer = FusedCATM(shape.channels, backend=emulated.NAME).bfloat16().train()
    mixer(x.requires_grad_()).backward(torch.randn_like(x))
    launches = dict(operators.traffic)
    parts = plans["gates"].bands * plans["gates"].columns
    for name, plan in plans.items():
        kernel = counts.KERNELS[name]
        counted = moved(launches[kernel.arguments], ("pooled", "channel"))
        assert kernel.traffic(work.Launch(shape, plan, parts)) == counted, name


CLUSTERS = [  # batch, C, H, W; rows and strips of a block, slices and images of the cluster
    ((2, 12, 19, 5), (4, 1, 1, 1)),  # five bands
    ((1, 28, 13, 4), (7, 1, 3, 1)),  # two bands x three slices, of odd chunks, the last of one
    ((1, 18, 20, 6), (4, 2, 2, 1)),  # channels that are no multiple of 4
    ((5, 8, 5, 14), (4, 2, 2, 3)),  # three images, of which the last cluster has two
    ((3, 36, 7, 7), (7, 1, 1, 3)),  # one block
    ((1, 8, 5, 32), (4, 1, 1, 1)),  # the result's pairs take one tile more than those of q
]


@emulation
@pytest.mark.parametrize(("shape", "cut"), CLUSTERS, ids=str)
def test_bytes_of_one_launch_are_those_that_the_emulation_counts(shape, cut, emulate):
    operators = emulate(1)
    operators.launches_wanted, operators.cut = 1, list(cut)
    plan = plans_of(operators.call(shape, torch.bfloat16))["single_pass"]
    x = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        FusedCATM(shape[1], backend=emulated.NAME).bfloat16().eval()(x)
    launch = work.Launch(work.Shape(*shape), plan, 0)
    counted = moved(
        dict(operators.traffic)["SinglePassArguments"], ("spatial", "pooled", "channel")
    )
    assert single_pass.SINGLE_PASS.traffic(launch) == counted


def plans_of(call):
    found = (work.Plan(*(p[f] for f in work.Plan._fields)) for p in call.plans())
    return dict(zip(counts.KERNELS, found, strict=True))


def moved(traffic, for_backward):
    """Bytes read and written by buffer, without those written for a backward pass."""
    return {
        buffer: (read, written)
        for buffer, read, written in traffic
        if read + written and buffer not in for_backward
    }


WALKS = [  # shape; images, strips, rows, pairs, chunks, bands, columns of the plan; the box
    ((1, 48, 56, 56), (1, 2, 7, 28, 12, 4, 1), (1, 16, 1, 29)),
    ((5, 220, 7, 7), (2, 1, 7, 4, 55, 1, 1), (1, 9, 2, 6)),
    ((2, 20, 9, 40), (1, 1, 4, 5, 5, 3, 4), (2, 8, 2, 7)),
    ((3, 1100, 3, 2), (2, 1, 4, 1, 275, 1, 1), (0, 4, 0, 1)),
]


@pytest.mark.parametrize(("shape", "cut", "box"), WALKS, ids=str)
def test_walks_are_those_of_each_thread(shape, cut, box):
    """As tile.h's threads go, a warp's in step."""
    shape, box = work.Shape(*shape), work.Box(*box)
    plan = work.Plan(*cut, halo=False, shared=0)
    items = other = columns = images = 0
    across = min(plan.chunks, 256)
    step = 256 // across
    for block in range(plan.blocks(shape)):
        group, rest = divmod(block, plan.bands * plan.columns)
        band, block_column = divmod(rest, plan.columns)
        top = band * plan.own_rows - box.above
        for warp in range(8):
            lanes = [(t % across, t // across) for t in range(32 * warp, 32 * warp + 32)]
            lanes = [lane for lane in lanes if lane[1] < step]
            for of_chunk in range(0, plan.chunks, across):
                for at in range(0, 2 * box.pairs, step):
                    there = [
                        block_column * 2 * plan.pairs - box.left + first + at
                        for chunk, first in lanes
                        if of_chunk + chunk < plan.chunks and first + at < 2 * box.pairs
                    ]
                    if not there:
                        continue
                    columns += 1
                    for image in range(plan.images):
                        images += 1
                        seen = group * plan.images + image < shape.batch
                        rows = [top] * len(there)
                        while (left := [n for n, r in enumerate(rows) if r < top + box.rows]) != []:
                            whole = [
                                n
                                for n in left
                                if seen
                                and 0 <= there[n] < shape.width
                                and rows[n] >= 0
                                and rows[n] + plan.rows <= min(top + box.rows, shape.height)
                            ]
                            items += plan.rows * bool(whole)
                            other += len(left) > len(whole)
                            for n in left:
                                rows[n] += plan.rows if n in whole else 1
    found = work.walk(work.Launch(shape, plan, 0), plan.chunks, box)
    blocks = plan.blocks(shape)
    assert found.items == pytest.approx(items / blocks)
    assert found.other == pytest.approx(other / blocks)
    assert found.around[1:] == pytest.approx((columns / blocks, images / blocks))


NVCC = bench.tool("nvcc") if bench.tool("cuobjdump") else None


@emulation
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc ('make cuda')")
@pytest.mark.long
def test_what_the_compiler_makes_now(document):
    """One architecture; the same numbers where the compiler is the same."""
    if bench.version() != document["nvcc"]:
        pytest.skip(f"the table is of nvcc {document['nvcc']}")
    now = json.loads(json.dumps(bench.rows("sm_90a")))
    assert now == [r for r in document["rows"] if r["target"] == "sm_90a"]
