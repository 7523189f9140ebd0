"""The forward's CUDA kernels: phases, rounds and bytes."""

from __future__ import annotations

from cuda_work import (
    GRANULE,
    LANES,
    WARPS,
    Box,
    Kernel,
    Launch,
    Plan,
    Rounds,
    Rule,
    Traffic,
    sweep,
    up,
    walk,
)


def _units(plan: Plan) -> int:
    return up(plan.own_rows * (plan.pairs + 1), 32) * 32


def _copy(launch: Launch, chunks: int) -> Rounds:
    return walk(launch, chunks, Box(1, launch.plan.own_rows + 2, 1, launch.plan.pairs + 1))


def a_box(plan: Plan) -> Box:
    return (
        Box(2, plan.own_rows + 4, 2, plan.pairs + 2)
        if plan.halo
        else Box(1, plan.own_rows + 2, 2, plan.pairs + 2)
    )


def _gates_rounds(launch: Launch, chunks: int) -> dict[str, Rounds]:
    plan = launch.plan
    tiles = plan.tiles(plan.pairs)
    pixels = up(plan.images * plan.own_rows * plan.pairs * 2, LANES)
    tasks = plan.images * up(chunks, 2)  # of two chunks; an mma sums 16 units of one
    return {
        "copy": _copy(launch, chunks),
        "zeros": Rounds(up(plan.images * 2 * _units(plan), LANES), ()),
        "sweep": Rounds(tiles * chunks * plan.rows * 6, ()),
        "pixels": Rounds(pixels, (), pixels * (WARPS // tiles - 1)),
        "pooled sums": Rounds(tasks * 2 * _units(plan) // 16, (tasks,)),
    }


def _gates_traffic(launch: Launch) -> Traffic:
    shape, plan, _ = launch
    taps = LANES * 4 * 16 * 2 * plan.blocks(shape) * shape.chunks * plan.tiles(plan.pairs)
    return {
        "qkv": (2 * launch.box(1) * shape.chunks * GRANULE, 0),
        "packed": (taps, 0),
        "spatial": (0, 2 * shape.pixels * 4),
        "sums": (0, plan.bands * plan.columns * 2 * shape.batch * shape.padded * 4),
    }


def _statistics_rounds(launch: Launch, chunks: int) -> dict[str, Rounds]:
    plan = launch.plan
    tiles = plan.tiles(plan.pairs)
    return {
        "copy": _copy(launch, chunks),
        "sweep": Rounds(tiles * chunks * plan.rows * 6, (chunks,)),
    }


def _statistics_traffic(launch: Launch) -> Traffic:
    shape, plan, _ = launch
    blocks = plan.blocks(shape)
    return {
        "qkv": (2 * launch.box(1) * shape.chunks * GRANULE, 0),
        "packed": (LANES * 4 * 16 * 2 * blocks * shape.chunks, 0),
        "counts": (0, blocks * 4),
        "moments": (0, blocks * 2 * 2 * shape.padded * 4),
    }


def _combine_rounds(launch: Launch, chunks: int) -> dict[str, Rounds]:
    shape, plan, parts = launch
    u_rows = plan.rows + 1 if plan.halo else plan.rows
    steps, lines = up(shape.channels, 16), 2 * plan.images
    words = lines * up(8 * steps, LANES)  # of two channels
    tasks = 2 * up(chunks, 2)  # of 8 channels of a gate
    return {
        "copy": _copy(launch, chunks),
        "means": Rounds(words * parts, (lines, words)),
        "channel gates": Rounds(tasks * steps * 3, (tasks,)),
        "make a": walk(launch, chunks, a_box(plan)),
        "sweep u": sweep(plan, chunks, plan.tiles(plan.pairs + 1), u_rows, 3),
        "sweep out": sweep(plan, chunks, plan.tiles(plan.pairs), plan.rows, 3),
        "store": walk(launch, chunks, Box(0, plan.own_rows, 0, plan.pairs)),
    }


def _combine_traffic(launch: Launch) -> Traffic:
    """Without what is written for a backward pass."""
    shape, plan, parts = launch
    blocks = plan.blocks(shape)
    a, u = launch.box(2), launch.box(1)
    tiles = plan.tiles(plan.pairs) + plan.tiles(plan.pairs + 1)
    taps = LANES * 4 * 8 * tiles * blocks * shape.chunks
    first, channel = 0, 0
    for chunks in plan.slices(shape):
        tiles_of_8 = (first + chunks - 1) // 2 - first // 2 + 1
        channel += blocks * 2 * tiles_of_8 * up(shape.channels, 16) * LANES * 16
        first += chunks
    means = plan.bands * plan.columns * shape.batch * 2 * shape.padded * parts * 4
    return {
        "qkv": ((2 * a + u) * shape.chunks * GRANULE, 0),
        "out": (0, shape.pixels * shape.channels * 2),
        "packed": (taps + channel, 0),
        "spatial": (a * shape.chunks * 2 * 4, 0),
        "sums": (means * len(plan.slices(shape)), 0),
    }


GATES = Kernel(
    name="gates",
    source="mixer.cu",
    arguments="GatesArguments",
    gates=2,
    units=2,
    maps=("qkv",),
    rules=(
        Rule(("copy",), ("LDGSTS",), fork=True),
        Rule(("pooled sums",), ("HMMA", "LDSM.MT88")),
        Rule(("sweep",), ("HMMA",)),
        Rule(("pixels",), ("MUFU.EX2",)),
        Rule(("zeros",), ("STS",), ("LDS",)),
    ),
    rounds=_gates_rounds,
    traffic=_gates_traffic,
)
STATISTICS = Kernel(
    name="statistics",
    source="mixer.cu",
    arguments="StatisticsArguments",
    gates=2,
    units=2,
    maps=("qkv",),
    rules=(Rule(("copy",), ("LDGSTS",), fork=True), Rule(("sweep",), ("HMMA",))),
    rounds=_statistics_rounds,
    traffic=_statistics_traffic,
)
COMBINE = Kernel(
    name="combine",
    source="mixer.cu",
    arguments="CombineArguments",
    gates=1,
    units=4,
    maps=("qkv", "out"),
    rules=(
        Rule(("copy",), ("LDGSTS",), fork=True),
        Rule(("channel gates",), ("HMMA", "MUFU.EX2")),
        Rule(("sweep u",), ("HMMA", "LDS")),  # u is a product with v, which lies there
        Rule(("sweep out",), ("HMMA",)),
        Rule(("make a",), ("STS.64", "LDG"), fork=True),
        Rule(("means",), ("LDG", "STS")),
        Rule(("store",), ("STG.64", "LDS"), fork=True),
        Rule((), ("STG.U16",)),  # out as NCHW, or with channels that are no multiple of 4
    ),
    rounds=_combine_rounds,
    traffic=_combine_traffic,
)
