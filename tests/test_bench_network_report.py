"""Results of whole networks in README, docs/performance.md and bench/results, and their goals."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import conftest  # noqa: E402
from bench.harness import results as harness_results  # noqa: E402
from bench.harness.case import GPU_CHOICE, Case, Choice, Settings, names  # noqa: E402
from bench.harness.results import Measured, write  # noqa: E402
from bench.levels import test_network as level  # noqa: E402
from bench.report import command, goals  # noqa: E402
from bench.report.load import load  # noqa: E402
from casvit_kernels import benchmark  # noqa: E402

CASE = Case("network", "xs", None, 3, 224, 1, "float32")
BF16 = dataclasses.replace(CASE, dtype="bfloat16")
SETTINGS = Settings(rounds=2)
MEDIANS = {
    "eager": 8.0,
    "compile": 7.0,
    "compile frozen": 6.0,
    "onnxruntime": 5.0,
    "openvino": 4.0,
    "fused compile channels_last": 3.0,
    "fused network": 2.0,
}


def measured(case=CASE, peak=200e9, errors=None, absent=None, **medians):
    """A result with these medians in milliseconds, or those of `MEDIANS`."""
    suffix = " bf16" if case.dtype == "bfloat16" else ""
    medians = {n.replace("_", " "): ms for n, ms in medians.items()} or dict(MEDIANS)
    if suffix:
        medians.pop("onnxruntime", None)
    found = Measured(case, absent=absent or {})
    for name, ms in medians.items():
        s = ms / 1e3
        found.timings[name + suffix] = benchmark.Timing(s, 0.9 * s, 1.1 * s, 15, 3, (s,))
        found.errors[name + suffix] = (errors or {}).get(name, 1e-7)
        found.row_facts[name + suffix] = {"same_top1": 8}
    if "openvino" in medians:
        used = "bf16" if suffix else "f32"
        found.row_facts["openvino" + suffix]["precision"] = used
    found.facts = {"macs": 300_000_000, "images": 8}
    if peak is not None:
        found.facts["peak_macs_per_s"] = peak
    return found


@pytest.fixture
def checkout(tmp_path):
    """A tree with a README that has the markers, and no results."""
    (tmp_path / "README.md").write_text(f"# Title\n\n{command.BEGIN}\nold\n{command.END}\n")
    return tmp_path


@pytest.fixture
def publish(checkout, monkeypatch):
    """Writes results as if kernels of an instruction set had made them, and reports them."""

    def publish(*found, isa="avx512_bf16", settings=SETTINGS):
        environment = {**benchmark.environment(), "isa": isa, "openvino": "2026.4.1"}
        monkeypatch.setattr(harness_results.benchmark, "environment", lambda device: environment)
        paths = write(checkout / "bench" / "results", list(found), settings)
        return paths, command.main(["--root", str(checkout)])

    return publish


def row(checkout, start, path, after=""):
    """The cells of the one row that begins so, behind a text."""
    text = (
        (checkout / path).read_text().partition(after)[2]
        if after
        else (checkout / path).read_text()
    )
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


PERFORMANCE, COMPLETE = "docs/performance.md", "bench/results/README.md"


def test_every_table_says_what_was_measured(checkout, publish):
    (path,), status = publish(measured())
    assert path.name == "network-xs-cpu-avx512_bf16.json"
    assert status == 0
    text = (checkout / PERFORMANCE).read_text().partition("### avx512_bf16")[2]
    (line,) = (x for x in text.splitlines() if x.startswith("| rcvit_xs, batch 1 "))
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [
        "2",
        "4 (openvino)",
        "**2.00x**",
        "2.00x",  # OpenVINO
        "2.50x",  # ONNX Runtime
        "3.00x",  # the best of the compiled ones
        "4.00x",  # eager
        "1.50x",  # fused mixers
        "1e-07 (1e-07)",
        "8 of 8",
        "0.75",  # 0.3 GMAC in 2 ms, of 200 GMAC/s
    ]
    assert "OpenVINO 2026.4.1" in text
    assert "Each process was started 3 times." in text
    assert "bf16: not measured." in text
    cells = row(checkout, "fused network", COMPLETE)
    assert cells[1:] == ["2 (1.8 to 2.2)", "2.00x", "1e-07", "8 of 8", "0.75"]
    cells = row(checkout, "openvino (f32)", COMPLETE)
    assert cells[1:] == ["4 (3.6 to 4.4)", "1.00x", "1e-07", "8 of 8", "0.38"]
    cells = row(checkout, "rcvit_xs, batch 1", "README.md")
    assert cells[1:] == ["2", "4 (openvino)", "**2.00x**", *["not measured"] * 3]
    assert row(checkout, "rcvit_t, batch 8", "README.md")[1:] == ["not measured"] * 6
    assert command.main(["--root", str(checkout), "--check"]) == 0


def test_bf16_is_held_against_bf16(checkout, publish):
    slower = measured(BF16, eager=8.0, openvino=1.5, fused_network=1.0, errors={"openvino": 2e-3})
    _, status = publish(measured(), slower)
    assert status == 0
    assert row(checkout, "rcvit_xs, batch 1", "README.md")[4:] == [
        "1",
        "1.5 (openvino)",
        "**1.50x**",
    ]
    cells = row(checkout, "rcvit_xs, batch 1", PERFORMANCE, after="| bf16 | ms")
    assert cells[1:5] == ["1", "1.5 (openvino)", "**1.50x**", "1.50x"]
    assert cells[-3] == "1e-07 (0.002)"
    assert "openvino (bf16)" in (checkout / COMPLETE).read_text()


def test_nothing_measured_is_said(checkout):
    assert command.main(["--root", str(checkout)]) == 0
    text = (checkout / PERFORMANCE).read_text()
    assert "Any CPU: not measured." in text.partition("## Whole networks in one call")[2]
    assert row(checkout, "rcvit_xs, batch 8", "README.md")[1:] == ["not measured"] * 6


def test_absent_rivals_and_refused_cases_have_their_reason(checkout, publish):
    reason = "not installed: openvino (pip install casvit-kernels[bench])"
    few = measured(eager=8.0, fused_network=2.0, absent={"openvino": reason})
    refused = measured(dataclasses.replace(CASE, batch=8))
    refused.refused = "parity failed, nothing was timed: fused network"
    _, status = publish(few, refused)
    assert status == 0
    for path in (PERFORMANCE, COMPLETE):
        text = (checkout / path).read_text()
        assert f"openvino not measured: {reason}" in text, path
        assert "parity failed, nothing was timed: fused network" in text, path
    assert row(checkout, "rcvit_xs, batch 1", "README.md")[2] == "8 (eager)"
    assert row(checkout, "rcvit_xs, batch 8", "README.md")[1:4] == ["refused"] * 3


def test_without_the_peak_its_share_is_not_measured(checkout, publish):
    publish(measured(peak=None))
    assert row(checkout, "fused network", COMPLETE)[-1] == "not measured"


def test_a_network_that_was_not_timed_shows_its_rivals_alone(checkout, publish):
    publish(measured(eager=8.0, openvino=4.0, absent={"fused network": "no kernels"}))
    assert row(checkout, "openvino", COMPLETE)[2] == "1.00x"
    assert row(checkout, "rcvit_xs, batch 1", "README.md")[1:4] == ["not measured"] * 3


def test_a_trial_run_is_not_reported(publish, capsys):
    _, status = publish(measured(), settings=Settings(quick=True))
    assert status == 2
    assert "--quick" in capsys.readouterr().err


def lines(checkout, isa):
    return goals.network_goal_lines(load(checkout / "bench" / "results"), isa)


@pytest.mark.parametrize(
    ("ours", "verdict"), [(2.0, "met where measured, 2.00"), (3.2, "missed, 1.25")]
)
def test_goals_are_met_or_missed(checkout, publish, ours, verdict):
    publish(
        measured(**{**{n.replace(" ", "_"): v for n, v in MEDIANS.items()}, "fused_network": ours})
    )
    found = lines(checkout, "avx512_bf16")
    (line,) = (x for x in found if x.startswith("xs in fp32 over the best rival"))
    assert line == (
        f"xs in fp32 over the best rival (goal 1.3): {verdict} at worst (xs batch 1; 1 of 2 measured)"
    )
    assert line in (checkout / PERFORMANCE).read_text()
    (line,) = (x for x in found if x.startswith("t in fp32 over"))
    assert line == "t in fp32 over the best rival (goal 1.25): not measured"


def test_the_worst_batch_decides(checkout, publish):
    publish(
        measured(),
        measured(dataclasses.replace(CASE, batch=8), openvino=1.2, eager=9.0, fused_network=1.0),
    )
    line = lines(checkout, "avx512")[0]
    assert "missed, 1.20 at worst (xs batch 8; 2 of 2 measured)" in line


def test_shares_of_peak_and_errors_are_goals(checkout, publish):
    publish(
        measured(peak=160e9),
        measured(BF16, eager=9.0, openvino=3.0, fused_network=2.0, errors={"openvino": 5e-8}),
    )
    text = "\n".join(lines(checkout, "avx512_bf16"))
    assert (
        "xs in fp32, share of the CPU's measured peak (goal 0.78): met where measured, 0.94" in text
    )
    assert "xs in bf16 over OpenVINO's bf16 (goal 1.35): met where measured, 1.50" in text
    assert "OpenVINO's largest error in bf16 over ours (goal 1): missed, 0.50" in text


@pytest.mark.parametrize(
    ("isa", "count"), [("amx", 3), ("avx2", 1), ("avx512", 4), ("portable", 0)]
)
def test_each_instruction_set_has_goals_of_its_own(checkout, publish, isa, count):
    publish(measured(), isa=isa)
    assert len(lines(checkout, isa)) == count


def test_cases_are_all_networks_in_the_precisions_that_are_here(monkeypatch):
    monkeypatch.setattr(level, "precisions", lambda: ["fp32", "bf16"])
    found = level.cases(Choice())
    assert len(found) == 4 * 2 * 2
    assert {case.model for case in found} == {"xs", "s", "m", "t"}
    monkeypatch.setattr(level, "precisions", list)
    assert {case.dtype for case in level.cases(Choice())} == {"float32"}
    assert [
        case.id for case in level.cases(Choice(quick=True, batches=(1,), networks=("xs",)))
    ] == ["xs-64px-b1-float32"]
    assert level.cases(GPU_CHOICE) == []
    assert names(level, BF16, False) == benchmark.names_for("bf16")


def test_models_on_the_command_line_hold_for_networks_too():
    class Config:
        def __init__(self, **options):
            self.options = {"--device": "cpu", "--quick": False, **options}

        def getoption(self, name):
            return self.options.get(name)

    assert conftest.choice(Config()).networks == ("xs", "s", "m", "t")
    assert conftest.choice(Config(**{"--models": "s"})).networks == ("s",)
    assert conftest.choice(Config(**{"--quick": True})).networks == ("xs",)


def test_a_case_says_what_its_shares_are_of(monkeypatch):
    """What `time_network` found, as it lies in the JSON."""
    race = benchmark.Race()
    race.timings["eager"] = benchmark.Timing(1.0, 1.0, 1.0, 2, 1, (1.0,))
    race.timings.absent["openvino"] = "no"
    race.failed["compile"] = "its process ended"
    race.facts["eager"] = {"version": "1"}
    found = benchmark.NetworkSpeed(
        1, "fp32", 8, 7, race, {"eager": benchmark.Exactness(1e-7, 8)}, [1e9, 3e9]
    )
    monkeypatch.setattr(level.whole, "problem", lambda *_, **__: (None, None))
    monkeypatch.setattr(level.whole, "measure", lambda *_, **__: found)
    document = json.loads(json.dumps(level.run(CASE, ["eager"], SETTINGS).as_json()))
    assert document["macs"] == 7
    assert document["peak_macs_per_s"] == 3e9
    rows = {r["candidate"]: r for r in document["rows"]}
    assert rows["eager"]["same_top1"] == 8
    assert rows["eager"]["version"] == "1"
    assert rows["openvino"]["absent"] == "no"
    assert rows["compile"]["error"] == "its process ended"
