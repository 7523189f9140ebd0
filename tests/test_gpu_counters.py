"""What bench/gpu makes of a profiler's output, and of a profiler that is not there or not permitted."""

import os
import stat
from types import SimpleNamespace

import gpu_script
import pytest
from conftest import require_native
from gpu_script import schedule

from bench.gpu import counters
from bench.report.counters import diagnosis

RAW = """==PROF== Connected to process 12
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum",\
"sm__inst_issued.avg.pct_of_peak_sustained_active"
"","","","ns","byte","byte","%"
"0","12","gates_kernel","90,000","150000000","1000000","70.5"
"1","12","channel_gates_kernel","5000","1","1","1"
"2","12","combine_kernel","130000","230000000","77000000","61"
"3","12","gates_kernel","80000","150000000","1000000","71.5"
"4","12","gates_kernel","100000","150000000","1000000","72.5"
""".replace("\\\n", "")


def test_counters_are_read_by_name_and_unit_and_their_medians_kept():
    gates, combine = counters.read_csv(RAW)
    assert gates == {
        "name": "gates",
        "launches": 3,
        "duration_s": 90e-6,
        "dram_bytes": 151e6,
        "issue_percent": 71.5,
    }
    assert combine["duration_s"] == pytest.approx(130e-6)
    assert combine["dram_bytes"] == 307e6
    assert "tensor_percent" not in combine  # that GPU had none
    assert counters.read_csv("==ERROR== no kernels were profiled") == []


def _program(folder, text, status=0):
    path = folder / "ncu"
    (folder / "said").write_text(text)
    path.write_text(f'#!/bin/sh\necho "$@" > {folder}/given\ncat {folder}/said\nexit {status}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_nsight_compute_where_it_is_there_and_permitted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    options = gpu_script.options(tmp_path)
    (item,) = schedule.items("counters", options)
    _program(tmp_path, RAW)
    assert counters.nsight(item.case, options) == ([], "there is no GPU")
    options.device = "cuda"
    found, _ = counters.nsight(item.case, options)
    assert [kernel["name"] for kernel in found] == ["gates", "combine"]
    assert f"--probe {item.key} --device cuda" in (tmp_path / "given").read_text()
    _program(tmp_path, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 1)
    found, why = counters.nsight(item.case, options)
    assert not found
    assert "ended with status 1: ==ERROR== ERR_NVGPUCTRPERM" in why


def test_what_nsight_compute_looks_at_runs(tmp_path):
    require_native()
    options = gpu_script.options(tmp_path, "--probe", gpu_script.KEY)
    assert counters.probe(options) == 0


def test_without_counters_the_durations_of_torchs_profiler():
    def event(name, us):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(elapsed_us=lambda: us))

    events = [event("void gates<48>", 70), event("channel_gates_kernel", 5), event("combine", 120)]
    events += [event("void gates<48>", 90), event("backward_combine_kernel", 1), event("gemm", 9)]
    assert counters.durations(events) == [
        {"name": "gates", "launches": 2, "duration_s": 90e-6},
        {"name": "combine", "launches": 1, "duration_s": 120e-6},
    ]


@pytest.mark.parametrize(("us", "pipeline"), [(70.0, False), (76.0, False), (77.0, True)])
def test_what_to_build_next(us, pipeline):
    """At 3e12 bytes a second q and k of stage 1, 256 images, take 51.4 us."""
    kernels = [{"name": "combine", "duration_s": 1.0}, {"name": "gates", "duration_s": us / 1e6}]
    case = gpu_script.goal_case("mixer", 1, {}) | {"kernels": kernels}
    (line,) = diagnosis({"cases": [case]})
    assert ("a persistent pipeline is the next thing to build" in line) == pipeline
    assert f"{us - 51.4:.0f} us more" in line
    assert "not measured" in diagnosis({"cases": [case | {"stage": 4}]})[0]
