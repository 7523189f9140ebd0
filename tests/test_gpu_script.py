"""bench/gpu without a GPU: what it runs in which order, how it stops, goes on and refuses.

Its parts run in this process, but where processes are the subject.
"""

import gc
import itertools
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import gpu_script
import pytest
import torch
from conftest import require_native

from bench.gpu import command as gpu
from bench.gpu import schedule, store, supervise, worker
from bench.gpu.cases import run_short
from casvit_kernels import testing


@pytest.fixture(autouse=True)
def native():
    require_native()


@pytest.fixture
def ran(monkeypatch):
    return gpu_script.inside(monkeypatch)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a trial of all parts writes."""
    require_native()
    out = tmp_path_factory.mktemp("trial")
    with pytest.MonkeyPatch.context() as patch:
        gpu_script.inside(patch)
        patch.setattr(gc, "collect", lambda: 0)
        assert gpu_script.run(out) == 0
    return out


@pytest.mark.long
def test_a_trial_goes_through_every_part(results):
    assert sorted(p.name for p in (results / "cpu").iterdir()) == sorted(
        f"{part}.json" for part in schedule.PARTS
    )
    assert {c["passed"] for c in gpu_script.read(results, "parity")["cases"]} == {True}
    assert all("absent" in case for case in gpu_script.read(results, "sanitizer")["cases"])
    for part in schedule.SPEED:
        for case in gpu_script.read(results, part)["cases"]:
            assert case["copy_bytes_per_s"] > 1e6
            timed = [row for row in case["rows"] if row.get("median_s", 0) > 0]
            names = {row["candidate"] for row in timed}
            assert {"eager channels_last bf16", "fused channels_last bf16"} <= names
            assert all(row["call_s"] > 0 and "alone" not in row for row in timed)
            graphs = [row for row in case["rows"] if "graph" in row["candidate"]]
            assert all(row["absent"].startswith("a CUDA graph needs") for row in graphs)
            assert len(graphs) == (0 if "training" in part else 1)
    (mixer,) = gpu_script.read(results, "mixer")["cases"]
    assert "fused mix channels_last bf16" in {row["candidate"] for row in mixer["rows"]}
    assert "saw no kernel" in gpu_script.read(results, "counters")["cases"][0]["absent"]
    (step,) = gpu_script.read(results, "training")["cases"]
    kept = {row["candidate"]: row["kept_bytes"] for row in step["rows"]}
    assert kept["eager bf16"] > 2 * kept["fused channels_last bf16"] > 0


@pytest.mark.long
def test_the_real_command_starts_a_process_for_each_part(tmp_path):
    command = [
        sys.executable,
        str(gpu_script.ROOT / "bench" / "gpu"),
        *gpu_script.TRIAL,
        "--parts",
        "parity",
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(gpu_script.ROOT), "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = len(schedule.items("parity", gpu_script.options(tmp_path)))
    assert f"parity: {wanted} of {wanted} cases" in done.stdout
    assert "forward over max-autotune (goal 2): not measured" in done.stdout
    assert len(gpu_script.read(tmp_path, "parity")["cases"]) == wanted


@pytest.mark.long
def test_what_is_there_is_not_run_again(tmp_path, ran, monkeypatch):
    assert gpu_script.run(tmp_path, "--parts", "parity") == 0
    first = gpu_script.read(tmp_path, "parity")
    assert gpu_script.run(tmp_path, "--parts", "parity") == 0
    assert ran == ["parity"]
    lost = first["cases"].pop(3)
    (tmp_path / "cpu" / "parity.json").write_text(json.dumps(first))
    checked = []
    right = testing.verdict
    monkeypatch.setattr(testing, "verdict", lambda case: checked.append(case) or right(case))
    assert gpu_script.run(tmp_path, "--parts", "parity") == 0
    assert [str(case) for case in checked] == [lost["id"].rsplit("-", 2)[0]]
    monkeypatch.setattr(store, "version", lambda: "other sources")
    assert gpu_script.run(tmp_path, "--parts", "parity") == 0
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
    assert gpu_script.run(tmp_path / "committed", "--parts", "parity") == 0
    assert gpu_script.run(tmp_path / "new", "--parts", "parity") == 0
    assert ran == ["parity"]


def test_without_a_budget_nothing_starts_and_all_is_said_to_be_left(tmp_path, ran, capsys):
    assert gpu_script.run(tmp_path, "--budget", "0") == 0
    assert ran == []
    out = capsys.readouterr().out
    assert "parity: 0 of 28 cases" in out
    assert "not done: 28, the next cpu-float32-contiguous-eval-5x3x7x7-0-cpu" in out


def test_a_part_stops_before_the_deadline_and_the_next_call_goes_on(
    tmp_path, ran, monkeypatch, capsys
):
    clock = itertools.count(step=10.0)  # each look at it takes ten seconds
    time = SimpleNamespace(time=lambda: float(next(clock)))
    for module in (gpu, supervise, worker):
        monkeypatch.setattr(module, "time", time)
    assert gpu_script.run(tmp_path, "--parts", "parity", "--budget", "200") == 0
    some = len(gpu_script.read(tmp_path, "parity")["cases"])
    assert 1 < some < 28
    assert f"not done: {28 - some}" in capsys.readouterr().out
    assert gpu_script.run(tmp_path, "--parts", "parity", "--budget", "10000") == 0
    assert len(gpu_script.read(tmp_path, "parity")["cases"]) == 28


def _fail(case, text):
    row = testing.parity._row(case, (), (text,))
    return row


def test_a_lost_gpu_context_costs_one_case(tmp_path, ran, monkeypatch):
    right, calls = testing.verdict, []

    def verdict(case):
        calls.append(case)
        lost = len(calls) == 3
        return _fail(case, "AcceleratorError: CUDA error: misaligned") if lost else right(case)

    monkeypatch.setattr(testing, "verdict", verdict)
    assert gpu_script.run(tmp_path, "--parts", "parity") == 1
    assert ran == ["parity"] * 2  # a new process
    passed = [case["passed"] for case in gpu_script.read(tmp_path, "parity")["cases"]]
    assert passed == [True, True, False] + [True] * 25


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
    assert gpu_script.run(tmp_path, "--parts", "sanitizer") == 1
    assert len(started) == 2
    assert [(c["id"], c["error"]) for c in gpu_script.read(tmp_path, "sanitizer")["cases"]] == [
        (tool, "the process ended with status 9") for tool in schedule.TOOLS
    ]


def test_a_process_that_dies_at_once_is_not_started_for_ever(tmp_path, monkeypatch, capsys):
    started = _stub(monkeypatch, "sys.exit(5)")
    assert gpu_script.run(tmp_path, "--parts", "sanitizer") == 1
    assert len(started) == 2  # the second time after all other steps
    assert "ended with status 5 before its first case" in capsys.readouterr().out


def test_a_process_is_ended_at_the_deadline(tmp_path, monkeypatch, capsys):
    started = _stub(monkeypatch, "mark(); time.sleep(60)")
    begin = time.time()
    assert gpu_script.run(tmp_path, "--parts", "sanitizer", "--budget", "1.5") == 0
    assert time.time() - begin < 30
    (process,) = started
    assert process.poll() == -9
    assert "sanitizer: 0 of 2 cases" in capsys.readouterr().out


def _full(tmp_path):
    options = gpu_script.options(tmp_path)
    options.quick = False
    return options


def _first(part, options):
    found = [item for item in schedule.items(part, options) if item.rank == 0]
    return [(i.case.model, i.case.stage, i.case.batch, i.names) for i in found]


def test_what_decides_comes_first(tmp_path):
    options = _full(tmp_path)
    eager = ("eager", "eager channels_last")
    mixers = (*eager, "fused channels_last", "fused mix channels_last", "fused graph channels_last")
    four = [(stage, batch) for batch in (256, 1) for stage in (1, 2, 3, 4)]
    assert _first("mixer", options) == [("xs", stage, batch, mixers) for stage, batch in four]
    steps = (*eager, "fused channels_last")
    assert _first("training", options) == [("xs", s, 256, steps) for s in (1, 2, 3, 4)]
    models = (*eager, "fused channels_last", "fused graph channels_last")
    models += ("compile channels_last", "fused compile channels_last")
    assert _first("model", options) == [("xs", None, 256, models)]
    counted = [(i.case.stage, i.case.batch, i.rank) for i in schedule.items("counters", options)]
    assert counted == [(1, 256, 0), (4, 256, 0)]
    assert [(s.part, s.rank) for s in schedule.SCHEDULE[:8]] == [
        *((part, 0) for part in ("parity", "mixer", "counters", "training", "model")),
        *((part, 1) for part in ("mixer", "training", "parity")),
    ]


def test_smoke_takes_every_dtype_layout_and_mode_and_then_the_mixers_of_rank_0(tmp_path):
    options = _full(tmp_path)
    first = [item.case for item in schedule.items("parity", options) if item.rank == 0]
    smoke = first[:20]
    assert {(c.dtype, c.layout, c.mode) for c in smoke} == set(
        itertools.product(
            testing.BACKENDS["cpu"].dtypes, ("contiguous", "channels_last"), testing.MODES
        )
    )
    assert all(torch.Size(c.shape).numel() < 100_000 for c in smoke)
    odd = [(c.shape, c.dtype, c.mode) for c in smoke[18:]]  # channels that fill no block
    assert odd == [((5, 220, 7, 7), torch.bfloat16, "train")] * 2
    shapes = [(48, 56), (56, 28), (112, 14), (220, 7)]
    assert {(c.dtype, c.layout, c.mode, c.shape) for c in first[20:]} == {
        (torch.bfloat16, "channels_last", mode, (batch, c, size, size))
        for c, size in shapes
        for mode, batch in (("eval", 2), ("eval", 1), ("train", 2))
    }


def test_smoke_takes_every_triton_kernel():
    pytest.importorskip("triton")
    from casvit_kernels.module import FusedCATM, mixer_weights
    from casvit_kernels.ops.mixer.autograd import mix_training
    from casvit_kernels.ops.mixer.schema import Settings
    from casvit_kernels.ops.mixer.triton import launch

    for dtype in testing.BACKENDS["triton"].dtypes:
        of_dtype = [c for c in schedule.smoke_cases("cpu", "cpu") if c.dtype is dtype]
        case = next(c for c in of_dtype if c.mode == "train")
        weights = mixer_weights(FusedCATM(case.shape[1]).to(dtype))
        x = torch.zeros(case.shape, dtype=dtype, requires_grad=True)
        with launch.recorded() as record:
            settings = Settings(1e-5, 1e-5, True, True, dtype, "triton", "")
            mix_training(x, weights, settings)[0].sum().backward()
        assert {launched.name for launched in record} == launch.KERNELS.keys()


def test_nothing_is_left_out_and_no_candidate_is_without_its_gate(tmp_path):
    options = _full(tmp_path)
    sizes = {1: (56, 96), 2: (28, 48), 3: (14, 24), 4: (7, 12)}
    for part in schedule.SPEED:
        found = schedule.items(part, options)
        assert [item.rank for item in found] == sorted(item.rank for item in found)
        models = "model" in part
        assert {(i.case.model, i.case.stage, i.case.size, i.case.batch) for i in found} == {
            (model, None if models else stage, size, batch)
            for model in ("xs", "s", "m", "t")
            for stage in ((1,) if models else sizes)
            for size in ((224, 384) if models else sizes[stage])
            for batch in (1, 64, 256)
        }
        names = {}
        for item in found:
            names.setdefault(item.case, set()).update(item.names)
        for case, timed in names.items():
            every = schedule.case_names(schedule.LEVELS[part], case, gpu=True)
            assert timed == {name.removesuffix(" bf16") for name in every}
    ranks = {item.key: item.rank for item in schedule.items("parity", options)}
    for part in schedule.GATED:
        for item in schedule.items(part, options):
            mode = "train" if "training" in part else "eval"
            for shape in schedule.mixer_shapes(item.case):
                few = "x".join(map(str, (min(2, shape[0]), *shape[1:])))
                key = f"cpu-bfloat16-channels_last-{mode}-{few}-0-cpu"
                assert ranks[key] <= item.rank
    for part in schedule.PARTS:
        items = schedule.items(part, options)
        assert len({item.key for item in items}) == len(items)
        assert {item.rank for item in items} <= {
            step.rank for step in schedule.SCHEDULE if step.part == part
        }


def test_a_step_that_takes_too_long_waits_until_the_others_are_through(tmp_path, monkeypatch):
    """What it leaves is run once every step had its turn, and then without a limit of its own."""
    gpu_script.judge(tmp_path)
    ran = []

    def start(part, rank, options):
        ran.append((part, options.until < options.deadline))
        if len(ran) > 2:
            left = supervise.left_of(part, rank, options)
            store.load(part, options).add(*({"id": item.key} for item in left))

    monkeypatch.setattr(supervise, "supervise", start)
    steps = tuple(s for s in schedule.SCHEDULE if s.rank == 0)
    monkeypatch.setattr(gpu, "SCHEDULE", steps)
    assert gpu_script.run(tmp_path, "--parts", "mixer,counters") == 0
    parts = ("mixer", "counters")
    assert ran == [(part, limited) for limited in (True, False) for part in parts]


def test_no_candidate_begins_after_the_step_is_over(tmp_path, ran, monkeypatch):
    faults = gpu_script.tiny(monkeypatch)
    gpu_script.judge(tmp_path)
    steps = (schedule.Step("mixer", 0, 0.2),)
    monkeypatch.setattr(gpu, "SCHEDULE", steps)
    begun, rows = [], []

    def slow():
        if not begun:
            time.sleep(0.3)
        begun.append("eager channels_last bf16")

    def third():
        if not rows:
            rows.extend(gpu_script.read(tmp_path, "mixer")["cases"][0]["rows"])
            assert len(ran) == 2

    faults["eager channels_last bf16"] = slow
    faults["fused channels_last bf16"] = third
    assert gpu_script.run(tmp_path, "--parts", "mixer") == 0
    assert [row["candidate"] for row in rows] == ["eager bf16", "eager channels_last bf16"]


def test_a_library_that_serves_is_not_built_again(monkeypatch, capsys):
    def no(*_, **__):
        raise AssertionError("a compiler was started")

    monkeypatch.setattr(gpu.subprocess, "run", no)
    gpu.build_native()
    assert "the one that is there" in capsys.readouterr().out
    wrong = SimpleNamespace(why_not=lambda problem: "undefined symbol: here")
    monkeypatch.setattr(gpu, "get", lambda name: wrong)
    with pytest.raises(AssertionError, match="a compiler was started"):
        gpu.build_native()
    assert "undefined symbol: here" in capsys.readouterr().out


def test_parity_takes_the_real_shapes_in_every_dtype_layout_and_mode(tmp_path):
    options = gpu_script.options(tmp_path)
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
        gpu_script.options(tmp_path, *given)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_sanitizer_runs_what_the_backend_computes(backend, monkeypatch):
    seen = []
    right = SimpleNamespace(failures=())
    monkeypatch.setattr(testing, "verdict", lambda case: seen.append(case) or right)
    assert run_short(SimpleNamespace(backend=backend, device="cuda")) == 0
    assert {c.dtype for c in seen} <= set(testing.BACKENDS[backend].dtypes)
    assert len({c.dtype for c in seen}) == len({c.layout for c in seen}) == 2
