"""bench/gpu where something goes wrong: what it costs, and that the rest goes on.

The parts run in forks of this process, on work that is next to nothing, with a fault in each.
"""

import os
import subprocess
import sys
import time

import gpu_script
import pytest
from conftest import require_native
from gpu_script import KEY, KEYS, judge, read, run, schedule, store, worker

from bench.gpu import gates, pool
from casvit_kernels import benchmark, testing

FUSED = "fused channels_last bf16"
OTHERS = [part for part in schedule.PARTS if part not in schedule.SPEED]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@pytest.fixture(autouse=True)
def native():
    require_native()


@pytest.fixture
def faults(monkeypatch):
    return gpu_script.tiny(monkeypatch)


@pytest.fixture
def forks(monkeypatch):
    return gpu_script.forked(monkeypatch)


def _abort():
    os.abort()


def _raise():
    raise ZeroDivisionError("here")


def _hang():
    time.sleep(60)


def _cuda():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


FAULTS = {
    "abort": (_abort, "the process ended with status -6"),
    "raise": (_raise, "ZeroDivisionError: here"),
    "hang": (_hang, "did not finish within"),
    "cuda": (_cuda, "RuntimeError: CUDA error: an illegal memory access"),
}


def _rows(case):
    return {row["candidate"]: row for row in case["rows"]}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", schedule.SPEED)
def test_a_candidate_costs_itself_alone(part, fault, tmp_path, forks, faults, capfd):
    judge(tmp_path)
    faults[FUSED], text = FAULTS[fault]
    limit = ("--case-limit", "0.5") if fault == "hang" else ()
    assert run(tmp_path, "--parts", part, *limit) == 1
    assert len(forks) == (1 if fault == "raise" else 2)
    (case,) = read(tmp_path, part)["cases"]
    assert "unfinished" not in case
    rows = _rows(case)
    assert text in rows.pop(FUSED)["error"]
    assert {"eager bf16", "eager channels_last bf16"} <= rows.keys()
    assert all(row["median_s"] > 0 and "alone" not in row for row in rows.values())
    assert f"{KEYS[part]}, {FUSED}: {text}" in capfd.readouterr().out


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", OTHERS)
def test_a_case_costs_itself_alone(part, fault, tmp_path, forks, faults, monkeypatch):
    judge(tmp_path)
    act, text = FAULTS[fault]
    calls = tmp_path / "calls"  # of all processes

    def second_is_faulty(*_):
        with calls.open("a") as f:
            f.write(".")
        if len(calls.read_text()) == min(2, len(wanted)):
            act()
        return {"passed": True}

    name = "run_parity" if part == "parity" else f"run_{part}"
    monkeypatch.setattr(gates if part == "parity" else worker, name, second_is_faulty)
    if part == "parity":
        (tmp_path / "cpu" / "parity.json").unlink()
    wanted = schedule.items(part, gpu_script.options(tmp_path))
    limit = ("--case-limit", "0.5") if fault == "hang" else ()
    assert run(tmp_path, "--parts", part, *limit) == 1
    cases = read(tmp_path, part)["cases"]
    assert [case["id"] for case in cases] == [item.key for item in wanted]
    wrong = [case for case in cases if "error" in case]
    assert wrong == [cases[min(2, len(wanted)) - 1]]
    assert text in wrong[0]["error"]


def test_a_kill_keeps_the_candidates_that_were_measured(tmp_path, forks, faults):
    judge(tmp_path)
    faults[FUSED] = _hang  # the third
    assert run(tmp_path, "--parts", "mixer", "--budget", "2") == 0
    assert [fork.wait() for fork in forks] == [-9]
    (case,) = read(tmp_path, "mixer")["cases"]
    assert case["unfinished"]
    rows = _rows(case)
    assert list(rows) == ["eager bf16", "eager channels_last bf16"]
    assert all(row["median_s"] > 0 and row["alone"] for row in rows.values())
    assert case["copy_bytes_per_s"]
    faults.clear()
    assert run(tmp_path, "--parts", "mixer") == 0  # goes on
    (case,) = read(tmp_path, "mixer")["cases"]
    assert "unfinished" not in case
    assert len(case["rows"]) == 5
    assert not any("alone" in row for row in case["rows"])


def test_a_crash_while_taking_turns_keeps_what_each_took_alone(
    tmp_path, forks, faults, monkeypatch
):
    judge(tmp_path)
    monkeypatch.setattr("bench.harness.stepwise.in_turn", _die_in_turn)
    assert run(tmp_path, "--parts", "mixer") == 1
    assert len(forks) == 1
    (case,) = read(tmp_path, "mixer")["cases"]
    assert case["not_in_turn"] == "the process ended with status -6"
    assert len(case["rows"]) == 5
    assert all(row["alone"] for row in case["rows"])


def _die_in_turn(case, candidates, settings):
    if len(candidates) > 1:
        os.abort()
    return benchmark.interleave(candidates, rounds=1, min_round_seconds=0, pause_seconds=0)


def test_a_graph_whose_recording_spoils_the_context_is_recorded_once(tmp_path, forks, faults):
    def spoil():
        raise benchmark.Unavailable("it cannot be recorded: RuntimeError: CUDA error: here")

    judge(tmp_path)
    faults["fused mix channels_last bf16"] = spoil  # not the last
    assert run(tmp_path, "--parts", "mixer") == 0
    assert len(forks) == 2
    (case,) = read(tmp_path, "mixer")["cases"]
    rows = _rows(case)
    assert "cannot be recorded" in rows.pop("fused mix channels_last bf16")["absent"]
    assert len(rows) == 4
    assert all(row["median_s"] > 0 and "alone" not in row for row in rows.values())


def test_a_red_parity_case_blocks_only_its_own_speed(tmp_path, forks, faults, capsys):
    judge(tmp_path, lambda key: "-eval-1x220x7x7-" not in key)
    assert run(tmp_path, "--parts", "mixer,training,model,counters") == 1
    (mixer,) = read(tmp_path, "mixer")["cases"]
    assert mixer["refused"].startswith(
        "no speed: parity is red, cpu-bfloat16-channels_last-eval-1x220"
    )
    assert "rows" not in mixer
    assert read(tmp_path, "counters")["cases"][0]["refused"]
    for part in ("training", "model"):  # another mode, other shapes
        (case,) = read(tmp_path, part)["cases"]
        assert _rows(case)[FUSED]["median_s"] > 0
    assert f"{KEY}: no speed: parity is red" in capsys.readouterr().out


def test_speed_waits_for_parity_and_is_not_refused_for_ever(tmp_path, forks, faults, capsys):
    assert run(tmp_path, "--parts", "mixer") == 0
    assert read(tmp_path, "mixer")["cases"] == []
    assert "no speed before parity was checked" in capsys.readouterr().out
    judge(tmp_path)
    assert run(tmp_path, "--parts", "mixer") == 0
    assert len(read(tmp_path, "mixer")["cases"]) == 1


def test_a_fused_candidate_that_is_wrong_is_not_timed_and_the_others_are(
    tmp_path, forks, faults, monkeypatch
):
    import torch

    judge(tmp_path)
    right = torch.ones

    def wrong(*shape):
        return 3 * right(*shape)

    faults[FUSED] = lambda: monkeypatch.setattr(torch, "ones", wrong)  # before it computes
    faults["fused mix channels_last bf16"] = lambda: monkeypatch.setattr(torch, "ones", right)
    assert run(tmp_path, "--parts", "mixer") == 1
    rows = _rows(read(tmp_path, "mixer")["cases"][0])
    assert "parity failed" in rows[FUSED]["error"]
    assert rows["fused mix channels_last bf16"]["median_s"] > 0


def test_after_a_cuda_error_a_process_of_the_pool_does_no_more(monkeypatch):
    monkeypatch.setattr(pool, "_lost", False)
    group = schedule.unique(
        (0, testing.Case("cpu", gpu_script.torch.float32, "contiguous", "eval", (n, 1, 1, 1)))
        for n in range(4)
    )
    found = [{"passed": True}, {"passed": False, "failures": ("AcceleratorError: CUDA error",)}]
    monkeypatch.setattr(pool, "run_parity", lambda case: found.pop(0))
    assert [case["id"] for case in pool.run_group(group)] == [item.key for item in group[:2]]
    assert pool.run_group(group[2:]) == []


@pytest.mark.long
def test_a_pool_that_hangs_is_given_up_and_its_cases_run_one_at_a_time(tmp_path, monkeypatch):
    gpu_script.inside(monkeypatch)
    monkeypatch.setattr(pool, "run_group", gpu_script.hang_in_pool)
    given = ("--parts", "parity", "--jobs", "2", "--case-limit", "20")
    begin = time.time()
    assert run(tmp_path, *given) == 0
    assert 20 < time.time() - begin < 120
    assert len(read(tmp_path, "parity")["cases"]) == 28


@pytest.mark.long
def test_a_pool_judges_every_case(tmp_path, monkeypatch):
    gpu_script.inside(monkeypatch)
    monkeypatch.setattr(gates, "run_parity", None)  # of this process
    assert run(tmp_path, "--parts", "parity", "--jobs", "2") == 0
    assert {case["passed"] for case in read(tmp_path, "parity")["cases"]} == {True}


@pytest.mark.long
def test_the_worker_ends_with_its_parent_and_what_it_measured_stays(tmp_path):
    """The real command in its real processes, killed from outside as at the end of a lease."""
    judge(tmp_path)
    command = [sys.executable, gpu_script.__file__, FUSED, *gpu_script.TRIAL]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path), "--parts", "mixer"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(gpu_script.ROOT)},
    )
    for line in process.stdout:
        if line.startswith("hangs"):
            break
    process.kill()
    process.wait()
    process.stdout.read()  # until the worker, who has the other end of it, is gone as well
    (case,) = read(tmp_path, "mixer")["cases"]
    assert list(_rows(case)) == ["eager bf16", "eager channels_last bf16"]
    assert store.UNFINISHED in case
