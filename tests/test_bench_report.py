"""From a measurement to JSON, README table and picture; and what is refused on the way."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from casvit_kernels import benchmark
from casvit_kernels.ops.mixer.reference import AdditiveTokenMixer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.harness import results as harness_results  # noqa: E402
from bench.harness.case import Case, Settings  # noqa: E402
from bench.harness.measure import measure  # noqa: E402
from bench.harness.results import Measured, write  # noqa: E402
from bench.harness.statistics import randomise_statistics  # noqa: E402
from bench.report import command as report  # noqa: E402
from bench.report.load import COREML, KEPT  # noqa: E402

PERFORMANCE = "docs/performance.md"
CASE = Case("mixer", "xs", 1, 5, 6, 8, "float32")
SETTINGS = Settings(rounds=2, min_round_seconds=0.0)
FAST = ("eager", "fused")


@pytest.fixture
def candidates():
    """Plain mixer, input, and candidates of which the fused one is the reference too."""
    mixer = randomise_statistics(AdditiveTokenMixer(5))
    x = torch.randn(8, 5, 6, 6)
    return mixer, x, benchmark.mixer_candidates(mixer, x, include=FAST, backend="reference")


def _measured(**medians_ms):
    """A result with these medians; None: the candidate is absent."""
    found = Measured(CASE)
    for name, ms in medians_ms.items():
        name = name.replace("_", " ")
        if ms is None:
            found.absent[name] = "not installed: onnxruntime"
        else:
            s = ms / 1e3
            found.timings[name] = benchmark.Timing(s, 0.9 * s, 1.1 * s, 15, 3, (s,))
            found.errors[name] = 1e-7
    return found


@pytest.fixture
def checkout(tmp_path):
    """A tree with a README that has the markers, and no results."""
    text = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def _publish(checkout, measured, settings=SETTINGS):
    (path,) = write(checkout / "bench" / "results", [measured], settings)
    return path


def _run(checkout, *arguments):
    return report.main(["--root", str(checkout), *arguments])


def _row(checkout, start, path="README.md", isa=None):
    """The cells of the row that begins so; in docs/performance.md of one instruction set, if given."""
    text = (checkout / path).read_text()
    if isa is not None:
        (text,) = (s for s in text.split("\n## ") if s.startswith(f"CPU, {isa}\n"))
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_passes_parity_is_timed_and_written(candidates, tmp_path):
    measured = measure(CASE, *candidates, SETTINGS)
    (path,) = write(tmp_path, [measured], SETTINGS)
    document = json.loads(path.read_text())
    isa = benchmark.environment()["isa"]  # None without the native library
    assert path.name == (f"mixer-xs-cpu-{isa}.json" if isa else "mixer-xs-cpu.json")
    assert document["environment"]["torch"] == torch.__version__
    (case,) = document["cases"]
    assert dataclasses.asdict(CASE).items() <= case.items()
    assert [row["candidate"] for row in case["rows"]] == list(FAST)
    for row in case["rows"]:
        assert 0 < row["p25_s"] <= row["median_s"] <= row["p75_s"]
        assert row["rounds"] == 2
        assert row["max_error"] < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: out * 1.001,
        lambda out: out + float("nan"),
        lambda out: out[:1],
        lambda out: out.roll(1, 0),
    ],
    ids=["scaled", "nan", "shape", "images swapped"],
)
def test_a_fused_candidate_that_fails_parity_gets_no_row(candidates, tmp_path, wrong):
    mixer, x, calls = candidates
    fused, eager = calls["fused"], calls["eager"]
    timed = []

    def counted_eager():
        timed.append(1)
        return eager()

    calls = {"eager": counted_eager, "fused": lambda: wrong(fused())}
    measured = measure(CASE, mixer, x, calls, SETTINGS)
    assert "parity failed" in measured.refused
    assert "fused: max error" in measured.refused
    assert measured.timings == {}
    assert len(timed) == 1  # compared once, never timed
    (path,) = write(tmp_path, [measured], SETTINGS)
    (case,) = json.loads(path.read_text())["cases"]
    assert case["refused"] == measured.refused
    assert "rows" not in case


def test_bf16_is_judged_against_autocast(tmp_path):
    mixer, x = AdditiveTokenMixer(5), torch.randn(8, 5, 6, 6)
    include = [name + benchmark.BF16 for name in FAST]
    calls = benchmark.mixer_candidates(mixer, x, include=include, backend="reference")
    case = dataclasses.replace(CASE, dtype="bfloat16")
    assert measure(case, mixer, x, calls, SETTINGS).refused is None
    calls["fused bf16"] = lambda: mixer.eval()(x) * 1.1
    assert "fused bf16" in measure(case, mixer, x, calls, SETTINGS).refused


TRAINING = dataclasses.replace(CASE, level="training")


@pytest.mark.parametrize("level", ["training", "training-forward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_compared_with_float64_before_it_is_timed(level, dtype):
    mixer, x = AdditiveTokenMixer(5), torch.randn(8, 5, 6, 6)
    suffix = benchmark.BF16 if dtype == "bfloat16" else ""
    calls = benchmark.training_candidates(
        mixer,
        x,
        backward=level == "training",
        include=[name + suffix for name in FAST],
        backend="reference",
    )
    case = dataclasses.replace(CASE, level=level, dtype=dtype)
    measured = measure(case, mixer, x, calls, SETTINGS)
    assert measured.refused is None
    assert list(measured.timings) == [name + suffix for name in FAST]


@pytest.mark.parametrize("which", [0, 1, 2, -1], ids=["out", "x", "first", "last"])
def test_one_wrong_gradient_is_enough_to_refuse(which):
    mixer, x = AdditiveTokenMixer(5), torch.randn(8, 5, 6, 6)
    calls = benchmark.training_candidates(mixer, x, include=FAST, backend="reference")
    right = calls["fused"]

    def wrong():
        tensors = list(right())
        tensors[which] = tensors[which] * 1.001
        return tuple(tensors)

    measured = measure(TRAINING, mixer, x, {**calls, "fused": wrong}, SETTINGS)
    assert "parity failed" in measured.refused


def _moved(mixer, x, move):
    """The mixer whose ReLUs of q see `move` of their inputs, one training step as a candidate."""
    mixer = copy.deepcopy(mixer)
    norm = next(m for m in mixer.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, args, out: move(out))
    return benchmark.training_candidates(mixer, x, include=["eager"])["eager"]


def _across_the_kink(out):
    """The input that is nearest to 0 moves to the other side."""
    flat = out.detach().flatten()
    nearest = flat.abs().argmin()
    assert flat[nearest].abs() < 1e-5 * flat.abs().max()
    step = torch.zeros_like(flat)
    step[nearest] = -2 * flat[nearest]
    return out + step.view_as(out)


@pytest.mark.parametrize(
    ("move", "passes"),
    [
        (_across_the_kink, True),
        # The values of the inputs, the gradients of their neighbours.
        (lambda out: out.detach() + (out - out.detach()).roll(1, 3), False),
    ],
    ids=["within rounding of 0", "of the neighbour"],
)
def test_a_relu_input_within_rounding_of_0_may_fall_on_either_side(move, passes):
    torch.manual_seed(0)
    mixer, x = AdditiveTokenMixer(40), torch.randn(8, 40, 48, 48)
    calls = benchmark.training_candidates(mixer, x, include=["eager"])
    measured = measure(TRAINING, mixer, x, {**calls, "fused": calls["eager"]}, SETTINGS)
    assert measured.refused is None
    calls["fused"] = _moved(mixer, x, move)
    measured = measure(TRAINING, mixer, x, calls, SETTINGS)
    assert (measured.refused is None) == passes, measured.refused


def test_the_training_column_shows_the_ratio_of_steps(checkout):
    forward = _measured(eager=8.0, fused=2.0)
    step = _measured(eager=9.0, compile=6.0, fused=2.0)
    step.case = TRAINING
    write(checkout / "bench" / "results", [forward, step], SETTINGS)
    assert _run(checkout) == 0
    assert _row(checkout, "mixer training step, xs stage 1")[1:4] == [
        "2",
        "6 (compile)",
        "**3.00x**",
    ]
    assert _row(checkout, "mixer, xs stage 1", PERFORMANCE)[7] == "3.00x"


def test_a_machine_is_named_once_with_the_days_it_was_measured(checkout):
    forward, step = (_measured(eager=8.0, fused=2.0) for _ in range(2))
    step.case = TRAINING
    results = checkout / "bench" / "results"
    write(results, [forward, step], SETTINGS)
    for path, day in zip(sorted(results.glob("*.json")), ("2026-03-02", "2026-03-01"), strict=True):
        document = json.loads(path.read_text())
        document["environment"]["date"] = f"{day}T12:00:00+00:00"
        path.write_text(json.dumps(document))
    assert _run(checkout) == 0
    for name in ("README.md", PERFORMANCE, "docs/bench.svg"):
        text = (checkout / name).read_text()
        assert "2026-03-01 and 2026-03-02" in text
        assert text.count(f"torch {torch.__version__}") == 1


def test_table_shows_the_medians_the_best_baseline_and_both_ratios(checkout, capsys):
    _publish(checkout, _measured(eager=8.0, compile=5.0, onnxruntime=4.0, fused=2.0))
    assert _run(checkout) == 0
    figures = ["2", "4 (onnxruntime)", "**2.00x**", "4.00x"]
    assert _row(checkout, "mixer, xs stage 1")[1:] == figures
    assert _row(checkout, "mixer, t stage 4")[1:] == ["not measured"] * 4
    assert _row(checkout, "whole rcvit_xs, batch 1")[1:] == ["not measured"] * 4
    row = _row(checkout, "mixer, xs stage 1", PERFORMANCE)
    assert row[1:] == [*figures, *["not measured"] * 4]
    assert _row(checkout, "mixer, t stage 1", PERFORMANCE)[1:] == ["not measured"] * 8
    text, more = (checkout / "README.md").read_text(), (checkout / PERFORMANCE).read_text()
    assert "Any GPU: not measured" in more
    assert text.startswith("# Title\n")
    assert text.endswith("\nafter\n")
    environment = benchmark.environment()
    for fact in (environment["torch"], environment["cpu"], environment["date"][:10]):
        assert fact in text
        assert fact in more
    complete = (checkout / "bench" / "results" / "README.md").read_text()
    assert "| 2 (1.8 to 2.2) | 2.00x |" in complete
    assert _run(checkout, "--check") == 0


def test_each_instruction_set_has_its_own_figures(checkout, monkeypatch):
    """README's table and picture are of the best one; docs/performance.md has all of them."""
    environment = benchmark.environment()
    for isa, fused in (("avx512", 2.0), ("amx", 1.0)):
        found = {**environment, "isa": isa, "cpu": f"CPU with {isa}"}
        monkeypatch.setattr(
            harness_results.benchmark, "environment", lambda device, found=found: found
        )
        forward, step = (_measured(eager=8.0, fused=fused) for _ in range(2))
        step.case = TRAINING
        write(checkout / "bench" / "results", [forward, step], SETTINGS)
    names = {path.name for path in (checkout / "bench" / "results").iterdir()}
    assert {"mixer-xs-cpu-amx.json", "mixer-xs-cpu-avx512.json"} <= names
    assert _run(checkout) == 0
    assert _row(checkout, "mixer, xs stage 1")[1] == "1"
    readme = (checkout / "README.md").read_text()
    assert "CPU with amx" in readme
    assert "avx512" not in readme
    more = (checkout / PERFORMANCE).read_text()
    for isa, fused, speed_up in (("amx", "1", "8.00x"), ("avx512", "2", "4.00x")):
        row = _row(checkout, "mixer, xs stage 1", PERFORMANCE, isa)
        assert row[1:4] == [fused, "8 (eager)", f"**{speed_up}**"]
        assert row[5:] == ["not measured", "not measured", speed_up, "not measured"]
        others = _row(checkout, "mixer, xs stage 2", PERFORMANCE, isa)
        assert others[1:] == ["not measured"] * 8
        assert f"\n## CPU, {isa}\n\nCPU with {isa} ({isa} kernels)" in more
    picture = (checkout / "docs" / "bench.svg").read_text()
    assert "8.00x" in picture
    assert "avx512" not in picture


KEPT_ROW = {
    "model": "xs",
    "stage": 1,
    "shape": [2, 48, 56, 56],
    "eager_bytes": 3000,
    "fused_bytes": 400,
}


def test_the_memory_kept_for_the_backward_has_a_table(checkout, capsys):
    results = checkout / "bench" / "results"
    results.mkdir(parents=True)
    assert _run(checkout) == 0
    complete = results / "README.md"
    assert "Memory" not in complete.read_text()
    path = results / KEPT
    path.write_text(json.dumps({"torch": "2.15.0", "rows": [KEPT_ROW]}))
    assert _run(checkout, "--check") == 1
    assert _run(checkout) == 0
    assert "## Memory kept for the backward" in complete.read_text()
    assert "| xs stage 1, (2, 48, 56, 56) | 3,000 | 400 | 7.5x |" in complete.read_text()
    path.write_text('{"torch": "2.15.0"}')
    capsys.readouterr()
    assert _run(checkout) == 2
    assert KEPT in capsys.readouterr().err


def test_the_accuracy_of_packages_is_shown_where_they_are_described(checkout, capsys):
    row = {"case": "fp16", "images": 8, "megabytes": 6.894, "max_error": 0.0115}
    row |= {"mean_error": 0.00207, "relative_rms": 0.00178, "same_top_class": 7}
    trained = [row | {"right": 6, "right_float64": 8}]
    results = checkout / "bench" / "results"
    results.mkdir(parents=True)
    measured = {"torch": "2.15.0", "coremltools": "9.0", "tiny": [row], "digits": trained}
    (results / COREML).write_text(json.dumps(measured))
    assert _run(checkout) == 2
    assert "docs/coreml.md" in capsys.readouterr().err
    page = checkout / "docs" / "coreml.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*report.COREML_MARKS))
    assert _run(checkout) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| tiny, fp16 | 6.89 | 0.011 | 0.0021 | 0.18 % | 7 of 8 |\n" in text
    assert "| fp16 | 6.89 | 0.011 | 0.0021 | 0.18 % | 7 of 8 | 6 of 8 |\n" in text
    page.write_text(text.replace("6 of 8", "8 of 8"))
    assert _run(checkout, "--check") == 1


def test_absent_baselines_are_shown_with_the_reason(checkout):
    _publish(checkout, _measured(eager=8.0, compile=5.0, onnxruntime=None, fused=2.0))
    assert _run(checkout) == 0
    assert _row(checkout, "mixer, xs stage 1")[2] == "5 (compile)"
    assert _row(checkout, "mixer, xs stage 1", PERFORMANCE)[2] == "5 (compile)"
    for path in ("README.md", PERFORMANCE, "bench/results/README.md"):
        text = (checkout / path).read_text()
        assert "onnxruntime not measured: not installed: onnxruntime" in text, path


def test_refused_cases_are_shown_as_such(checkout):
    measured = Measured(CASE, refused="parity failed, nothing was timed: fused")
    _publish(checkout, measured)
    assert _run(checkout) == 0
    assert _row(checkout, "mixer, xs stage 1")[1:5] == ["refused"] * 4
    assert _row(checkout, "mixer, xs stage 1", PERFORMANCE)[1:5] == ["refused"] * 4
    for path in ("README.md", PERFORMANCE):
        assert "parity failed, nothing was timed" in (checkout / path).read_text()


def test_picture_has_bars_as_long_as_the_ratios(checkout):
    first = _measured(eager=8.0, compile=6.0, fused=2.0)
    second = _measured(eager=3.0, fused=2.0)
    second.case = dataclasses.replace(CASE, stage=2)
    write(checkout / "bench" / "results", [first, second], SETTINGS)
    assert _run(checkout) == 0
    tree = ElementTree.parse(checkout / "docs" / "bench.svg").getroot()
    space = {"svg": "http://www.w3.org/2000/svg"}
    bars = tree.findall("svg:rect", space)
    one = tree.findall("svg:line", space)[1]
    unit = float(one.get("x1")) - float(bars[0].get("x"))
    ratios = [float(bar.get("width")) / unit for bar in bars]
    assert ratios == pytest.approx([3.0, 1.5], abs=0.01)
    texts = [t.text for t in tree.findall("svg:text", space)]
    assert "3.00x compile" in texts
    assert "1.50x eager" in texts
    assert texts.count("not measured") == 6


@pytest.mark.parametrize(
    "path", ["README.md", "docs/performance.md", "docs/bench.svg", "bench/results/README.md"]
)
def test_check_finds_an_edited_number_and_writes_nothing(checkout, path, capsys):
    _publish(checkout, _measured(eager=8.0, onnxruntime=4.0, fused=2.0))
    assert _run(checkout) == 0
    edited = checkout / path
    edited.write_text(edited.read_text().replace("2.00x", "2.60x"))
    text = edited.read_text()
    assert "2.60x" in text
    assert _run(checkout, "--check") == 1
    assert str(edited) in capsys.readouterr().out
    assert edited.read_text() == text


def test_check_finds_results_that_were_not_reported(checkout):
    path = _publish(checkout, _measured(eager=8.0, fused=2.0))
    assert _run(checkout) == 0
    path.write_text(path.read_text().replace("0.008", "0.009"))
    assert _run(checkout, "--check") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(quick=True), "--quick"),
        (Settings(backend="reference"), "reference"),
    ],
    ids=["quick", "reference"],
)
def test_trial_runs_are_not_reported(checkout, settings, message, capsys):
    before = (checkout / "README.md").read_text()
    _publish(checkout, _measured(eager=8.0, fused=2.0), settings)
    assert _run(checkout) == 2
    assert message in capsys.readouterr().err
    assert (checkout / "README.md").read_text() == before


def test_a_readme_without_markers_and_a_broken_file_are_named(checkout, capsys):
    (checkout / "README.md").write_text("# Title\n")
    assert _run(checkout) == 2
    assert report.BEGIN in capsys.readouterr().err
    path = _publish(checkout, _measured(eager=8.0, fused=2.0))
    path.write_text(path.read_text()[:100])
    assert _run(checkout) == 2
    assert path.name in capsys.readouterr().err


def _bench(tmp_path, *arguments, **environment):
    """Run the smallest mixer benchmark in a process of its own."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench" / "levels" / "test_mixer.py")]
    command += ["--benchmark-only", "--quick", "--json-dir", str(tmp_path / "json"), *arguments]
    path = os.pathsep.join([str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_of_a_whole_model_the_fastest_fused_candidate_counts(checkout):
    found = _measured(eager=8.0, compile=6.0, fused=7.0, fused_compile=4.0)
    found.case = dataclasses.replace(CASE, level="model", stage=None)
    _publish(checkout, found)
    assert _run(checkout) == 0
    for row in (
        _row(checkout, "whole rcvit_xs, batch 8"),
        _row(checkout, "whole rcvit_xs", PERFORMANCE),
    ):
        assert row[1:5] == ["4 (fused compile)", "6 (compile)", "**1.50x**", "2.00x"]


def test_readme_has_six_rows_whatever_was_measured(checkout):
    def rows():
        table = (checkout / "README.md").read_text().split(report.BEGIN)[1].split(report.END)[0]
        return [
            line.split("|")[1].split(" (")[0].strip() for line in table.splitlines()[3:9]
        ], table

    assert _run(checkout) == 0
    before, table = rows()
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 6 + 2 + 4
    assert before[-2:] == ["whole rcvit_xs, batch 8", "whole rcvit_xs, batch 1"]
    assert f"[{PERFORMANCE}]({PERFORMANCE})" in table
    slower = _measured(eager=8.0, onnxruntime=3.0, fused=4.0)
    slower.case = dataclasses.replace(CASE, level="model", stage=None, batch=1)
    _publish(checkout, slower)
    assert _run(checkout) == 0
    assert rows()[0] == before
    assert _row(checkout, "whole rcvit_xs, batch 1")[3] == "**0.75x**"
    assert _row(checkout, "whole rcvit_xs", PERFORMANCE)[5] == "0.75x"


@pytest.mark.parametrize("options", [(), ("--quick",), ("--models", "s,m", "--batches", "2")])
def test_every_benchmark_is_found(options):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "--collect-only"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "test_mixer",
        "test_model",
        "test_network",
        "test_training_speed",
        "test_export_speed",
    ):
        assert f"bench/levels/{name}.py::test_" in done.stdout, name


def test_the_bench_command_fails_where_parity_fails_and_writes_no_number(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "wrong_kernel.py").write_text(
        "from casvit_kernels import FusedCATM\n"
        "right = FusedCATM.forward\n"
        "FusedCATM.forward = lambda self, x: right(self, x) * 1.001\n"
    )
    done = _bench(tmp_path, "--backend", "reference", "-p", "wrong_kernel")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "parity failed, nothing was timed" in done.stdout
    (path,) = (tmp_path / "json").glob("mixer-xs-cpu*.json")
    (case,) = json.loads(path.read_text())["cases"]
    assert "rows" not in case
    assert "parity failed" in case["refused"]


def test_the_bench_command_says_why_a_backend_cannot_be_measured(tmp_path):
    pytest.importorskip("pytest_benchmark")
    done = _bench(tmp_path, "--backend", "triton")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "backend 'triton' is not usable" in done.stdout
    assert not (tmp_path / "json").exists()
