"""The backward's CUDA kernels, B1 to B3: phases, rounds and bytes."""

from __future__ import annotations

from cuda_forward import a_box
from cuda_work import (
    CHUNK,
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

_TAPS = 3 * 8 * LANES  # bytes of a chunk's, of a convolution
_EXACT_TAPS = 2 * _TAPS
# Loops over what groups of warps, or columns of pixels, have summed.
_TAPS_OUT = Rule(("taps out",), ("LDS.64", "FADD", "STG"))
_SUMS = Rule(("sums",), ("LDS", "FADD", "STG"))
_EMPTY_SUMS = Rule((), ("STG",), ("LDS", "LDG"))  # some compilers' way for sums of nothing


def _wide_box(plan: Plan) -> Box:
    """A row and a pixel more on each side."""
    return Box(1, plan.own_rows + 2, 1, plan.pairs + 1)


def _taps(plan: Plan, chunks: int, tiles: int) -> Rounds:
    """A warp takes a chunk and every so-many-th tile."""
    return Rounds(tiles * chunks * plan.rows * 3, (chunks * max(1, WARPS // plan.chunks),))


def _taps_out(plan: Plan, elements: int) -> Rounds:
    warps = up(elements, LANES)
    return Rounds(warps * max(1, WARPS // plan.chunks), (warps,))


def _zeros(plan: Plan) -> dict[str, Rounds]:
    """Rows above and below the maps, where other blocks do not have them."""
    words = plan.images * 2 * (plan.pairs + 1) * (plan.chunks | 1)
    return {} if plan.halo else {"zeros": Rounds(up(words, LANES), ())}


def _combine_rounds(launch: Launch, chunks: int) -> dict[str, Rounds]:
    shape, plan, _ = launch
    own, wide = plan.tiles(plan.pairs), plan.tiles(plan.pairs + 1)
    u_rows = plan.rows + 1 if plan.halo else plan.rows
    columns = up(2 * plan.pairs * plan.chunks, LANES)
    rows = columns * plan.images * plan.own_rows
    sums = up(chunks * 16, LANES)
    return {
        "copy v": walk(launch, chunks, _wide_box(plan)),
        "copy gradient": walk(launch, chunks, a_box(plan)),
        "gates": Rounds(up(2 * plan.images * plan.chunks * CHUNK, LANES), ()),
        **_zeros(plan),
        "make a": walk(launch, chunks, a_box(plan)),
        "sweep l, gu": sweep(plan, chunks, wide, u_rows, 6),
        "taps": _taps(plan, chunks, wide + own),  # of dwc, of proj
        "taps out": _taps_out(plan, chunks * 18 * CHUNK),
        "sweep ga": sweep(plan, chunks, own, plan.rows, 3),
        # Inside, threads of a pixel's chunks add up.
        "store": Rounds(
            rows, (columns, columns * plan.images), rows * (plan.chunks.bit_length() - 1)
        ),
        "sums": Rounds(sums * plan.images * shape.width, (sums, sums * plan.images)),
    }


def _combine_traffic(launch: Launch) -> Traffic:
    shape, plan, _ = launch
    blocks, slices = plan.blocks(shape), len(plan.slices(shape))
    own, wide = plan.tiles(plan.pairs), plan.tiles(plan.pairs + 1)
    a, u, pixels = launch.box(2), launch.box(1), shape.pixels
    of_map = shape.chunks * GRANULE
    taps = wide * (2 * _TAPS + 8 * LANES) + own * _TAPS
    return {
        # For a, for the sums at the end, v.
        "qkv": ((2 * a + 2 * pixels + u) * of_map, 0),
        "grad": (a * of_map, 0),
        "grad_qkv": (0, pixels * of_map),
        "grad_sum": (0, pixels * of_map),
        "packed": (taps * blocks * shape.chunks, 0),
        "spatial": ((a + pixels) * shape.chunks * 2 * 4, 0),
        "gates": (plan.bands * 2 * shape.batch * shape.channels * 4, 0),
        "pixel": (0, slices * 2 * pixels * 4),
        "channel_sums": (0, plan.bands * 2 * shape.batch * shape.padded * 4),
        "weights": (0, blocks * 20 * shape.padded * 4),
    }


def _gate_rounds(launch: Launch, chunks: int) -> dict[str, Rounds]:
    shape, plan, _ = launch
    tiles = plan.tiles(plan.pairs)
    pixels = up(plan.images * plan.own_rows * plan.pairs * 2, LANES)
    sums = up(2 * shape.padded, LANES)
    return {
        "copy": walk(launch, chunks, _wide_box(plan)),
        "shift": Rounds(up(plan.images * shape.padded, LANES), ()),
        "pixels": Rounds(pixels * chunks, (pixels,)),
        "sweep": Rounds(tiles * chunks * plan.rows * 6, ()),
        "sums": Rounds(sums * tiles, (sums,)),
    }


def _gate_traffic(launch: Launch) -> Traffic:
    shape, plan, _ = launch
    blocks, each = plan.blocks(shape), 2 * shape.pixels * 4
    taps = _EXACT_TAPS + 2 * 16 * LANES
    return {
        "qkv": (2 * launch.box(1) * shape.chunks * GRANULE, 0),
        "packed": (2 * blocks * shape.chunks * plan.tiles(plan.pairs) * taps, 0),
        "spatial": (each, 0),
        "pixel": (each, 0),
        "shift": (plan.bands * plan.columns * 2 * shape.batch * shape.channels * 4, 0),
        "logit": (0, each),
        "sums": (0, blocks * 2 * 2 * shape.padded * 4),
    }


def _depthwise_rounds(launch: Launch, chunks: int) -> dict[str, Rounds]:
    plan = launch.plan
    own, wide = plan.tiles(plan.pairs), plan.tiles(plan.pairs + 1)
    columns = up(2 * plan.pairs * plan.chunks, LANES)
    sums = up(chunks * CHUNK, LANES)
    logits = plan.images * (plan.own_rows + 2) * 2 * (plan.pairs + 1)
    return {
        "copy": walk(launch, chunks, a_box(plan)),
        **_zeros(plan),
        "logits": Rounds(up(logits, LANES), ()),
        "sweep gd": sweep(plan, chunks, wide, plan.rows + 1 if plan.halo else plan.rows, 6),
        "taps": _taps(plan, chunks, wide),
        "taps out": _taps_out(plan, chunks * 9 * CHUNK),
        "sweep gz": sweep(plan, chunks, own, plan.rows, 3),
        "store": Rounds(columns * plan.images * plan.own_rows, (columns, columns * plan.images)),
        "sums": Rounds(sums * 2 * plan.pairs, (sums,)),
    }


def _depthwise_traffic(launch: Launch) -> Traffic:
    shape, plan, _ = launch
    blocks, slices = plan.blocks(shape), len(plan.slices(shape))
    own, wide = plan.tiles(plan.pairs), plan.tiles(plan.pairs + 1)
    of_map = 2 * shape.pixels * shape.chunks * GRANULE
    taps = wide * (_EXACT_TAPS + 2 * 16 * LANES) + own * _TAPS
    # Half of the lanes read a channel's.
    by_lanes = 2 * blocks * wide * LANES // 2 * shape.channels * 4
    by_columns = 2 * plan.bands * shape.batch * shape.width * shape.channels * 4
    return {
        "qkv": (2 * launch.box(2) * shape.chunks * GRANULE, 0),
        "grad_sum": (of_map, 0),
        "grad_qkv": (0, of_map),
        "packed": (2 * blocks * shape.chunks * taps + by_lanes, 0),
        "coefficients": (3 * by_lanes, 0),
        "spatial": (2 * shape.pixels * shape.chunks * 4, 0),
        "logit": (2 * launch.box(1) * slices * 4, 0),
        "gates": (by_columns, 0),
        "shift": (by_columns, 0),
        "weights": (0, blocks * 2 * 10 * shape.padded * 4),
    }


BACKWARD_COMBINE = Kernel(
    name="backward_combine",
    source="backward.cu",
    arguments="BackwardCombineArguments",
    gates=1,
    units=6,
    maps=("qkv", "grad", "grad_qkv", "grad_sum"),
    rules=(
        Rule(("copy v", "copy gradient"), ("LDGSTS",), fork=True),
        Rule(("taps",), ("HMMA", "LDSM.MT88")),
        Rule(("sweep l, gu",), ("HMMA", "LDS")),  # products with v, which lies there
        Rule(("sweep ga",), ("HMMA",)),
        Rule(("store",), ("STG.64", "LDS")),
        Rule(("make a",), ("STS.64", "LDG"), fork=True),
        Rule(("gates",), ("STS", "LDG"), ("LDS",)),
        Rule(("zeros",), ("STS.128",), ("LDS", "LDG")),
        _TAPS_OUT,
        _SUMS,
        _EMPTY_SUMS,
    ),
    rounds=_combine_rounds,
    traffic=_combine_traffic,
)
BACKWARD_GATE = Kernel(
    name="backward_gate",
    source="backward.cu",
    arguments="BackwardGateArguments",
    gates=2,
    units=2,
    maps=("qkv",),
    rules=(
        Rule(("copy",), ("LDGSTS",), fork=True),
        Rule(("sweep",), ("HMMA",)),
        Rule(("pixels",), ("LDS.64", "LDS.128", "STG", "STS")),
        Rule(("shift",), ("STS", "LDG"), ("LDS",)),
        _SUMS,
        _EMPTY_SUMS,
    ),
    rounds=_gate_rounds,
    traffic=_gate_traffic,
)
BACKWARD_DEPTHWISE = Kernel(
    name="backward_depthwise",
    source="backward.cu",
    arguments="BackwardDepthwiseArguments",
    gates=2,
    units=5,
    maps=("qkv", "grad_sum", "grad_qkv"),
    rules=(
        Rule(("copy",), ("LDGSTS",), fork=True),
        Rule(("taps",), ("HMMA", "LDSM.MT88")),
        Rule(("sweep gd",), ("HMMA", "LDS")),  # the gradient at the logit lies there
        Rule(("sweep gz",), ("HMMA",)),
        Rule(("store",), ("STG.64", "LDS")),
        Rule(("logits",), ("STS", "LDG"), ("LDS",)),
        Rule(("zeros",), ("STS.128",), ("LDS", "LDG")),
        _TAPS_OUT,
        _SUMS,
        _EMPTY_SUMS,
    ),
    rounds=_depthwise_rounds,
    traffic=_depthwise_traffic,
)
