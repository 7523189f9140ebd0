"""The mixer in one launch: phases, rounds and bytes. What blocks of a cluster read of each other's
shared memory is no traffic here."""

from __future__ import annotations

from cuda_work import (
    GRANULE,
    LANES,
    POSITIONS,
    WARPS,
    Box,
    Kernel,
    Launch,
    Rounds,
    Rule,
    Traffic,
    sweep,
    up,
    walk,
)


def _out_tiles(launch: Launch) -> int:
    """Pairs of the result start at pixel -1."""
    shape, plan, _ = launch
    return up(plan.images * plan.strips * ((shape.width + 2) // 2), POSITIONS)


def _rounds(launch: Launch, chunks: int) -> dict[str, Rounds]:
    shape, plan, _ = launch
    border = 0 if plan.halo else 1  # other bands have rows above and below, or they come as zeros
    pitch = plan.pairs + 1
    units = plan.own_rows * pitch
    padded_units = up(units, LANES) * LANES
    stride = plan.chunks | 1
    slices = len(plan.slices(shape))

    def copy(left: int) -> Rounds:
        return walk(launch, chunks, Box(border, plan.own_rows + 2 * border, left, pitch))

    tasks = 2 * plan.tiles(plan.pairs)  # of q and k
    groups = max(1, WARPS // tasks)  # of warps, which share the channels
    logits = tasks * groups
    alone = slices == 1  # logits are whole
    pixels = 0 if alone else 4 * plan.images * padded_units // LANES
    steps = up(shape.channels, 16)
    lines = 2 * plan.images
    words = lines * up(8 * steps, LANES)
    pooled = lines * up(chunks, 2)  # of two chunks
    gates = 2 * up(chunks, 2)  # of 8 channels of a gate
    step = WARPS * LANES // chunks  # from a thread's unit to its next
    warps = plan.images * up(step * chunks, LANES)
    gaps = up(plan.images * padded_units, LANES) + up(stride, LANES)
    if plan.halo:
        gaps += up(4 * pitch, LANES) * (stride - chunks)
    return {
        "copy q": copy(1),
        "copy k": copy(1),
        "zeros": Rounds(gaps, ()),
        # Rows above and below of q, k, a and u.
        "exchange": Rounds(4 * 2 * up(pitch * stride, LANES) if plan.halo else 0, ()),
        "logits": Rounds(tasks * chunks * plan.rows * 6, (logits,)),
        # Each group's turn, and the others meanwhile; the last makes gates.
        "turns": Rounds(
            tasks * plan.rows if alone else 0,
            (logits * (groups - 1),),
            other=logits - tasks if alone else logits,
        ),
        "gates of slices": Rounds(pixels * slices, (pixels,)),
        "pooled sums": Rounds(pooled * 2 * padded_units // 16, (pooled,)),
        "means": Rounds(2 * words, (lines,), words * (plan.bands // 4)),
        "channel gates": Rounds(gates * steps * 3, (gates,)),
        "make a": Rounds(warps * up(units, step), (warps,)),
        "copy v": copy(2),
        "sweep u": sweep(plan, chunks, plan.tiles(plan.pairs), plan.rows, 3),
        "sweep out": sweep(plan, chunks, _out_tiles(launch), plan.rows, 3),
        "store": walk(launch, chunks, Box(0, plan.own_rows, 1, pitch)),
    }


def _traffic(launch: Launch) -> Traffic:
    """Without what is written for a backward pass."""
    shape, plan, _ = launch
    blocks = plan.blocks(shape)
    own = plan.tiles(plan.pairs)
    exact, taps = LANES * 4 * 16 * 2 * own, LANES * 4 * 8 * (own + _out_tiles(launch))
    first, channel = 0, 0
    for chunks in plan.slices(shape):
        tiles_of_8 = (first + chunks - 1) // 2 - first // 2 + 1
        channel += blocks * 2 * tiles_of_8 * up(shape.channels, 16) * LANES * 16
        first += chunks
    return {
        "qkv": (3 * launch.box(0) * shape.chunks * GRANULE, 0),
        "out": (0, shape.pixels * shape.channels * 2),
        "packed": ((exact + taps) * blocks * shape.chunks + channel, 0),
    }


SINGLE_PASS = Kernel(
    name="single_pass",
    source="mixer.cu",
    arguments="SinglePassArguments",
    gates=1,
    units=4,
    maps=("qkv", "out"),
    rules=(
        Rule(("copy q", "copy k", "copy v"), ("LDGSTS",), fork=True),
        Rule(("pooled sums",), ("HMMA", "LDSM.MT88")),
        Rule(("logits",), ("HMMA", "LDSM", "MUFU.EX2"), beside=("turns", "MUFU.EX2")),
        Rule(("channel gates",), ("HMMA", "MUFU.EX2")),
        Rule(("sweep u",), ("HMMA", "LDS")),  # u is a product with v, which lies there
        Rule(("sweep out",), ("HMMA",)),
        Rule(("gates of slices",), ("LD", "MUFU.EX2")),
        Rule(("gates of slices",), ("MUFU.EX2",)),  # before there were clusters: does not run
        Rule(("store",), ("STG.64", "LDS"), fork=True),
        Rule(("make a",), ("STS.128", "F2FP")),
        Rule(("means",), ("STS", "STG")),
        Rule(("exchange",), ("STS.128", "LD.128")),
        Rule(("exchange",), ("STS.128", "LDS.128")),  # before there were clusters
        Rule(("zeros",), ("STS",), ("LDS",)),
        Rule((), ("STG.U16",)),  # out as NCHW, or with channels that are no multiple of 4
    ),
    rounds=_rounds,
    traffic=_traffic,
)
