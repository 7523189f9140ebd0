"""The emulation of the device, tests/cuda_emulation, held to what it promises.

Lane maps and conversions against numpy, in the words of the PTX manual; small kernels right in every
schedule; each barrier and wait taken away, and seen; each kind of wrong access reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import build
from numpy.typing import NDArray

Array = NDArray[Any]
SCHEDULES = (0, 1, 2)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", name="emulation")
def _emulation() -> Any:
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    return build.module()


def _random(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _bits(values: Array, kind: str) -> Array:
    """Rounded to a 2-byte float by torch."""
    return torch.from_numpy(values.copy()).to(TYPES[kind]).view(torch.int16).numpy().view(np.uint16)


def _values(bits: Array, kind: str) -> Array:
    return torch.from_numpy(bits.view(np.int16)).view(TYPES[kind]).float().numpy()


# --- Lane maps. The manual's words: groupID = %laneid >> 2, threadID_in_group = %laneid % 4.
LANES = np.arange(32)
GROUP, IN_GROUP = LANES >> 2, LANES % 4


def _a_place(i: int) -> tuple[Array, Array]:
    """Row and column of a_i, i = 0..7 ("Matrix fragments for mma.m16n8k16", .f16 / .bf16)."""
    row = GROUP if i in (0, 1, 4, 5) else GROUP + 8
    column = IN_GROUP * 2 + (i & 1) + (0 if i < 4 else 8)
    return row, column


def _b_place(i: int) -> tuple[Array, Array]:
    """Row and column of b_i, i = 0..3."""
    return IN_GROUP * 2 + (i & 1) + (0 if i < 2 else 8), GROUP


def _c_place(i: int) -> tuple[Array, Array]:
    """Row and column of c_i and d_i, i = 0..3."""
    return (GROUP if i < 2 else GROUP + 8), IN_GROUP * 2 + (i & 1)


def _words(matrix: Array, place: Callable[[int], tuple[Array, Array]], count: int) -> Array:
    """Each lane's `count` elements, two in a word, the first in the low half."""
    elements = np.stack([matrix[place(i)] for i in range(count)], axis=1)
    return np.ascontiguousarray(elements).view(np.uint32)


@pytest.mark.parametrize("kind", TYPES)
def test_mma_has_the_manuals_lane_map(emulation: Any, kind: str) -> None:
    a, b = (_bits(_random(*shape), kind) for shape in ((16, 16), (16, 8)))
    c = _random(16, 8)
    start = np.stack([c[_c_place(i)] for i in range(4)], axis=1)
    found = np.empty((32, 4), np.float32)
    run = getattr(emulation, f"mma_{kind}")
    run(_words(a, _a_place, 8), _words(b, _b_place, 4), start, found, emulation.Settings())
    exact = _values(a, kind).astype(np.float64) @ _values(b, kind).astype(np.float64) + c
    d = np.empty((16, 8), np.float32)
    for i in range(4):
        d[_c_place(i)] = found[:, i]
    assert np.array_equal(d, exact.astype(np.float32))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("special", [np.nan, np.inf, 1e30])
def test_mma_keeps_what_is_no_number(emulation: Any, kind: str, special: float) -> None:
    a, b, c = np.ones((16, 16), np.float32), np.zeros((16, 8), np.float32), np.zeros((16, 8))
    a[3, 5], b[5, 2], c[9, 4] = special, 1.0, special
    found = np.empty((32, 4), np.float32)
    run = getattr(emulation, f"mma_{kind}")
    start = np.stack([c.astype(np.float32)[_c_place(i)] for i in range(4)], axis=1)
    run(
        _words(_bits(a, kind), _a_place, 8),
        _words(_bits(b, kind), _b_place, 4),
        start,
        found,
        emulation.Settings(),
    )
    with np.errstate(invalid="ignore"):
        expected = _values(_bits(a, kind), kind) @ _values(_bits(b, kind), kind) + c
    for i in range(4):
        assert np.array_equal(found[:, i], expected[_c_place(i)].astype(np.float32), equal_nan=True)


# The manual's figure for ldmatrix .m8n8, as a table: which lane has elements 0..7 of row r.
PLAIN = [
    [4 * r, 4 * r, 4 * r + 1, 4 * r + 1, 4 * r + 2, 4 * r + 2, 4 * r + 3, 4 * r + 3]
    for r in range(8)
]


@pytest.mark.parametrize(
    "name", ["ldmatrix_x4", "ldmatrix_x4_transposed", "ldmatrix_x2_transposed"]
)
def test_ldmatrix_has_the_manuals_lane_map(emulation: Any, name: str) -> None:
    count = 2 if "x2" in name else 4
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)  # each element is known by its value
    found = np.empty((32, count), np.uint32)
    getattr(emulation, name)(rows, found, emulation.Settings())
    expected = np.zeros((32, count), np.uint32)
    for i in range(count):
        matrix = rows[8 * i : 8 * i + 8]
        if "transposed" in name:
            matrix = matrix.T
        for row in range(8):
            for column in range(8):
                half = 16 * (column & 1)
                expected[PLAIN[row][column], i] |= np.uint32(int(matrix[row, column]) << half)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", TYPES)
def test_ldmatrix_and_mma_make_a_product(emulation: Any, kind: str, schedule: int) -> None:
    a, b = (_bits(_random(*shape), kind) for shape in ((16, 16), (16, 8)))
    d = np.full((16, 8), np.nan, np.float32)
    run = getattr(emulation, f"product_{kind}")
    run(a, b, d, emulation.Settings(schedule))
    exact = _values(a, kind).astype(np.float64) @ _values(b, kind).astype(np.float64)
    assert np.array_equal(d, exact.astype(np.float32))


# --- Conversions.
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_every_2_byte_float_widens_exactly(emulation: Any, kind: str, low: bool) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    found = emulation.widen(bits, kind == "bf16", low)
    expected = _values(bits, kind)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found[expected == 0]), np.signbit(expected[expected == 0]))


@pytest.mark.parametrize("kind", TYPES)
def test_float32_rounds_to_nearest_even(emulation: Any, kind: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    exact = _values(bits, kind)
    exact = np.sort(exact[np.isfinite(exact)])
    middles = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    special = np.array([0.0, -0.0, 65504, 65519.996, 65520, 1e30, -1e30, 1e-45], np.float32)
    ends = np.array([np.inf, -np.inf, np.finfo(np.float32).max], np.float32)
    near = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate([exact, middles, *near, random.view(np.float32), special, ends])
    values = values[~np.isnan(values)]
    for low in (True, False):
        assert np.array_equal(emulation.narrow(values, kind == "bf16", low), _bits(values, kind))
    nan = np.array([np.nan, -np.nan], np.float32)
    assert (emulation.narrow(nan, kind == "bf16", True) == 0x7FFF).all()


def test_arithmetic_at_its_ends(emulation: Any) -> None:
    assert np.isnan(emulation.relu(float("nan")))
    assert [emulation.relu(x) for x in (-2.0, 0.0, 3.0)] == [0.0, 0.0, 3.0]
    assert [emulation.sigmoid(x) for x in (-1000.0, 0.0, 1000.0)] == [0.0, 0.5, 1.0]


# --- Probes: (how to run one, its results and what they should be).
def _transpose(emulation: Any, settings: Any) -> tuple[Any, bool]:
    x, out = _random(3, 16, 16), np.full((3, 16, 16), np.nan, np.float32)
    report = emulation.transpose(x, out, settings)
    return report, np.array_equal(out, x.transpose(0, 2, 1))


def _double_buffer(emulation: Any, settings: Any) -> tuple[Any, bool]:
    x, out = _random(2, 5, 64, 4), np.full((2, 64, 4), np.nan, np.float32)
    report = emulation.double_buffer(x, out, settings)
    expected = np.zeros_like(out)
    for tile in range(5):
        expected += x[:, tile, ::-1]
    return report, np.array_equal(out, expected)


def _warp(emulation: Any, settings: Any) -> tuple[Any, bool]:
    x = np.round(_random(4, 32) * 8) / 8  # sums are exact in any order
    mirrored, sums = (np.full((4, 32), np.nan, np.float32) for _ in range(2))
    votes = np.zeros((4, 32), np.uint32)
    report = emulation.warp(x, mirrored, sums, votes, settings)
    flipped = x[:, ::-1]
    partners = flipped[:, np.arange(32) ^ 9]
    totals = flipped.sum(1, keepdims=True) + flipped[:, 5:6] + 2 * partners
    ballots = ((flipped > 0) << np.arange(32)).sum(1, keepdims=True)
    right = (
        np.array_equal(mirrored, flipped)
        and np.array_equal(sums, totals)
        and np.array_equal(votes, ballots + 0 * votes)
    )
    return report, right


def _cluster(emulation: Any, settings: Any) -> tuple[Any, bool]:
    x = _random(2, 4, 64)
    out = np.full_like(x, np.nan)
    report = emulation.cluster(x, out, 4, 3, settings)
    expected = x
    for _ in range(3):
        expected = np.roll(expected, -1, 1)[..., ::-1] + np.float32(0.5) * expected[..., ::-1]
    return report, np.array_equal(out, expected)


def _product(emulation: Any, settings: Any) -> tuple[Any, bool]:
    a, b = (_bits(_random(*shape), "bf16") for shape in ((16, 16), (16, 8)))
    d = np.full((16, 8), np.nan, np.float32)
    report = emulation.product_bf16(a, b, d, settings)
    exact = _values(a, "bf16").astype(np.float64) @ _values(b, "bf16").astype(np.float64)
    return report, np.array_equal(d, exact.astype(np.float32))


PROBES = {
    "transpose": (_transpose, 2),
    "double buffer": (_double_buffer, 3),
    "warp": (_warp, 2),
    "cluster": (_cluster, 2),
    "product": (_product, 1),
}


@pytest.mark.parametrize("races", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("probe", PROBES)
def test_probes_are_right(emulation: Any, probe: str, schedule: int, races: bool) -> None:
    run, _ = PROBES[probe]
    for seed in range(5 if schedule == 1 else 1):
        _, right = run(emulation, emulation.Settings(schedule, seed, races))
        assert right


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("probe", PROBES)
def test_each_barrier_and_wait_is_missed(emulation: Any, probe: str, schedule: int) -> None:
    """The race detector alone sees it, in every schedule, whether the result is wrong or not."""
    run, count = PROBES[probe]
    sites = run(emulation, emulation.Settings(schedule))[0].sites
    assert len(sites) == count
    for site in sites:
        with pytest.raises(RuntimeError, match=r"race: |ends without cluster_sync|never written"):
            run(emulation, emulation.Settings(schedule, skip=site))


@pytest.mark.parametrize("probe", PROBES)
def test_missing_barriers_make_wrong_results(emulation: Any, probe: str) -> None:
    """Without the detector: schedules and poison alone."""
    run, _ = PROBES[probe]
    settings = [(0, 0), (2, 0), *((1, seed) for seed in range(8))]
    for site in run(emulation, emulation.Settings())[0].sites:
        wrong = False
        for schedule, seed in settings:
            try:
                wrong |= not run(emulation, emulation.Settings(schedule, seed, False, site))[1]
            except RuntimeError:  # bytes that were never written
                wrong = True
        # Lanes meet in ldmatrix, too: only the detector knows that this orders nothing.
        assert wrong != (probe == "product"), site


def test_a_block_waits_for_those_that_read_it(emulation: Any) -> None:
    x = _random(1, 4, 64)
    last = emulation.cluster(x, np.empty_like(x), 4, 1, emulation.Settings()).sites[-1]
    for schedule in SCHEDULES:
        with pytest.raises(RuntimeError, match="ends without cluster_sync"):
            emulation.cluster(x, np.empty_like(x), 4, 1, emulation.Settings(schedule, skip=last))


def test_traffic_counts_bytes(emulation: Any) -> None:
    x, out = _random(2, 5, 64, 4), np.empty((2, 64, 4), np.float32)
    report = emulation.double_buffer(x, out, emulation.Settings(1))
    assert report.traffic == {"from": (x.nbytes, 0), "to": (0, out.nbytes)}
    assert report.kernel == "double_buffer"
    report = _transpose(emulation, emulation.Settings())[0]  # the second launch alone
    assert report.traffic == {"from": (3072, 0), "to": (0, 3072)}


# --- What kernels should not do, by its number in probes.h.
FAULTS = {
    0: "thread 37, store_shared .*: 4 bytes at shared offset 1024 of 1024",
    1: "4 bytes at shared offset -4 of 1024",
    2: "8 bytes at shared offset 1020 of 1024",
    3: "shared offset 150 is no multiple of 4",
    4: "shared byte 0 was never written",
    5: "thread 37, load_global .*: byte 256 of from, which has 256",
    6: "no multiple of 16",
    7: "no multiple of 8",
    8: "a store to from, which is for reading",
    9: "load_constant from to, which this launch writes",
    10: "a store to to, which this launch reads by load_constant",
    11: r"shuffle .*diverged: other lanes wait in sync_warp \(probes.h",
    12: r"mma .*diverged: other lanes wait in mma \(probes.h",
    13: "deadlock: .*threads 0 to 4 wait in sync_warp .*threads 5 to 5 have ended",
    14: "deadlock: .*threads 0 to 31 wait in sync_threads .*threads 32 to 63 have ended",
    15: "sync_threads .*diverged",
    16: "ldmatrix_x4 .*lane 0's row: 16 bytes at shared offset -",
    17: "ldmatrix_x4 .*lane 9's row: 16 bytes at shared offset 1016 of 1024",
    18: "copy_async .*shared offset -",
    19: "copy_async .*no multiple of 16",
    20: "load_cluster_shared .*rank 1 of a cluster of 1",
    23: "copy_async .*no multiple of 16",
    24: "16 bytes of global memory in no buffer: byte 240 of from, which has 248",
}
FINE = {21: "copy_async from nowhere that is not valid", 22: "ldmatrix of unwritten bytes"}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported(emulation: Any, fault: int) -> None:
    data, out = np.zeros(62 if fault == 24 else 64, np.float32), np.zeros(64, np.float32)
    with pytest.raises(RuntimeError, match=FAULTS[fault]) as raised:
        emulation.fault(fault, data, out, emulation.Settings())
    assert "kernel fault: " in str(raised.value)
    assert "block (0, 0, 0)" in str(raised.value)
    for schedule in (1, 2):  # another thread may be the first to do it
        with pytest.raises(RuntimeError):
            emulation.fault(fault, data, out, emulation.Settings(schedule))


@pytest.mark.parametrize("fine", FINE)
def test_what_is_fine_is_not_reported(emulation: Any, fine: int) -> None:
    data, out = np.zeros(64, np.float32), np.zeros(64, np.float32)
    emulation.fault(fine, data, out, emulation.Settings())
    emulation.own(out, emulation.Settings())
    assert (out == 4).all()


# --- Races: two accesses by two threads, of one warp or of two, with one thing between them.
STORE, LOAD, MATRIX, COPY = range(4)
PAIRS = [
    (STORE, STORE),
    (STORE, LOAD),
    (LOAD, STORE),
    (STORE, MATRIX),
    (MATRIX, STORE),
    (LOAD, COPY),
]
NOTHING, SYNC_WARP, SYNC_THREADS, SHUFFLE = range(4)
WAIT_WITHOUT_COMMIT, WAIT_FOR_ANOTHER, WAIT, WAIT_AND_SYNC, SYNC_AND_WAIT = range(4, 9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pair", PAIRS)
def test_races(emulation: Any, pair: tuple[int, int], schedule: int) -> None:
    data = np.zeros(64, np.float32)

    def races(
        other: int, offset: int, between: int, first: int = pair[0], second: int = pair[1]
    ) -> bool:
        settings = emulation.Settings(schedule)
        try:
            emulation.race(first, second, other, offset, between, data, settings)
        except RuntimeError as e:
            if "race: " not in str(e):
                raise
            return True
        return False

    same_warp, other_warp = 9, 41
    for thread in (same_warp, other_warp):
        assert races(thread, 0, NOTHING)
        assert races(thread, 0, SHUFFLE)
        assert not races(thread, 0, SYNC_THREADS)
    assert not races(same_warp, 0, SYNC_WARP)
    assert races(other_warp, 0, SYNC_WARP)
    if MATRIX not in pair and COPY not in pair:
        assert not races(0, 0, NOTHING)  # itself
        assert not races(other_warp, 2, NOTHING)  # the bytes next to it


@pytest.mark.parametrize("then", [STORE, LOAD, MATRIX, COPY])
@pytest.mark.parametrize("between", [NOTHING, SYNC_THREADS, WAIT_WITHOUT_COMMIT, WAIT_FOR_ANOTHER])
def test_a_copy_without_its_wait_is_a_race(emulation: Any, then: int, between: int) -> None:
    data = np.zeros(64, np.float32)
    for other in (0, 9, 41):
        with pytest.raises(RuntimeError, match=r"race: .*copy_async"):
            emulation.race(COPY, then, other, 0, between, data, emulation.Settings())


@pytest.mark.parametrize("then", [STORE, LOAD, COPY])
@pytest.mark.parametrize("other", [9, 41])
def test_after_its_wait_a_copy_is_a_store(emulation: Any, other: int, then: int) -> None:
    data = np.zeros(64, np.float32)
    emulation.race(COPY, then, 0, 0, WAIT, data, emulation.Settings())
    emulation.race(COPY, then, other, 0, WAIT_AND_SYNC, data, emulation.Settings())
    for between in (WAIT, SYNC_AND_WAIT):
        with pytest.raises(RuntimeError, match=r"race: .*written by thread 0"):
            emulation.race(COPY, then, other, 0, between, data, emulation.Settings())


@pytest.mark.parametrize("other", [9, 41])
def test_a_store_races_with_every_reader(emulation: Any, other: int) -> None:
    for schedule in SCHEDULES:
        emulation.readers(other, SYNC_THREADS, emulation.Settings(schedule))
        for between in (NOTHING, SYNC_WARP):
            if (other, between) == (9, SYNC_WARP):  # of one warp
                emulation.readers(other, between, emulation.Settings(schedule))
                continue
            with pytest.raises(RuntimeError, match="race: "):
                emulation.readers(other, between, emulation.Settings(schedule))


def test_poison(emulation: Any) -> None:
    """Of bytes that nobody wrote, in every block, and, in schedule 1, of a copy under way."""
    data = np.ones((32, 4), np.float32)
    for schedule in SCHEDULES:
        found = np.zeros((3, 2, 32), np.uint32)
        emulation.poison(data, found, emulation.Settings(schedule, races=False))
        assert (found[:, 0] == 0xFFFFFFFF).all()
        assert (found[:, 1] == (0xFFFFFFFF if schedule == 1 else data.view(np.uint32)[0, 0])).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("store_first", [True, False])
def test_races_between_blocks(emulation: Any, store_first: bool, schedule: int) -> None:
    nothing, sync_threads, cluster_sync = range(3)
    emulation.cluster_race(store_first, cluster_sync, emulation.Settings(schedule))
    for between in (nothing, sync_threads):
        with pytest.raises(RuntimeError, match=r"race: .*without cluster_sync between"):
            emulation.cluster_race(store_first, between, emulation.Settings(schedule))


def test_loads_do_not_race(emulation: Any) -> None:
    data = np.zeros(64, np.float32)
    emulation.race(LOAD, LOAD, 41, 0, NOTHING, data, emulation.Settings())
    emulation.race(LOAD, MATRIX, 41, 0, NOTHING, data, emulation.Settings())
