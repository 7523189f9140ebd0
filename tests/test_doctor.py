"""`casvit-kernels doctor`: each mistake is found in facts that have it, and in none that has not."""

import json
import os
import runpy
from pathlib import Path

import pytest
import torch
from conftest import require_native
from interrupted import interrupted
from test_cli import run, wrong_backend  # noqa: F401

from bench.report import command as report
from bench.report import cpu_numbers as generated
from bench.report.load import load
from casvit_kernels import benchmark, doctor, testing
from casvit_kernels.backends import native
from casvit_kernels.doctor import cpu_numbers, facts, installation, parity, processor, speed
from casvit_kernels.doctor import run as checks
from casvit_kernels.doctor.cgroup import quota
from casvit_kernels.doctor.facts import Facts, Gpu, Native
from casvit_kernels.doctor.run import looks

ROOT = Path(__file__).parents[1]
ZEN4 = (
    "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    "flags\t\t: fpu avx avx2 fma f16c avx512f avx512dq avx512bw avx512vl avx512_bf16 hypervisor\n"
)
SETS = {
    "amx": "this CPU does not have AMX-BF16",
    "avx512_bf16": None,
    "avx512": None,
    "avx2": None,
    "portable": None,
}
GOMP = "7f00-7f01 r-xp 00000000 08:01 12 /usr/lib/python3/torch/lib/libgomp.so.1\n"
HEALTHY = Facts(
    environ={},
    torch="2.15.0+cpu",
    native=Native(None, "gcc 12.2.0", sets=SETS),
    elsewhere=None,
    threads=8,
    cpus=8,
    allowed=8,
    quota=None,
    load=0.3,
    maps=GOMP + "7f02-7f03 rw-p 00000000 00:00 0\n" + GOMP,
    cpuinfo=ZEN4,
    backend_error=None,
    modes=(),
    gpu=Gpu(False),
)


def found(name=None, **changed):
    """The one finding that is not ok (with this name), of healthy facts but for these."""
    (finding,) = (f for f in looks(HEALTHY._replace(**changed)) if f.status != "ok")
    assert name in (None, finding.name)
    assert finding.remedy
    return finding


def library(**changed):
    return HEALTHY.native._replace(**changed)


def test_nothing_is_found_where_nothing_is_wrong():
    findings = list(looks(HEALTHY))
    assert {f.status for f in findings} == {"ok"}
    assert len(findings) == 8
    assert all(f.remedy is None for f in findings)


# The installation


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "2.16.0a0+git12", "3.1.0", "nightly"])
def test_torch_outside_of_the_range(version):
    finding = found("torch", torch=version)
    assert finding.status == "problem"
    assert version in finding.found
    assert finding.remedy == "pip install 'torch>=2.11,<2.16'"


@pytest.mark.parametrize("version", ["2.11.0", "2.15.3+cu132", "2.12.0a0"])
def test_torch_in_the_range(version):
    assert all(f.status == "ok" for f in looks(HEALTHY._replace(torch=version)))


def test_the_range_is_that_of_the_package():
    oldest, too_new = (".".join(map(str, v)) for v in (installation.OLDEST, installation.TOO_NEW))
    assert f'"torch>={oldest},<{too_new}"' in (ROOT / "pyproject.toml").read_text()


def test_no_native_library():
    reason = f"the native library was not built (_C.so is missing): {native.REMEDY}"
    missing = Native(reason)
    finding = found("native library", native=missing)
    assert finding.status == "problem"
    assert finding.found == "the native library was not built (_C.so is missing)"
    assert finding.remedy == native.REMEDY
    finding = found("native library", native=missing, elsewhere="/site/casvit_kernels")
    assert "/site/casvit_kernels" in finding.found
    assert "outside of the source tree" in finding.remedy


def test_an_instruction_set_that_cannot_be_used():
    reason = "CASVIT_KERNELS_CPU_ISA='amx' cannot be used: this CPU does not have AMX-BF16"
    environ = {"CASVIT_KERNELS_CPU_ISA": "amx"}
    finding = found("native library", native=Native(reason), environ=environ)
    assert (finding.status, finding.found) == ("problem", reason)
    assert finding.remedy == "unset CASVIT_KERNELS_CPU_ISA"


def test_a_native_library_of_another_build():
    finding = found("native library", native=library(same_weights=False))
    assert finding.status == "problem"
    assert "make setup" in finding.remedy
    finding = found("native library", native=library(sources_newer=True))
    assert finding.status == "note"
    assert "gcc 12.2.0" in finding.found


# Settings


def test_a_backend_that_is_asked_for():
    environ = {"CASVIT_KERNELS_BACKEND": "reference"}
    finding = found("CASVIT_KERNELS_BACKEND", environ=environ)
    assert finding.status == "note"
    assert finding.remedy == "unset CASVIT_KERNELS_BACKEND"
    finding = found(
        "CASVIT_KERNELS_BACKEND", environ=environ, backend_error="CASVIT_KERNELS_BACKEND: no"
    )
    assert (finding.status, finding.found) == ("problem", "no")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metal", "expected one of cpu, cuda"),
        ("cuda", "'cuda' cannot be used: "),
        ("reference", None),
    ],
)
def test_the_backend_that_is_asked_for_is_tried(name, said, monkeypatch):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("it may be usable here")
    monkeypatch.setenv("CASVIT_KERNELS_BACKEND", name)
    error = facts.gather().backend_error
    assert error is said is None or said in error


def test_a_lesser_instruction_set_that_is_asked_for():
    finding = found("CASVIT_KERNELS_CPU_ISA", environ={"CASVIT_KERNELS_CPU_ISA": "avx2"})
    assert finding.status == "note"
    assert "'avx512_bf16'" in finding.found
    best = HEALTHY._replace(environ={"CASVIT_KERNELS_CPU_ISA": "avx512_bf16"})
    assert all(f.status == "ok" for f in looks(best))


def test_variables_of_debugging():
    finding = found("TRITON_INTERPRET", environ={"TRITON_INTERPRET": "1"})
    assert (finding.status, finding.remedy) == ("note", "unset TRITON_INTERPRET")
    off = HEALTHY._replace(environ={"TRITON_INTERPRET": "0", "CUDA_LAUNCH_BLOCKING": ""})
    assert all(f.status == "ok" for f in looks(off))


@pytest.fixture
def mode(request):
    """One of PyTorch's modes, on."""
    if request.param == "anomaly":
        with torch.autograd.detect_anomaly(check_nan=False):
            yield request.param
    elif request.param == "fill":
        with testing.poisoned():
            yield request.param
    elif request.param == "hooks":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        yield request.param
        handle.remove()
    else:
        with torch.device("cpu"):
            yield request.param


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", ["anomaly", "fill", "hooks", "functions"], indirect=True)
def test_modes_of_this_process(mode):
    modes = facts.gather().modes
    assert modes == (mode,)
    assert found("mode", modes=modes).status == "note"


def test_no_mode_is_on_by_default():
    assert facts.gather().modes == ()


# Threads


@pytest.mark.parametrize(
    ("changed", "each"),
    [
        ({"threads": 64}, 8),
        ({"allowed": 4}, 4),
        ({"quota": 2.0}, 2),
        ({"quota": 0.5, "threads": 2}, 1),
        ({"environ": {"LOCAL_WORLD_SIZE": "4"}}, 2),
    ],
)
def test_more_threads_than_can_run(changed, each):
    finding = found("threads", **changed)
    assert finding.status == "problem"
    assert finding.remedy == f"export OMP_NUM_THREADS={each}, or torch.set_num_threads({each})"


def test_a_quota_of_a_part_of_a_cpu():
    fits = HEALTHY._replace(quota=1.5, threads=2)
    assert all(f.status == "ok" for f in looks(fits))
    assert "quota of 1.5" in next(f.found for f in looks(fits) if f.name == "threads")


def test_one_thread_on_many_cpus():
    finding = found("threads", threads=1, environ={"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"})
    assert finding.status == "note"
    assert "torchrun" in finding.found
    assert "OMP_NUM_THREADS=4" in finding.remedy
    assert "unset MKL_NUM_THREADS" in found(threads=1, environ={"MKL_NUM_THREADS": "1"}).remedy
    alone = HEALTHY._replace(threads=1, allowed=1, cpus=1, environ={"OMP_NUM_THREADS": "1"})
    assert all(f.status == "ok" for f in looks(alone))


def test_pinned_to_one_cpu():
    finding = found("threads", threads=1, allowed=1, environ={"OMP_PROC_BIND": "true"})
    assert (finding.status, finding.remedy) == ("note", "unset OMP_PROC_BIND")


OTHER = {
    "gomp": "7f04-7f05 r-xp 0 08:01 13 /site/scikit_learn.libs/libgomp-e985bcbb.so.1.0.0",
    "iomp": "7f06-7f07 r-xp 0 08:01 14 /opt/conda/lib/libiomp5.so",
    "omp": "7f08-7f09 r-xp 0 08:01 15 /opt/conda/lib/libomp.so",
}


@pytest.mark.parametrize(
    ("others", "status"),
    [
        (["gomp"], "note"),
        (["iomp"], "note"),
        (["iomp", "omp"], "problem"),
        (["gomp", "omp"], "note"),
    ],
)
def test_several_openmp_runtimes(others, status):
    finding = found("OpenMP", maps=GOMP + "\n".join(OTHER[name] for name in others))
    assert finding.status == status
    assert all(OTHER[name].split()[-1] in finding.found for name in others)


def test_the_silenced_error_of_two_runtimes():
    maps = OTHER["iomp"] + "\n" + OTHER["omp"]
    finding = found(maps=maps, environ={"KMP_DUPLICATE_LIB_OK": "TRUE"})
    assert "KMP_DUPLICATE_LIB_OK only silences" in finding.found


def test_paths_do_not_tell_who_the_user_is(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    line = "7f04-7f05 r-xp 0 08:01 13 /home/ada/env/lib/libiomp5.so"
    assert "~/env/lib/libiomp5.so" in found(maps=f"{GOMP}{line}\n").found


def test_a_forked_process():
    require_native()
    native.load()
    assert not facts.gather().native.loaded_by_parent
    child = os.fork()
    if child == 0:
        os._exit(0 if facts.gather().native.loaded_by_parent else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finding = found("fork", native=library(loaded_by_parent=True))
    assert "spawn" in finding.remedy


def test_a_machine_that_others_use():
    assert found("load", load=7.5).status == "note"


V1 = "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000", "a/cpu.max": "200000 100000"}, 1.0),
        ("0::/not/seen\n", {"cpu.max": "300000 100000"}, 3.0),
        (V1, {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        (
            V1,
            {
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "400000",
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
            },
            4.0,
        ),
        ("3:cpuset:/x\n", {"cpu.max": "100000 100000"}, None),
        ("", {}, None),
    ],
)
def test_quotas_of_control_groups(group, files, expected, tmp_path):
    for name, text in {
        "proc/self/cgroup": group,
        **{f"sys/fs/cgroup/{n}": t for n, t in files.items()},
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert quota(tmp_path) == expected


# The CPU


def without(*flags, of=ZEN4):
    words = of.split(" ")
    return " ".join(word for word in words if word.strip() not in flags)


def sets(best):
    names = list(SETS)
    return {n: None if i >= names.index(best) else f"no {n}" for i, n in enumerate(names)}


def test_a_vm_that_hides_avx512():
    hidden = ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_bf16")
    finding = found("CPU", cpuinfo=without(*hidden), native=library(sets=sets("avx2")))
    assert finding.status == "note"
    assert all(flag in finding.found for flag in hidden)
    assert "the hypervisor hides" in finding.found
    assert "-cpu host" in finding.remedy
    bare = without(*hidden, "hypervisor").replace("avx512_bf16 hypervisor", "") + "\n"
    finding = found("CPU", cpuinfo=bare, native=library(sets=sets("avx2")))
    assert "firmware" in finding.remedy


def test_a_vm_with_a_generic_cpu():
    generic = (
        "vendor_id\t: GenuineIntel\ncpu family\t: 15\nmodel\t\t: 107\n"
        "model name\t: QEMU Virtual CPU version 2.5+\nflags\t\t: fpu sse sse2 hypervisor\n"
    )
    finding = found("CPU", cpuinfo=generic, native=library(sets=sets("portable")))
    assert finding.status == "problem"
    assert "QEMU Virtual CPU" in finding.found
    assert "avx2 fma f16c" in finding.found


@pytest.mark.parametrize(
    ("vendor", "family", "model", "best"),
    [
        ("GenuineIntel", 6, 143, "amx"),
        ("GenuineIntel", 6, 85, "avx512"),
        ("GenuineIntel", 6, 79, "avx2"),
        ("GenuineIntel", 6, 42, None),
        ("AuthenticAMD", 25, 1, "avx2"),
        ("AuthenticAMD", 25, 17, "avx512_bf16"),
        ("AuthenticAMD", 25, 97, "avx512_bf16"),
        ("AuthenticAMD", 26, 2, "avx512_bf16"),
        ("AuthenticAMD", 23, 49, "avx2"),
        ("ARM", 8, 1, None),
    ],
)
def test_what_a_model_of_cpu_has(vendor, family, model, best):
    """What is missing of it is hidden; a model that is not known has nothing to hide."""
    bare = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nflags\t\t: fpu\n"
    findings = list(looks(HEALTHY._replace(cpuinfo=bare, native=library(sets=sets("portable")))))
    text = next(f for f in findings if f.name == "CPU").found
    needed = {"avx2": "f16c", "avx512": "avx512dq", "avx512_bf16": "avx512_bf16", "amx": "amx_int8"}
    assert [n for n, flag in needed.items() if text.endswith(flag)] == ([best] if best else [])


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("the operating system does not grant the AMX registers", "Linux 5.16"),
        ("not in this build: the compiler was too old for it", "g++ 11"),
    ],
)
def test_a_better_instruction_set_is_withheld(reason, remedy):
    amx = ZEN4.replace("hypervisor", "amx_tile amx_bf16 amx_int8")
    finding = found("CPU", cpuinfo=amx, native=library(sets={**SETS, "amx": reason}))
    assert finding.status == "note"
    assert reason in finding.found
    assert remedy in finding.remedy


def test_x86_code_translated_on_an_apple_cpu():
    cpuinfo = "vendor_id : VirtualApple\nmodel name : VirtualApple @ 2.50GHz\nflags : fpu sse2\n"
    assert "arm64" in found("CPU", cpuinfo=cpuinfo, native=library(sets=sets("portable"))).remedy


def test_an_arm_cpu():
    arm = HEALTHY._replace(
        cpuinfo="processor\t: 0\nFeatures\t: fp asimd asimdhp i8mm\n",
        native=library(sets={"portable": None}),
    )
    assert all(f.status == "ok" for f in looks(arm))
    assert processor.features(arm.cpuinfo) == ["asimd", "asimdhp", "i8mm"]


# GPUs


GPU = Gpu(True, ("NVIDIA H100",), "CUDA 13.2", "570.86.10", None, {"cuda": None, "triton": None})
UNUSED = GPU._replace(usable=(), reasons={"cuda": "no GPU", "triton": "no GPU"})


def test_gpus_that_are_served():
    served = HEALTHY._replace(gpu=GPU)
    assert all(f.status == "ok" for f in looks(served))
    finding = found("GPU", gpu=GPU._replace(reasons={"cuda": "too old", "triton": "no triton"}))
    assert finding.status == "problem"
    assert "triton: no triton" in finding.found


def test_a_gpu_that_pytorch_does_not_use():
    said = "The NVIDIA driver on your system is too old (found version 11040)"
    finding = found("GPU", gpu=UNUSED._replace(said=said))
    assert finding.status == "problem"
    assert said in finding.found
    assert "570.86.10" in finding.found
    assert "driver that serves CUDA 13.2" in finding.remedy
    finding = found("GPU", gpu=UNUSED._replace(built_for="CPU"))
    assert finding.status == "note"
    assert "built for CPUs alone" in finding.found
    finding = found("GPU", gpu=UNUSED, environ={"CUDA_VISIBLE_DEVICES": ""})
    assert (finding.status, finding.remedy) == ("note", "unset CUDA_VISIBLE_DEVICES")


def test_a_driver_older_than_the_kernels():
    reason = "it was built with CUDA 13.2, the driver serves up to 12.4: install a newer driver"
    finding = found("GPU", gpu=GPU._replace(reasons={"cuda": reason, "triton": None}))
    assert finding.status == "note"
    assert reason in finding.found


# What is tried


def nothing():
    pass


@pytest.fixture
def no_networks(monkeypatch):
    monkeypatch.setattr(parity, "precisions", list)


def test_parity_fails(wrong_backend, no_networks):  # noqa: F811
    """The reference is wrong by a thousandth."""
    case = testing.Case("reference", torch.float32, "contiguous", "eval", (2, 8, 5, 5))
    (finding,) = parity.findings({"reference": [case]}, nothing)
    assert finding.status == "problem"
    assert "1 of 1 cases failed, the first float32 contiguous eval 2x8x5x5" in finding.found
    assert "parity --backend reference" in finding.remedy


def test_parity_passes(no_networks):
    case = testing.Case("reference", torch.float32, "contiguous", "eval", (2, 8, 5, 5))
    (finding,) = parity.findings({"reference": [case]}, nothing)
    assert finding.status == "ok"
    assert finding.found.startswith("1 cases, errors at most ")


def test_what_parity_covers():
    """Of each usable backend every dtype, mode and layout."""
    for backend, cases in parity.plan().items():
        assert {c.backend for c in cases} == {backend}
        if backend == "triton" and not torch.cuda.is_available():
            continue
        assert {c.dtype for c in cases} == set(testing.BACKENDS[backend].dtypes)
        assert {c.mode for c in cases} == set(testing.MODES)
        assert {c.layout for c in cases} == set(testing.LAYOUTS)
        assert len(cases) < 60
        if backend != "reference":
            assert {c.shape for c in testing.real_cases(backend, 2, inputs=[64])} < {
                c.shape for c in cases
            }


def test_a_whole_network_that_is_not_exact(monkeypatch):
    require_native()
    right = benchmark.network_of
    monkeypatch.setattr(benchmark, "network_of", lambda *a: lambda x: right(*a)(x) * 1.1)
    finding = parity._network("fp32")
    assert finding.status == "problem"
    assert "at most 2 passes" in finding.found


@pytest.mark.long
def test_whole_networks_are_exact():
    require_native()
    findings = list(parity.findings({}, nothing))
    assert [f.status for f in findings] == ["ok"] * len(benchmark.precisions())


PROBE = speed.PROBES[0]


@pytest.fixture
def committed(monkeypatch):
    monkeypatch.setattr(speed, "MEASURED", {"amx": {PROBE: (6.0, 2, "2026-11-22")}})


@pytest.mark.parametrize(
    ("here", "load", "status", "said"),
    [
        (6.5, 0.0, "ok", "committed for amx: 6.00 (2 threads, 2026-11-22)"),
        (3.1, 0.0, "ok", "3.10 times as fast as eager, on 2 threads"),
        (2.9, 0.0, "note", "2.90 times as fast"),
        (11.9, 0.0, "ok", "11.90 times as fast"),
        (12.1, 0.0, "note", "it is eager that is slow"),
        (2.9, 8.0, "note", "the machine is busy"),
    ],
)
def test_a_speed_is_held_against_the_committed_one(here, load, status, said, committed):
    finding = speed.judged(PROBE, "amx", here, 2, HEALTHY._replace(load=load))
    assert finding.status == status
    assert said in finding.found
    assert (finding.remedy is None) == (status == "ok")


def test_a_speed_without_a_committed_one(committed):
    finding = speed.judged(PROBE, "avx2", 0.1, 1, HEALTHY)
    assert finding.status == "ok"
    assert "on 1 thread; no committed figure for avx2" in finding.found


def test_a_speed_is_measured_on_as_many_threads_as_the_committed(committed, monkeypatch):
    require_native()
    asked = []
    monkeypatch.setattr(speed, "active_instruction_set", lambda: "amx")
    monkeypatch.setattr(speed, "ratio", lambda probe, count: asked.append((probe, count)) or 6.0)
    list(speed.findings(HEALTHY._replace(threads=8), nothing))
    list(speed.findings(HEALTHY._replace(threads=1), nothing))
    assert asked == [(PROBE, 2), (speed.PROBES[1], 8), (PROBE, 1), (speed.PROBES[1], 1)]


def test_a_ratio_is_of_eager_over_fused(monkeypatch):
    threads = torch.get_num_threads()
    seen = []

    def candidates_of(mixer, x, *, include, backend):
        assert (x.shape, backend) == ((1, 48, 56, 56), "cpu")
        return dict.fromkeys(include)

    def interleave(candidates, **_):
        seen.append(torch.get_num_threads())
        seconds = {"eager": 3.0, "fused": 2.0}
        return {n: benchmark.Timing(seconds[n], 0, 0, 1, 1, ()) for n in candidates}

    monkeypatch.setattr(benchmark, "mixer_candidates", candidates_of)
    monkeypatch.setattr(benchmark, "interleave", interleave)
    assert speed.ratio(speed.Probe("xs", 1, 1), threads + 1) == 1.5
    assert seen == [threads + 1]
    assert torch.get_num_threads() == threads


def test_shapes_of_probes_are_those_of_the_results():
    cases = [
        c for d in load(ROOT / "bench" / "results") for c in d["cases"] if c["level"] == "mixer"
    ]
    for probe in speed.PROBES:
        batch, channels, side, _ = probe.shape
        assert any(
            (c["model"], c["stage"], c["batch"], c["channels"], c["size"])
            == (probe.model, probe.stage, batch, channels, side)
            for c in cases
        )


def test_the_committed_numbers_are_of_the_results(tmp_path):
    path = ROOT / "casvit_kernels" / "doctor" / "cpu_numbers.py"
    assert report.outputs(ROOT)[path] == path.read_text()
    assert generated.PROBES == speed.PROBES
    documents = load(ROOT / "bench" / "results")
    assert generated.measured(documents) == cpu_numbers.MEASURED
    (tmp_path / "numbers.py").write_text(generated.module(documents))
    assert runpy.run_path(str(tmp_path / "numbers.py"))["MEASURED"] == cpu_numbers.MEASURED


def test_numbers_of_one_result():
    rows = [{"candidate": "eager", "median_s": 3.0}, {"candidate": "fused", "median_s": 0.5}]
    case = {
        "level": "mixer",
        "model": "t",
        "stage": 4,
        "batch": 8,
        "dtype": "float32",
        "rows": rows,
    }
    here = {"isa": "avx2", "device": "cpu", "threads": 4, "date": "2026-11-29T10:00:00+00:00"}
    result = {"environment": here, "cases": [case]}
    assert generated.measured([result]) == {"avx2": {("t", 4, 8): (6.0, 4, "2026-11-29")}}
    for other in (
        {**result, "environment": {**here, "isa": None}},
        {**result, "environment": {**here, "device": "cuda"}},
        {**result, "cases": [{**case, "dtype": "bfloat16"}]},
        {**result, "cases": [{**case, "rows": rows[:1]}]},
        {**result, "cases": [{k: v for k, v in case.items() if k != "rows"}]},  # refused
    ):
        assert generated.measured([other]) == {}


# The command


NOTED = HEALTHY._replace(load=8.0, environ={"CASVIT_KERNELS_BACKEND": "reference"})
FAILED = NOTED._replace(torch="2.16.0", maps=GOMP + "\n".join(OTHER.values()))


@pytest.mark.parametrize(
    ("here", "status", "last"),
    [
        (HEALTHY, 0, "no problems and no notes."),
        (NOTED, 0, "no problems and 2 notes."),
        (FAILED, 1, "2 problems and 2 notes."),
    ],
)
def test_problems_fail_the_command_and_notes_do_not(here, status, last, monkeypatch):
    monkeypatch.setattr(checks, "gather", lambda: here)
    got, out, err = run("doctor", "--quick")
    assert (got, err) == (status, "")
    assert out.splitlines()[-1] == last
    assert out.isascii()
    assert "\x1b" not in out
    # Longer are words that are not cut: paths.
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in out.splitlines())
    got, out, err = run("doctor", "--quick", "--json")
    document = json.loads(out)
    assert (got, err, document["passed"]) == (status, "", status == 0)
    assert [f["status"] for f in document["findings"]] == [f.status for f in looks(here)]
    info = json.loads(run("info", "--json")[1])
    assert info.keys() - document.keys() == set()


def test_a_remedy_stands_under_what_was_found(monkeypatch):
    monkeypatch.setattr(checks, "gather", lambda: HEALTHY._replace(torch="2.16.0"))
    lines = run("doctor", "--quick")[1].splitlines()
    assert lines[:2] == [
        "problem  torch: 2.16.0; expected 2.11 or later, below 2.16",
        "         -> pip install 'torch>=2.11,<2.16'",
    ]


def test_no_command_is_cut():
    for start in range(1, 90):
        finding = doctor.Finding("a", "note", "b" * start, "c" * start + " try --no-cache-dir")
        assert " --no-cache-dir" in str(finding)


def test_this_process_is_looked_at():
    names = [f.name for f in doctor.checkup(quick=True).findings]
    assert names[:2] == ["torch", "native library"]
    assert {"threads", "GPU"} <= set(names)


def test_trials_follow_the_looks(monkeypatch):
    """And progress reaches its end."""
    case = testing.Case("reference", torch.float32, "contiguous", "eval", (2, 8, 5, 5))
    monkeypatch.setattr(parity, "plan", lambda: {"reference": [case]})
    monkeypatch.setattr(
        parity, "_network", lambda p: doctor.Finding(f"parity of {p}", "ok", "tried")
    )
    monkeypatch.setattr(speed, "ratio", lambda probe, count: 100.0)
    steps = []
    found = doctor.checkup(progress=lambda *step: steps.append(step))
    names = [f.name for f in found.findings]
    tried = [n for n in names if n.startswith(("parity", "speed"))]
    assert names[-len(tried) :] == tried
    assert tried[0] == "parity of reference"
    assert steps == [(i + 1, len(tried)) for i in range(len(tried))]


@pytest.mark.long
def test_the_whole_command():
    status, out, _ = run("doctor", "--json")
    document = json.loads(out)
    tried = [f for f in document["findings"] if f["name"].startswith("parity")]
    assert tried
    assert {f["status"] for f in tried} == {"ok"}
    assert status == (0 if document["passed"] else 1)


@pytest.mark.long
def test_ctrl_c():
    status, out, err = interrupted("doctor", after="doctor")
    assert (status, out) == (130, "")
    assert "interrupted" in err
    assert "Traceback" not in err
