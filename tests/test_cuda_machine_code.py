"""How the static tables read machine code: loops, their bodies and forks, and which phase they are."""

import pytest
from cuda_static import backward, counts, forward, sass, single_pass, work

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
    unrolled = forward.GATES._replace(rules=(work.Rule(("copy",), ("LDGSTS",)),))
    (copy_phase,) = counts.phases(unrolled, function).values()
    assert copy_phase == counts.Phase("copy", 5, 2, 0, (4,), 0, 0)
    assert copy_phase.instructions(work.Rounds(8, (3, 2))) == 8 * 2.5 + 2 * 4
    assert len(function.straight) == 2


FORK = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.NE.AND P0, PT, R2, R3, PT ;
        /*0020*/               @P0 BRA 0x70 ;
        /*0030*/                   LDGSTS.E.64 [R2], [R4.64] ;
        /*0040*/                   LDGSTS.E.64 [R2+0x10], [R4.64+0x10] ;
        /*0050*/                   IADD3 R2, R2, 0x20, RZ ;
        /*0060*/                   BRA 0x90 ;
        /*0070*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0080*/                   LDGSTS.E.64 [R2], [R4.64], !P2 ;
        /*0090*/               @P1 BRA 0x10 ;
        /*00a0*/                   EXIT ;
"""
TURNS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/               @P1 BRA 0x90 ;
        /*0050*/               @P2 BRA 0x80 ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/                   MUFU.EX2 R6, R6 ;
        /*0080*/                   STS [R2], R5 ;
        /*0090*/                   BAR.SYNC 0x0 ;
        /*00a0*/               @P3 BRA 0x40 ;
        /*00b0*/               @P4 BRA 0x0 ;
        /*00c0*/                   EXIT ;
"""


def test_either_side_of_a_fork():
    """Two copies in seven instructions, or one in five."""
    function = sass.Function("f", *sass.loops(sass.parse(FORK)), 32, 0)
    (phase,) = counts.phases(forward.STATISTICS, function).values()
    assert (phase.own, phase.items, phase.other) == (7, 2, 5)
    assert phase.instructions(work.Rounds(8, (), other=3)) == 8 / 2 * 7 + 3 * 5
    straight = sass.parse(UNROLLED.replace("LDGSTS.E.64 [R2+0x10]", "STG [R2]"))
    with pytest.raises(ValueError, match="f: no fork in the loop of 'copy'"):
        counts.phases(forward.STATISTICS, sass.Function("f", *sass.loops(straight), 32, 0))


def test_turns_beside_the_mma():
    """All of it, without exponentials, or another warp's turn; the barrier is not the mma's."""
    function = sass.Function("f", *sass.loops(sass.parse(TURNS)), 32, 0)
    rules = tuple(r for r in single_pass.SINGLE_PASS.rules if len(r.names) == 1)
    kernel = single_pass.SINGLE_PASS._replace(rules=rules)
    logits, turns = counts.phases(kernel, function).values()
    assert (logits.name, logits.own, logits.around, logits.barriers) == ("logits", 3, (2,), 0)
    assert turns == counts.Phase("turns", 7, 2, 0, (3,), 0, 1, 5)
    assert turns.instructions(work.Rounds(4, (3,), other=2)) == 4 / 2 * 7 + 3 * 3 + 2 * 5


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
