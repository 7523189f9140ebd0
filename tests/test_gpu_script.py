"""bench/gpu without a GPU: what it runs in which order, how it stops, goes on and refuses.

Its parts run in this process, but where processes are the subject.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import require_native

from casvit_kernels import testing

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu import command as gpu  # noqa: E402
from bench.gpu import schedule, store, supervise, worker  # noqa: E402
from bench.gpu.cases import run_speed  # noqa: E402
from bench.harness.case import Case  # noqa: E402
from bench.harness.results import Measured  # noqa: E402
from bench.levels import test_mixer as mixer_level  # noqa: E402
from bench.report import command as report  # noqa: E402
from bench.report.goals import GPU_MODELS, goal_lines  # noqa: E402

TRIAL = ("--device", "cpu", "--backend", "cpu", "--quick", "--no-build")
KEY = "xs-stage4-7px-b1-bfloat16"  # of the only mixer case of a trial


@pytest.fixture(autouse=True)
def native():
    require_native()


def _inside(patch):
    """Run each part's process here; the list says which were started."""
    started = []

    def start(part, rank, marker, options):
        started.append(part)
        return part, argparse.Namespace(**{**vars(options), "rank": rank, "marker": marker})

    patch.setattr(supervise, "start", start)
    patch.setattr(supervise, "watch", lambda process, *_: (worker.work(*process), 0.0))
    return started


@pytest.fixture
def ran(monkeypatch):
    return _inside(monkeypatch)


def _options(out, *more):
    return gpu.arguments([*TRIAL, "--out", str(out), *more])


def _run(out, *more):
    return gpu.main([*TRIAL, "--out", str(out), *more])


def _read(out, part):
    return json.loads((out / "cpu" / f"{part}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a trial of all parts writes."""
    require_native()
    out = tmp_path_factory.mktemp("trial")
    with pytest.MonkeyPatch.context() as patch:
        _inside(patch)
        assert _run(out) == 0
    return out


def test_a_trial_goes_through_every_part(results):
    assert sorted(p.name for p in (results / "cpu").iterdir()) == sorted(
        f"{part}.json" for part in schedule.PARTS
    )
    assert {c["passed"] for c in _read(results, "parity")["cases"]} == {True}
    assert all("absent" in case for case in _read(results, "sanitizer")["cases"])
    for part in schedule.SPEED:
        for case in _read(results, part)["cases"]:
            assert case["copy_bytes_per_s"] > 1e6
            names = {row["candidate"] for row in case["rows"] if row["median_s"] > 0}
            assert {"eager channels_last bf16", "fused channels_last bf16"} <= names
    (mixer,) = _read(results, "mixer")["cases"]
    assert "fused mix channels_last bf16" in {row["candidate"] for row in mixer["rows"]}
    (step,) = _read(results, "training")["cases"]
    kept = {row["candidate"]: row["kept_bytes"] for row in step["rows"]}
    assert kept["eager bf16"] > 2 * kept["fused bf16"] > 0


def test_the_real_command_starts_a_process_for_each_part(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "gpu"), *TRIAL, "--parts", "parity"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = len(schedule.items("parity", _options(tmp_path)))
    assert f"parity: {wanted} of {wanted} cases" in done.stdout
    assert "forward over max-autotune (goal 2): not measured" in done.stdout
    assert len(_read(tmp_path, "parity")["cases"]) == wanted


def test_what_is_there_is_not_run_again(tmp_path, ran, monkeypatch):
    assert _run(tmp_path, "--parts", "parity") == 0
    first = _read(tmp_path, "parity")
    assert _run(tmp_path, "--parts", "parity") == 0
    assert ran == ["parity"]
    lost = first["cases"].pop(3)
    (tmp_path / "cpu" / "parity.json").write_text(json.dumps(first))
    checked = []
    right = testing.verdict
    monkeypatch.setattr(testing, "verdict", lambda case: checked.append(case) or right(case))
    assert _run(tmp_path, "--parts", "parity") == 0
    assert [str(case) for case in checked] == [lost["id"].rsplit("-", 2)[0]]
    monkeypatch.setattr(store, "version", lambda: "other sources")
    assert _run(tmp_path, "--parts", "parity") == 0
    assert len(checked) == 1 + len(first["cases"]) + 1


def test_results_belong_to_kernels_and_harness_but_not_to_prose(tmp_path, monkeypatch):
    found = store.sources()
    assert {"csrc/cpu/infer.cpp", "casvit_kernels/module.py", "bench/harness/measure.py"} <= set(
        found
    )
    assert not [name for name in found if name.endswith(".md") or "/demo/" in name]
    # In a checkout below a folder called demo, too.
    root = tmp_path / "demo"
    for name in ("casvit_kernels/module.py", "casvit_kernels/demo/run.py", "csrc/README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    monkeypatch.setattr(store, "ROOT", root)
    assert store.sources() == ["casvit_kernels/module.py"]


def test_a_new_out_goes_on_from_the_committed_results(tmp_path, ran, monkeypatch):
    monkeypatch.setattr(store, "RESULTS", tmp_path / "committed")
    assert _run(tmp_path / "committed", "--parts", "parity") == 0
    assert _run(tmp_path / "new", "--parts", "parity") == 0
    assert ran == ["parity"]


def test_without_a_budget_nothing_starts_and_all_is_said_to_be_left(tmp_path, ran, capsys):
    assert _run(tmp_path, "--budget", "0") == 0
    assert ran == []
    out = capsys.readouterr().out
    assert "parity: 0 of 18 cases" in out
    assert "not done: 18, the next cpu-float32-contiguous-eval-5x3x7x7-0-cpu" in out


def test_a_part_stops_before_the_deadline_and_the_next_call_goes_on(
    tmp_path, ran, monkeypatch, capsys
):
    clock = itertools.count(step=10.0)  # each look at it takes ten seconds
    time = SimpleNamespace(time=lambda: float(next(clock)))
    for module in (gpu, supervise, worker):
        monkeypatch.setattr(module, "time", time)
    assert _run(tmp_path, "--parts", "parity", "--budget", "200") == 0
    some = len(_read(tmp_path, "parity")["cases"])
    assert 1 < some < 18
    assert f"not done: {18 - some}" in capsys.readouterr().out
    assert _run(tmp_path, "--parts", "parity", "--budget", "10000") == 0
    assert len(_read(tmp_path, "parity")["cases"]) == 18


def _fail(case, text):
    row = testing.parity._row(case, (), (text,))
    return row


def test_no_speed_while_parity_is_red(tmp_path, ran, monkeypatch, capsys):
    right = testing.verdict

    def verdict(case):
        wrong = case.mode == "train" and case.dtype is torch.float16
        return _fail(case, "out: max error 3") if wrong else right(case)

    monkeypatch.setattr(testing, "verdict", verdict)
    assert _run(tmp_path, "--parts", "parity,mixer") == 1
    out = capsys.readouterr().out
    assert "no speed: parity is red, 2 of 18 cases, the first: cpu-float16" in out
    assert "out: max error 3" in out
    assert ran == ["parity"]
    assert not (tmp_path / "cpu" / "mixer.json").exists()
    # Numbers of earlier are not printed either.
    store.load("mixer", _options(tmp_path)).add(_goal_case("mixer", 1, {}))
    assert _run(tmp_path, "--parts", "mixer") == 1
    assert "forward over max-autotune (goal 2): not measured" in capsys.readouterr().out


def test_no_speed_before_parity_was_checked(tmp_path, ran, capsys):
    assert _run(tmp_path, "--parts", "mixer") == 1
    assert "no speed: parity is not complete, 18 cases are left" in capsys.readouterr().out
    assert ran == []


def test_another_backend_that_is_red_does_not_stop_this_one(tmp_path):
    options = _options(tmp_path)
    file = store.load("parity", options)
    file.add(*({"id": item.key, "passed": True} for item in schedule.items("parity", options)))
    file.add({"id": "reference-float32", "passed": False})
    assert supervise.red(options) is None
    file.add({"id": "cpu-float32", "error": "the process ended"})
    assert "parity is red, 1 of 20" in supervise.red(options)


def test_a_case_that_raises_is_recorded_and_the_rest_goes_on(tmp_path, ran, monkeypatch, capsys):
    def run(case, names, settings):
        raise ZeroDivisionError("here")

    monkeypatch.setattr(mixer_level, "run", run)
    assert _run(tmp_path, "--parts", "parity,mixer,training") == 1
    (case,) = _read(tmp_path, "mixer")["cases"]
    assert case["error"] == "ZeroDivisionError: here"
    assert f"{KEY}: ZeroDivisionError: here" in capsys.readouterr().out
    assert len(_read(tmp_path, "training")["cases"]) == 1


def test_a_lost_gpu_context_costs_one_case(tmp_path, ran, monkeypatch):
    right, calls = testing.verdict, []

    def verdict(case):
        calls.append(case)
        lost = len(calls) == 3
        return _fail(case, "AcceleratorError: CUDA error: misaligned") if lost else right(case)

    monkeypatch.setattr(testing, "verdict", verdict)
    assert _run(tmp_path, "--parts", "parity") == 1
    assert ran == ["parity"] * 2  # a new process
    passed = [case["passed"] for case in _read(tmp_path, "parity")["cases"]]
    assert passed == [True, True, False] + [True] * 15


def _stub(monkeypatch, script):
    """Each part's process runs `script`, given the marker's path and the next key."""
    started = []

    def start(part, rank, marker, options):
        key = supervise.left_of(part, rank, options)[0].key
        command = [sys.executable, "-S", "-c", _WRITES + script, str(marker), key]
        started.append(subprocess.Popen(command, start_new_session=True))
        return started[-1]

    monkeypatch.setattr(supervise, "start", start)
    return started


_WRITES = """
import json, os, sys, time
def mark():
    with open(sys.argv[1] + "~", "w") as f:
        json.dump({"key": sys.argv[2], "since": time.time()}, f)
    os.replace(sys.argv[1] + "~", sys.argv[1])
"""


def test_a_process_that_dies_costs_the_case_it_was_at(tmp_path, monkeypatch):
    started = _stub(monkeypatch, "mark(); os._exit(9)")
    assert _run(tmp_path, "--parts", "sanitizer") == 1
    assert len(started) == 2
    assert [(c["id"], c["error"]) for c in _read(tmp_path, "sanitizer")["cases"]] == [
        (tool, "the process ended with status 9") for tool in schedule.TOOLS
    ]


def test_a_process_that_dies_at_once_is_not_started_for_ever(tmp_path, monkeypatch, capsys):
    started = _stub(monkeypatch, "sys.exit(5)")
    assert _run(tmp_path, "--parts", "sanitizer") == 1
    assert len(started) == 1
    assert "ended with status 5 before its first case" in capsys.readouterr().out


def test_a_case_that_takes_too_long_is_tried_again_without_autotuning(tmp_path, monkeypatch):
    started = _stub(monkeypatch, "mark(); time.sleep(60)")
    monkeypatch.setattr(supervise, "red", lambda options: None)
    assert _run(tmp_path, "--parts", "mixer", "--case-limit", "0.3") == 1
    assert [process.poll() for process in started] == [-9, -9]
    document = _read(tmp_path, "mixer")
    assert document["limited"] == {KEY: "not within 0 s"}
    (case,) = document["cases"]
    assert "did not finish" in case["error"]


def test_what_was_too_slow_is_left_out_with_the_reason(tmp_path, monkeypatch):
    asked = []

    def run(case, names, settings):
        asked.extend(names)
        return Measured(case)

    monkeypatch.setattr(mixer_level, "run", run)
    options = _options(tmp_path)
    (item,) = schedule.items("mixer", options)
    options.quick = False
    found = run_speed("mixer", item, {item.key: "not within 150 s"}, options)
    assert "compile channels_last bf16" in asked
    assert "max-autotune channels_last bf16" not in asked
    assert found["rows"] == [
        {
            "candidate": "max-autotune channels_last bf16",
            "absent": "the case was not within 150 s",
        }
    ]


def test_a_process_is_ended_at_the_deadline(tmp_path, monkeypatch, capsys):
    started = _stub(monkeypatch, "mark(); time.sleep(60)")
    begin = time.time()
    assert _run(tmp_path, "--parts", "sanitizer", "--budget", "1.5") == 0
    assert time.time() - begin < 30
    (process,) = started
    assert process.poll() == -9
    assert "sanitizer: 0 of 2 cases" in capsys.readouterr().out


def test_the_goals_come_first_and_nothing_is_left_out(tmp_path):
    options = _options(tmp_path)
    options.quick = False
    mixers = schedule.items("mixer", options)
    assert {item.key for item in mixers if item.rank == 1} == {
        f"{model}-stage{stage}-{112 >> stage}px-b256-bfloat16"
        for model in ("xs", "t")
        for stage in (1, 2)
    }
    assert [item.rank for item in mixers] == sorted(item.rank for item in mixers)
    shapes = {(i.case.model, i.case.stage, i.case.size, i.case.batch) for i in mixers}
    sizes = {1: (56, 96), 2: (28, 48), 3: (14, 24), 4: (7, 12)}
    assert shapes == {
        (model, stage, size, batch)
        for model in ("xs", "s", "m", "t")
        for stage in sizes
        for size in sizes[stage]
        for batch in (1, 64, 256)
    }
    for part in ("model", "model-training"):
        cases = [
            (i.case.model, i.case.size, i.case.batch, i.without)
            for i in schedule.items(part, options)
        ]
        assert set(cases) == set(
            itertools.product(
                ("xs", "s", "m", "t"), (224, 384), (1, 64, 256), ("compile", "max-autotune")
            )
        )
        assert len(set(cases)) == len(cases)
    for part in schedule.PARTS:
        items = schedule.items(part, options)
        assert len({item.key for item in items}) == len(items)
        assert {item.rank for item in items} <= {r for p, r in schedule.SCHEDULE if p == part}


def test_parity_takes_the_real_shapes_in_every_dtype_layout_and_mode(tmp_path):
    options = _options(tmp_path)
    options.quick = False
    cases = [item.case for item in schedule.items("parity", options) if item.case.backend == "cpu"]
    for shape in ((256, 96, 96, 96), (256, 220, 7, 7), (2, 48, 56, 56)):
        found = [c for c in cases if c.shape == shape]
        assert {(c.dtype, c.layout, c.mode) for c in found} == set(
            itertools.product(
                testing.BACKENDS["cpu"].dtypes, ("contiguous", "channels_last"), testing.MODES
            )
        )
    assert {c.layout for c in cases} == set(testing.LAYOUTS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--parts", "parity,speed"], "--parts: expected names out of parity,.*, got speed"),
        (["--backend", "reference2"], "--backend: expected one that serves cpu"),
        (["--device", "cuda"], "sees no GPU"),
    ],
)
def test_bad_arguments_are_named(given, message, tmp_path, capsys):
    if "cuda" in given and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        _options(tmp_path, *given)
    assert re.search(message, capsys.readouterr().err)


# From the JSON to tables and goals.


def _goal_case(level, stage, medians_us, model="xs", **kept):
    rows = [
        {
            "candidate": f"{name} bf16",
            "median_s": us / 1e6,
            "p25_s": us / 1e6,
            "p75_s": us / 1e6,
            "peak_bytes": 3 << 20,
            **({"kept_bytes": kept[name]} if name in kept else {}),
        }
        for name, us in medians_us.items()
    ]
    case = Case(level, model, stage, 48, 112 >> stage, 256, "bfloat16")
    return {"id": case.id, **vars(case), "rows": rows, "copy_bytes_per_s": 3e12}


@pytest.fixture
def checkout(tmp_path, results):
    """A tree with a README, and a trial's files as if an H100 had written them."""
    (tmp_path / "README.md").write_text(f"# Title\n{report.BEGIN}\nold\n{report.END}\n")
    folder = tmp_path / "bench" / "results" / "nvidia-h100"
    folder.mkdir(parents=True)
    for part in schedule.PARTS:
        document = _read(results, part)
        document["environment"] |= {
            "device": "cuda",
            "gpu": "NVIDIA H100",
            "cuda": "13.0",
            "triton": "3.6.0",
        }
        document["stamp"]["quick"] = False
        (folder / f"{part}.json").write_text(json.dumps(document))
    return tmp_path


def _edit(checkout, part, change):
    path = checkout / "bench" / "results" / "nvidia-h100" / f"{part}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_the_report_takes_what_the_script_writes(checkout):
    fast = {"fused channels_last": 205.6, "eager": 2000.0, "eager channels_last": 1028.0}
    _edit(checkout, "mixer", lambda d: d["cases"].append(_goal_case("mixer", 1, fast)))
    assert report.main(["--root", str(checkout)]) == 0
    complete = (checkout / "bench" / "results" / "README.md").read_text()
    assert "## nvidia-h100" in complete
    assert "- parity: 18 of 18 passed" in complete
    assert "- sanitizer: 0 of 2 passed" in complete
    assert "xs stage 1, (256, 48, 56, 56)" in complete
    assert "0.206 (0.206 to 0.206), 3 MiB, share 0.50" in complete  # floor: 102.8 us
    for part in schedule.SPEED:
        assert f"### {part}" in complete
    text = (checkout / "docs" / "performance.md").read_text()
    assert "## NVIDIA H100\n\nNVIDIA H100 (CUDA or HIP 13.0)" in text
    assert "forward over eager channels_last (goal 5): met where measured, 5.00 at worst" in text
    assert "share of the memory floor (goal 0.6): missed, 0.50 at worst" in text
    assert "Any GPU" not in text
    assert report.main(["--root", str(checkout), "--check"]) == 0


def test_a_case_too_large_for_the_gpu_is_not_red(checkout):
    too_large = {"absent": "it needs more memory than this GPU has", "passed": None}
    _edit(checkout, "parity", lambda d: d["cases"][0].update(too_large))
    assert report.main(["--root", str(checkout)]) == 0
    complete = (checkout / "bench" / "results" / "README.md").read_text()
    assert "- parity: 17 of 18 passed, 1 not run" in complete


def test_goals_are_judged_by_the_worst_mixer_of_stages_one_and_two():
    def figures(fused):
        return {
            "eager channels_last": 600.0,
            "max-autotune channels_last": 300.0,
            "fused channels_last": fused,
        }

    cases = [
        _goal_case("training", stage, figures(100.0), model)
        for model in GPU_MODELS
        for stage in (1, 2)
    ]
    lines = goal_lines([{"cases": cases}])
    assert (
        "step over eager channels_last (goal 3): met, 6.00 at worst (xs stage 1; 8 of 8" in lines[4]
    )
    cases[5] = _goal_case("training", 2, figures(200.0), "m")
    lines = goal_lines([{"cases": cases}])
    assert "step over max-autotune (goal 1.7): missed, 1.50 at worst (m stage 2" in lines[5]
    assert lines[6] == "times less kept for the backward (goal 4): not measured"
    other = _goal_case("training", 1, figures(1.0)) | {"batch": 64}
    assert "not measured" in goal_lines([{"cases": [other]}])[4]
    kept = {"eager channels_last": 900, "fused channels_last": 300}
    case = _goal_case("training", 1, figures(1.0), **kept)
    assert "missed, 3.00 at worst" in goal_lines([{"cases": [case]}])[6]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("parity", lambda d: d["cases"][0].update(passed=False), "no speed without green parity"),
        ("parity", lambda d: d["cases"].clear(), "no speed without green parity"),
        ("mixer", lambda d: d["stamp"].update(version="older"), "no speed without green parity"),
        ("mixer", lambda d: d["stamp"].update(quick=True), "a trial of the machinery"),
        ("mixer", lambda d: d["environment"].update(device="cpu"), "a trial of the machinery"),
        ("mixer", lambda d: d.pop("cases"), "expected a file of bench/gpu"),
    ],
    ids=["red", "unchecked", "older sources", "quick", "cpu", "broken"],
)
def test_the_report_refuses(checkout, part, change, message, capsys):
    _edit(checkout, part, change)
    assert report.main(["--root", str(checkout)]) == 2
    assert message in capsys.readouterr().err
