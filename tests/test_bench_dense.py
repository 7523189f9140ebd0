"""The levels of dense backbones and of the paper's Figure 2: cases, measuring, memory, reports."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from casvit_kernels import benchmark

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.harness import compare, process_memory  # noqa: E402
from bench.harness import results as harness_results  # noqa: E402
from bench.harness.case import GPU_CHOICE, Case, Choice, Settings, names  # noqa: E402
from bench.harness.results import Measured, write  # noqa: E402
from bench.levels import test_dense as dense_level  # noqa: E402
from bench.levels import test_dense_mixer as dense_mixer_level  # noqa: E402
from bench.levels import test_figure2 as figure2_level  # noqa: E402
from bench.report import command, dense, dense_digits, figure2  # noqa: E402
from bench.report.documents import ReportError  # noqa: E402
from bench.report.load import load_digits  # noqa: E402

SETTINGS = Settings(rounds=2, min_round_seconds=0.0, backend="reference", pause_seconds=0.0)
QUICK = dataclasses.replace(SETTINGS, quick=True)
FIGURE2, PERFORMANCE = "docs/mixers.md", "docs/performance.md"


# Cases


def test_figure_2_has_the_stages_and_larger_maps():
    cases = figure2_level.cases(Choice())
    assert [(c.stage, c.channels, c.size) for c in cases] == [
        (1, 48, 56), (2, 56, 28), (3, 112, 14), (4, 220, 7), (1, 48, 112), (1, 48, 224), (1, 48, 448),
    ]  # fmt: skip
    assert len({c.id for c in cases}) == 7
    assert figure2_level.cases(Choice(models=("t",))) == []
    assert figure2_level.cases(GPU_CHOICE) == []


@pytest.mark.parametrize(
    ("size", "absent"),
    [
        (56, []),
        (112, []),
        (224, ["self-attention"]),
        (448, ["self-attention", "self-attention sdpa"]),
    ],
)
def test_self_attention_that_is_too_large_is_left_out(size, absent):
    case = Case("figure2", "xs", 1, 48, size, 1, "float32")
    reasons = {n: figure2_level.why_not(n, case) for n in figure2_level.MIXERS}
    assert [n for n, reason in reasons.items() if reason] == absent
    if absent:
        assert "GiB, more than 8 GiB" in reasons["self-attention"]


def test_dense_backbones_at_the_sizes_of_detectors_and_segmenters():
    cases = dense_level.cases(Choice(models=("xs",)))
    shapes = [(2, 3, 800, 1333), (1, 3, 800, 1333), (1, 3, 512, 512), (2, 3, 512, 512)]
    assert sorted(c.shape for c in cases) == sorted(shapes)
    assert len({c.id for c in cases}) == 4
    mixers = dense_mixer_level.cases(Choice(models=("xs",), batches=(1,)))
    found = {c.stage: c.shape for c in mixers if c.batch == 1 and c.width is not None}
    assert found == {
        1: (1, 48, 200, 334), 2: (1, 56, 100, 167), 3: (1, 112, 50, 84), 4: (1, 220, 25, 42),
    }  # fmt: skip
    assert dense_level.cases(GPU_CHOICE) == dense_mixer_level.cases(GPU_CHOICE) == []


@torch.no_grad()
def test_maps_are_those_of_the_backbone():
    sizes = [out.shape[2:] for out in dense_level.backbone("xs").eval()(torch.randn(1, 3, 70, 101))]
    assert sizes == [dense_mixer_level.maps(stage, 70, 101) for stage in (1, 2, 3, 4)]


# Measuring


@pytest.fixture
def small(monkeypatch):
    """Stage 4 of rcvit_xs alone."""
    (case, _) = figure2_level.cases(Choice(quick=True, models=("xs",)))
    return case


def test_figure_2_is_timed_in_turn_with_what_it_costs(small):
    found = figure2_level.run(small, names(figure2_level, small, False), QUICK)
    assert found.refused is None
    assert found.timings.keys() == set(figure2_level.NAMES)
    rows = {row["candidate"]: row for row in found.as_json()["rows"]}
    assert rows["fused"]["macs"] == rows["catm"]["macs"]
    dim = small.channels
    assert rows["separable"]["parameters"] == 3 * dim * dim + 3 * dim + dim + 1
    assert rows["self-attention"]["macs"] == rows["self-attention sdpa"]["macs"]
    assert rows["fused"]["max_error"] < 1e-5


def test_a_fused_mixer_that_is_wrong_is_not_timed(small, monkeypatch):
    build = figure2_level.build

    def wrong(name, *arguments):
        made = build(name, *arguments)
        if name != "fused":
            return made
        return made._replace(run=torch.nn.Sequential(made.run, torch.nn.ReLU()))

    monkeypatch.setattr(figure2_level, "build", wrong)
    found = figure2_level.run(small, ["catm", "fused"], QUICK)
    assert "parity failed" in found.refused
    assert not found.timings


DENSE = ["eager", "eager channels_last", "fused", "fused channels_last"]


def test_a_dense_backbone_is_compared_in_all_its_maps(monkeypatch):
    (case,) = dense_level.cases(Choice(quick=True, models=("xs",)))
    found = dense_level.run(case, DENSE, QUICK)
    assert found.refused is None
    assert list(found.timings) == DENSE
    assert max(found.errors.values()) < 1e-4

    calls = dense_level.model_candidates

    def last_map_wrong(*arguments, **options):
        made = calls(*arguments, **options)
        fused = made["fused"]
        made["fused"] = lambda: [*fused()[:3], fused()[3] * 1.01]
        return made

    monkeypatch.setattr(dense_level, "model_candidates", last_map_wrong)
    found = dense_level.run(case, DENSE, QUICK)
    assert "fused: max error" in found.refused
    assert not found.timings


def test_the_mixer_of_a_stage_that_is_no_square():
    (case,) = dense_mixer_level.cases(Choice(quick=True, models=("xs",)))
    assert case.shape == (1, 220, 2, 3)
    found = dense_mixer_level.run(case, ["eager", "fused"], QUICK)
    assert found.refused is None
    assert found.timings.keys() == {"eager", "fused"}


@pytest.mark.long
def test_onnx_runtime_gives_all_maps():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from casvit_kernels.models import Config, RCViT

    model = RCViT(Config((1, 1, 1, 1), (4, 4, 8, 8)), fork_feat=True).eval()
    x = torch.randn(1, 3, 64, 32)
    calls = benchmark.model_candidates(model, x, include=["onnxruntime"])
    with torch.inference_mode():
        got, expected = dense_level.joined(calls["onnxruntime"]()), dense_level.joined(model(x))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# Memory


def filled(mebibytes):
    """For `of_process`: nothing to warm up, then a block of memory that is written to."""
    return lambda: None, lambda: torch.ones(mebibytes << 20, dtype=torch.int8)


needs_proc = pytest.mark.skipif(
    not process_memory.RESET.exists(), reason="memory is read from /proc"
)


@needs_proc
def test_memory_of_a_call_is_what_it_writes_to_at_most():
    def twice():
        for _ in range(2):
            block = torch.ones(64 << 20, dtype=torch.int8)
            del block

    assert 63 << 20 <= process_memory.measured(twice) < 80 << 20  # one after the other, not both
    assert process_memory.measured(lambda: None) < 1 << 20


@needs_proc
@pytest.mark.long
def test_memory_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    peak = process_memory.of_process("test_bench_dense:filled", mebibytes=48)
    assert 47 << 20 <= peak < 64 << 20
    with pytest.raises(benchmark.Unavailable, match=r"its process failed: .*'wrong'"):
        process_memory.of_process("test_bench_dense:filled", wrong=1)


def test_where_the_system_does_not_tell_memory_is_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(process_memory, "RESET", tmp_path / "none")
    with pytest.raises(benchmark.Unavailable, match="/proc"):
        process_memory.of_process("test_bench_dense:filled", mebibytes=1)


def test_what_is_weighed_can_run():
    """In this process, small: the calls that `of_process` makes in another one."""
    for warm, call in (
        figure2_level.memory_calls("fused", 8, 8, "reference"),
        figure2_level.memory_calls("self-attention", 8, 8, "reference"),
        dense_level.step_calls("fused", "xs", [1, 3, 64, 64], "reference"),
    ):
        warm()
        call()


# Reports


@pytest.fixture
def checkout(tmp_path):
    """A tree with a README that has the markers, and no results."""
    (tmp_path / "README.md").write_text(f"# Title\n\n{command.BEGIN}\nold\n{command.END}\n")
    return tmp_path


@pytest.fixture
def publish(checkout, monkeypatch):
    """Writes results as if AMX kernels had made them, and reports them."""

    def publish(*found):
        environment = {**benchmark.environment(), "isa": "amx"}
        monkeypatch.setattr(harness_results.benchmark, "environment", lambda device: environment)
        write(checkout / "bench" / "results", list(found), Settings(rounds=2))
        return command.main(["--root", str(checkout)])

    return publish


def result(case, absent=None, facts=None, peaks=None, **medians_ms):
    found = Measured(case, absent=absent or {})
    for name, ms in medians_ms.items():
        name, s = name.replace("_", " ").replace("channels last", "channels_last"), ms / 1e3
        found.timings[name] = benchmark.Timing(s, 0.9 * s, 1.1 * s, 15, 3, (s,))
        found.row_facts[name] = {
            "macs": 2_000_000,
            "parameters": 1234,
            **(facts or {}).get(name, {}),
        }
        if name in (peaks or {}):
            found.memory[name] = {"peak_bytes": peaks[name]}
    return found


def row(checkout, start, path, after="\n"):
    text = (checkout / path).read_text().partition(after)[2]
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def grown(size, ms, **more):
    case = Case("figure2", "xs", 1, 48, size, 1, "float32")
    return result(case, fused=ms, catm=4 * ms, **more)


def test_without_results_nothing_is_claimed(checkout):
    assert command.main(["--root", str(checkout)]) == 0
    assert "Any CPU: not measured." in (checkout / FIGURE2).read_text()
    text = (checkout / PERFORMANCE).read_text()
    assert "Any CPU: not measured." in text.partition("## Dense backbones")[2]
    root = ElementTree.parse(checkout / "docs" / "mixers.svg").getroot()
    assert "not measured" in "".join(root.itertext())


def test_the_page_of_figure_2(checkout, publish):
    why = {"self-attention": "at 112x112 its scores take 99 GiB, more than 8 GiB"}
    found = grown(
        112, 2.0, fused_channels_last=1.0, separable=3.0, absent=why, peaks={"fused": 1 << 21}
    )
    assert publish(found) == 0
    text = (checkout / FIGURE2).read_text()
    cells = row(checkout, "CATM, fused ", FIGURE2)
    assert cells == [
        "CATM, fused",
        "1,234",
        "2.0",
        "1",
        "not measured",
        "1.00x",
    ]  # the faster layout
    assert row(checkout, "separable", FIGURE2)[3:] == ["3", "not measured", "3.00x"]
    assert row(checkout, "self-attention ", FIGURE2)[1:] == ["not measured"] * 5
    assert "self-attention not measured: at 112x112 its scores take 99 GiB" in text
    assert "56 x 56: not measured." in text
    assert (
        "speed-up"
        not in (checkout / "bench/results/README.md").read_text().partition("## figure2")[2]
    )
    assert command.main(["--root", str(checkout), "--check"]) == 0


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ((1.0, 4.08, 16.0), "met, 1.02 at worst (to 224; 2 of 2 measured)"),
        ((1.0, 4.0, 17.0), "missed, 1.06 at worst (to 448; 2 of 2 measured)"),
        ((1.0, 4.0), "met where measured, 1.00 at worst (to 224; 1 of 2 measured)"),
        ((1.0,), "not measured"),
    ],
)
def test_the_verdict_on_linear_growth(checkout, publish, milliseconds, expected):
    found = [grown(n, ms) for n, ms in zip((112, 224, 448), milliseconds, strict=False)]
    assert publish(*found) == 0
    (line,) = (x for x in (checkout / FIGURE2).read_text().splitlines() if "four times" in x)
    assert line.endswith(f"(goal: at most 1.05 times as long): {expected}")


def test_the_picture_has_a_line_for_each_mixer_that_was_measured(checkout, publish):
    publish(grown(56, 0.25), grown(112, 1.0), grown(224, 4.0), grown(448, 16.0, separable=20.0))
    root = ElementTree.parse(checkout / "docs" / "mixers.svg").getroot()
    lines = {
        e.get("stroke"): e.get("points").split() for e in root.iter() if e.tag.endswith("polyline")
    }
    assert lines.keys() == {figure2.COLOURS[name] for name in ("fused", "catm", "separable")}
    points = [tuple(map(float, p.split(","))) for p in lines[figure2.COLOURS["fused"]]]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(points)]
    assert len(points) == 4
    for across, up in steps:  # linear growth is a straight line there
        assert (across, up) == pytest.approx(steps[0], abs=0.2)
        assert across > 0 > up


BACKBONE = Case("dense", "xs", None, 3, 800, 2, "float32", 1333)


def test_the_table_of_dense_backbones(checkout, publish):
    facts = {"eager": {"step_peak_bytes": 300 << 20}, "fused": {"step_peak_bytes": 100 << 20}}
    found = result(
        BACKBONE, facts=facts, eager=9.0, eager_channels_last=8.0, compile=7.0, onnxruntime=6.0,
        fused=5.0, fused_channels_last=4.0, fused_network=3.0,
    )  # fmt: skip
    mixer = result(Case("dense-mixer", "xs", 2, 56, 100, 2, "float32", 167), eager=9.0, fused=2.0)
    assert publish(found, mixer) == 0
    after = "## Dense backbones"
    cells = row(checkout, "rcvit_xs, 800x1333, batch 2", PERFORMANCE, after)
    assert cells[1:] == ["8", "7", "6", "4", "3", "**2.00x**", "300", "100", "3.00x"]
    assert set(row(checkout, "rcvit_xs, 512x512, batch 1", PERFORMANCE, after)[1:]) == {
        "not measured"
    }
    stages = row(checkout, "rcvit_xs, 800x1333, batch 2", PERFORMANCE, "| speed-up of the mixer |")
    assert stages[1:] == ["not measured", "4.50x", "not measured", "not measured"]
    complete = (checkout / "bench/results/README.md").read_text()
    assert "xs whole model, (2, 3, 800, 1333)" in complete
    assert "xs stage 2, (2, 56, 100, 167)" in complete


def test_a_refused_backbone_has_no_figures(checkout, publish):
    assert publish(Measured(BACKBONE, refused="parity failed")) == 0
    cells = row(checkout, "rcvit_xs, 800x1333, batch 2", PERFORMANCE, "## Dense backbones")
    assert set(cells[1:]) == {"refused"}


def test_report_and_levels_agree():
    """The report imports nothing but Python; what it repeats is what the levels measure."""
    assert dense.SIZES == dense_level.SIZES
    assert dense.BATCHES == dense_level.BATCHES
    assert dense.STRIDES == dense_mixer_level.STRIDES
    assert {dense.LEVEL, dense.MIXERS} == {dense_level.LEVEL, dense_mixer_level.LEVEL}
    assert set(dense_level.NAMES) == {name for names in dense.COLUMNS.values() for name in names}
    assert figure2.LEVEL == figure2_level.LEVEL
    assert (figure2.MAPS, figure2.GROWTH) == (figure2_level.MAPS, figure2_level.GROWTH)
    assert list(figure2.TITLES) == list(figure2.COLOURS) == list(figure2_level.MIXERS)


@pytest.mark.long
@pytest.mark.parametrize("level", ["figure2", "dense_mixer"])
def test_the_command_writes_json(tmp_path, level):
    subprocess.run(
        [sys.executable, "-m", "pytest", f"bench/levels/test_{level}.py", "--benchmark-only", "--quick",
         "--models", "xs", "--backend", "reference", "--json-dir", str(tmp_path), "-q"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert all("refused" not in case for case in document["cases"])


# Digits: bench/accuracy/dense.py


def digits(**scores):
    """What the script writes, of segmentation alone."""
    environment = {
        "cpu": "a CPU", "isa": "avx2", "casvit_kernels": "1", "torch": "2", "date": "2026-11-29T00:00",
    }  # fmt: skip
    runs = {n: {"miou": s, "accuracy": 99.0, "environment": environment} for n, s in scores.items()}
    return {"segmentation": runs}


@pytest.mark.parametrize(
    ("fused", "reference", "enough", "alike"),
    [
        (86.0, 85.5, "met", "met (0.5)"),
        (86.0, 84.5, "met", "missed (1.5)"),
        (84.5, 86.0, "met", "missed (1.5)"),
        (80.2, 79.9, "missed", "met (0.3)"),
    ],
)
def test_the_table_of_digits_judges_both(fused, reference, enough, alike):
    lines = dense_digits.digits_table(digits(fused=fused, reference=reference))
    assert f"| segmentation, mIoU | {fused} | {reference} | {fused - reference:+.1f} |" in lines
    assert "| detection, AP50 | not measured | not measured | not measured |" in lines
    (verdict,) = (line for line in lines if line.startswith("- "))
    assert f"with both: {enough};" in verdict
    assert verdict.endswith(alike)


def test_half_of_the_digits_is_no_verdict():
    lines = dense_digits.digits_table(digits(fused=90.0))
    assert "| segmentation, mIoU | 90.0 | not measured | not measured |" in lines
    assert not [line for line in lines if line.startswith("- ")]


def test_a_broken_file_of_digits_is_said(tmp_path):
    (tmp_path / "dense_digits.json").write_text('{"segmentation": []}')
    with pytest.raises(
        ReportError, match=r"dense_digits.json: expected what bench/accuracy/dense.py"
    ):
        load_digits(tmp_path)


# Parity


@pytest.mark.parametrize(
    ("name", "error", "refused"),
    [
        ("fused", 1.9e-4, False),
        ("fused", 2.1e-4, True),
        ("fused channels_last", 2.1e-4, False),  # PyTorch is less exact in this layout
        ("fused channels_last", 6.1e-4, True),
        ("fused compile channels_last", 6.1e-4, True),
        ("fused channels_last", float("nan"), True),
    ],
)
def test_a_layout_is_judged_by_eager_in_that_layout(name, error, refused):
    measured = Measured(BACKBONE)
    measured.errors = {"eager": 1e-4, "eager channels_last": 3e-4, name: error}
    said = compare.refusal(BACKBONE, measured, "eager", (torch.ones(1),))
    assert (said is not None) == refused
    if refused:
        assert f"{name}: max error" in said
