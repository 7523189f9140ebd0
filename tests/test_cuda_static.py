"""The committed table of the CUDA kernels' machine code: is it of these sources, does it hold what it
should, and is what it counts with right."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulation import backend as emulated
from cuda_emulation import build

from casvit_kernels import FusedCATM, testing
from casvit_kernels.ops.mixer import kernels

FOLDER = Path(__file__).parents[1] / "bench" / "static"
emulation = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Each imports those before it by its plain name, as a script's neighbours do.
sass, work, forward, backward, counts, tables, bench = map(
    load,
    (
        "sass",
        "cuda_work",
        "cuda_forward",
        "cuda_backward",
        "cuda_counts",
        "cuda_table",
        "cuda_kernels",
    ),
)


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
    assert len(found) == len(wanted)
    assert set(found) == wanted


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


def test_verdicts_follow_from_the_numbers(document):
    """The same table with fewer and with more of everything."""

    def verdicts(factor, barriers):
        changed = copy.deepcopy(document)
        for row in changed["rows"]:
            row["loops"] = {name: n * factor for name, n in row["loops"].items()}
            for key in ("straight", "mma", "maps"):
                row[key] *= factor
            row["spilled"] = barriers
            row["phases"] = [[*p[:6], barriers] for p in row["phases"]]
        return [met for *_, met in numbers(changed).goals()], bench.text(changed)

    few, text = verdicts(0.1, 0)
    assert all(few)
    assert "missed" not in text
    many, text = verdicts(10.0, 4)
    assert not any(many)
    assert "| met |" not in text


@emulation
def test_rows_are_of_the_plans_that_the_library_makes(document):
    shapes = {s.channels: s for s in numbers(document).shapes}
    for row in document["rows"]:
        plan = bench.plans(shapes[row["channels"]], row["target"])[row["kernel"]]
        assert list(plan) == row["plan"], row


def test_what_blocks_do_covers_the_maps(document):
    """Pieces of work times what each makes: all outputs, and not much more, of halos and edges."""
    shapes = {s.channels: s for s in numbers(document).shapes}
    granules, mma = 32 * 4, 16 * 8  # of a warp's granules; positions or units x pixels and channels
    makes = dict.fromkeys(("copy", "copy v", "copy gradient", "store", "make a"), granules)
    makes |= {"sweep u": mma / 3, "sweep out": mma / 3, "sweep": mma / 6, "pooled sums": mma}
    makes |= {"sweep l, gu": mma / 6, "sweep ga": mma / 3, "sweep gd": mma / 6, "sweep gz": mma / 3}
    for row in document["rows"]:
        shape, plan = shapes[row["channels"]], work.Plan(*row["plan"])
        launch, kernel = work.Launch(shape, plan, 1), counts.KERNELS[row["kernel"]]
        done = dict.fromkeys(row["loops"], 0)
        for chunks in plan.slices(shape):
            for name, n in kernel.rounds(launch, chunks).items():
                done[name] += n.items * plan.blocks(shape)
        both = row["kernel"] == "backward_combine"  # convolutions' taps
        own = makes | {"taps": mma / 6 if both else mma / 3}
        # A pixel's sigmoid, and its sum over chunks.
        own["pixels"] = 32 * (4 if row["kernel"] == "backward_gate" else shape.channels)
        for name, n in done.items():
            if name in own:
                assert 1 <= n * own[name] / (shape.unit / 2) <= 2.7, (row, name)


SHOWN = ["images", "bands", "columns", "slices", "last images", "bands of the backward"]
CASES = [  # batch, C, H, W; multiprocessors; what it has to show
    ((3, 12, 9, 7), 1, lambda p, s: all(p[k].images > 1 for k in p)),
    ((2, 10, 19, 4), 16, lambda p, s: p["combine"].halo and s.channels % 4),
    ((1, 20, 9, 40), 64, lambda p, s: p["gates"].columns > 1),
    ((1, 20, 9, 40), 64, lambda p, s: len(p["combine"].slices(s)) > 1),
    ((5, 5, 7, 7), 1, lambda p, s: all(s.batch % p[k].images for k in p)),
    (
        (2, 10, 19, 4),
        16,
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
    """In a training step, which takes every kernel."""
    operators = emulate(multiprocessors)
    call = operators.call(shape, torch.bfloat16)
    found = (work.Plan(*(p[f] for f in work.Plan._fields)) for p in call.plans())
    plans = dict(zip(counts.KERNELS, found, strict=False))
    shape = work.Shape(*shape)
    assert shows(plans, shape), plans
    x = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)
    mixer = FusedCATM(shape.channels, backend=emulated.NAME).bfloat16().train()
    mixer(x.requires_grad_()).backward(torch.randn_like(x))
    launches = dict(operators.traffic)
    parts = plans["gates"].bands * plans["gates"].columns
    for name, kernel in counts.KERNELS.items():
        counted = {
            buffer: (read, written)
            for buffer, read, written in launches[kernel.arguments]
            if read + written and buffer not in ("pooled", "channel")  # for a backward pass
        }
        assert kernel.traffic(work.Launch(shape, plans[name], parts)) == counted, name


CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   LDG.E R2, [R4.64] ;
        /*0030*/                   BRA.DIV UR4, 0xc0 ;
        /*0040*/               @P0 BRA 0xe0 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0060*/                   FADD R5, R5, R6 ;
        /*0070*/              @!P1 BRA 0x50 ;
        /*0080*/               @P2 CALL.REL.NOINC 0xa0 ;
        /*0090*/                   BRA 0x20 ;
        /*00a0*/                   STG.E.64 [R4.64], R2 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   SHFL.BFLY PT, R14, R15, R18, R19 ;
        /*00d0*/                   BRA 0x40 ;
        /*00e0*/                   FMUL R5, R5, R6 ;
        /*00f0*/                   BRA 0x50 ;
        /*0100*/                   BRA 0x100;
        /*0110*/                   NOP;
"""


def test_loops_of_machine_code():
    """A loop in a loop; a rare path behind the function's end, and one for warps in disorder."""
    code, loops = sass.loops(sass.parse(CODE))
    assert [i.address for i in code if i.address >= 0xB0] == [0xB0, 0xE0, 0xF0]
    (outer,) = loops
    assert outer.first == 0x20
    assert [i.kind for i in outer.own] == ["LDG", "BRA", "BRA", "CALL", "BRA", "FMUL", "BRA"]
    (inner,) = outer.inner
    assert [i.kind for i in inner.own] == ["HMMA", "FADD", "BRA"]
    assert inner.inner == ()


UNROLLED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IMAD R2, R3, R4, R5 ;
        /*0020*/              @!P0 BRA 0x80 ;
        /*0030*/                   LDGSTS.E.64 [R2], [R4.64] ;
        /*0040*/                   LDGSTS.E.64 [R2+0x10], [R4.64+0x10] ;
        /*0050*/                   IADD3 R2, R2, 0x20, RZ ;
        /*0060*/                   ISETP.NE.AND P0, PT, R2, R3, PT ;
        /*0070*/               @P0 BRA 0x30 ;
        /*0080*/                   LDGSTS.E.64 [R2], [R4.64] ;
        /*0090*/                   FADD R5, R5, R6 ;
        /*00a0*/                   FADD R5, R5, R6 ;
        /*00b0*/                   FADD R5, R5, R6 ;
        /*00c0*/              @!P1 BRA 0x10 ;
        /*00d0*/                   EXIT ;
"""


def test_an_unrolled_loop_and_what_lies_around_it():
    """Five instructions for two copies; of the seven around them 2.5 are for the third."""
    function = sass.Function("f", *sass.loops(sass.parse(UNROLLED)), 32, 0)
    (copy_phase,) = counts.phases(forward.GATES, function).values()
    assert copy_phase == counts.Phase("copy", 5, 2, 0, (4,), 0, 0)
    assert copy_phase.instructions(work.Rounds(8, (3, 2))) == 8 * 2.5 + 2 * 4
    assert len(function.straight) == 2


def test_loops_that_no_rule_fits_are_errors():
    """And two of a kind where one is expected twice."""
    function = sass.Function("f", *sass.loops(sass.parse(UNROLLED)), 32, 0)
    with pytest.raises(ValueError, match=r"f: 1 loops are \('copy v', 'copy gradient'\)"):
        counts.phases(backward.BACKWARD_COMBINE, function)
    other = sass.parse(UNROLLED.replace("LDGSTS.E.64", "ATOMG.E.ADD"))
    with pytest.raises(ValueError, match=r"gates: no phase has .*'ATOMG': 3"):
        counts.phases(forward.GATES, sass.Function("f", *sass.loops(other), 32, 0))


def test_a_kernel_whose_name_ends_like_anothers():
    of = "N6casvit4cuda{}INS0_4Bf16ELi7ELb1EEEv"
    names = [of.format("14combine_kernel"), of.format("23backward_combine_kernel")]
    plan = work.Plan(1, 2, 7, 28, 4, 4, 1, True, 0)
    for kernel, name in zip((forward.COMBINE, backward.BACKWARD_COMBINE), names, strict=True):
        assert counts.instance(kernel, "bf16", plan, names) == name


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
