"""The command line: what each verb answers, and what it says to wrong usage."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from interrupted import interrupted

from casvit_kernels import BackendUnavailable, backends, demo, export, testing
from casvit_kernels.__main__ import main
from casvit_kernels.backends import cuda
from casvit_kernels.models import rcvit_xs
from casvit_kernels.ops.mixer.dispatch import ReferenceKernels

VERBS = ("demo", "tokens", "info", "doctor", "parity", "bench", "export", "plan")


def run(*argv):
    """Exit status, stdout and stderr of one call."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(a) for a in argv])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def refused(*argv):
    """The one line that wrong usage or input gets."""
    status, out, err = run(*argv)
    assert status == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    return err


@pytest.fixture
def wrong_backend(monkeypatch):
    """The reference backend, chosen by default, with an error of a thousandth."""
    right = ReferenceKernels.project_and_mix

    def wrong(self, x, w, eps, packed):
        return right(self, x, w, eps, packed) * 1.001

    monkeypatch.setattr(ReferenceKernels, "project_and_mix", wrong)
    monkeypatch.setenv("CASVIT_KERNELS_BACKEND", "reference")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb):
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert f"example: casvit-kernels {verb}" in out
    assert "--json" in out


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "casvit_kernels", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("casvit-kernels ")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["dance"], "dance"),
        ([], "VERB"),
        (["demo", "--model", "resnet"], "--model"),
        (["demo", "--threads", "0"], "--threads"),
        (["bench", "--batch", "0"], "--batch"),
        (["bench", "--batch", "eight"], "--batch"),
        (["bench", "--stage", "5"], "--stage"),
        (["parity", "--dtype", "int8"], "--dtype"),
        (["parity", "--backend", "metal"], "reference"),
        (["parity", "--backend", "cuda"], "cuda"),
        (["export"], "--onnx"),
        (["export", "--onnx", "/tmp/never.onnx", "--head", "yolo"], "--head"),
        (["export", "--onnx", "/tmp/never.onnx", "--input-size", "64x"], "--input-size"),
        (
            ["export", "--onnx", "/tmp/never.onnx", "--head", "backbone", "--classes", "5"],
            "--classes",
        ),
        (["export", "--onnx", "/tmp/never.onnx", "--pad-channels"], "--coreml"),
        (["export", "--onnx", "model.mlpackage"], ".onnx"),
        (["export", "--onnx", "/nowhere/model.onnx"], "/nowhere"),
        (["export", "--checkpoint", "/nowhere.pth", "--onnx", "/tmp/never.onnx"], "/nowhere.pth"),
    ],
)
def test_wrong_usage_gets_one_line(argv, said):
    assert said in refused(*argv)


def test_unknown_backend_lists_the_known():
    line = refused("parity", "--backend", "metal")
    assert all(status.name in line for status in backends())


def test_backend_that_cannot_run_says_why():
    reason = next(status.reason for status in backends() if status.name == "cuda")
    assert reason in refused("parity", "--backend", "cuda")


@pytest.mark.parametrize("verb", ["demo", "tokens", "bench", "parity"])
def test_environment_variable_with_impossible_backend(verb, monkeypatch):
    monkeypatch.setenv("CASVIT_KERNELS_BACKEND", "cuda")
    assert "CASVIT_KERNELS_BACKEND='cuda'" in refused(verb)


def test_info():
    status, out, _ = run("info", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["environment"]["torch"] == torch.__version__
    assert [(b["name"], b["usable"], b["reason"]) for b in found["backends"]] == [
        tuple(b) for b in backends()
    ]
    status, out, _ = run("info")
    assert status == 0
    said = " ".join(out.split())  # lines are broken at 80 columns
    assert all(b.name in said and (b.reason or "usable") in said for b in backends())


def test_parity_of_the_default_backend():
    status, out, _ = run("parity", "--json", "--dtype", "float32")
    found = json.loads(out)
    assert status == 0
    assert found["passed"]
    assert found["backend"] == next(
        b.name for b in backends() if b.usable and b.name in ("cpu", "reference")
    )
    assert {row["dtype"] for row in found["rows"]} == {"float32"}
    assert len(found["rows"]) == len(testing.cases(found["backend"], dtypes=[torch.float32]))


def test_parity_failure_exits_1(wrong_backend, monkeypatch):
    case = testing.Case("reference", torch.float32, "contiguous", "eval", (2, 8, 5, 5))
    monkeypatch.setattr(testing.parity, "cases", lambda *_, **__: [case])
    status, out, _ = run("parity", "--backend", "reference")
    assert status == 1
    assert "1 FAILED" in out
    status, out, _ = run("parity", "--backend", "reference", "--json")
    assert status == 1
    assert not json.loads(out)["passed"]


def test_bench_of_one_stage():
    status, out, _ = run("bench", "--quick", "--stage", 4, "--batch", 1, "--threads", 1, "--json")
    found = json.loads(out)
    assert status == 0
    (stage,) = found["speed"]["stages"]
    assert stage["shape"] == [1, 220, 7, 7]
    by_name = {latency["name"]: latency for latency in stage["latencies"]}
    assert by_name.keys() == {"eager", "eager channels_last", "fused", "fused channels_last"}
    for latency in by_name.values():
        assert latency["p25"] <= latency["seconds"] <= latency["p75"]
        assert latency["speedup"] == pytest.approx(by_name["eager"]["seconds"] / latency["seconds"])
    assert {a["name"] for a in found["speed"]["absent"]} >= {"compile", "onnxruntime"}


def test_bench_times_nothing_where_parity_fails(wrong_backend):
    status, out, _ = run("bench", "--quick", "--batch", 1, "--json")
    found = json.loads(out)
    assert status == 1
    assert not found["parity"]["passed"]
    assert found["speed"] is None


def test_export_refuses_a_checkpoint_with_other_classes(tmp_path):
    """Its heads would be left out, and the file have random ones."""
    torch.save({"model": rcvit_xs(num_classes=10).state_dict()}, tmp_path / "ten.pth")
    arguments = ("--checkpoint", tmp_path / "ten.pth", "--onnx", tmp_path / "xs.onnx")
    status, _, err = run("export", *arguments)
    assert status == 2
    assert "--classes" in err.splitlines()[-1]
    assert "10 classes" in err.splitlines()[-1]
    assert not (tmp_path / "xs.onnx").exists()


def test_export_writes_and_does_not_overwrite(tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "xs.onnx"
    argv = ("export", "--onnx", path, "--input-size", 64, "--json")
    status, out, err = run(*argv)
    assert status == 0, err
    assert json.loads(out)["files"][0]["path"] == str(path)
    onnx.checker.check_model(str(path))
    assert {p.key: p.value for p in onnx.load(path).metadata_props}["model"] == "rcvit_xs"
    written = path.read_bytes()
    assert "--overwrite" in refused(*argv)
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def exported(monkeypatch):
    """What `to_onnx` is given: writing takes a while, and tests/test_export_dense.py does it."""
    given = []

    def written(model, path, **options):
        given.append((model, options["input_size"]))
        return export.ExportReport(path, "onnx", 5, 1e-7, 1e-8, ())

    monkeypatch.setattr(export, "to_onnx", written)
    return given


@pytest.mark.parametrize("head", ["backbone", "retinanet", "mask_rcnn", "semantic_fpn"])
def test_export_of_dense_models(tmp_path, exported, head):
    """With the weights of a checkpoint, and what a file can hold of them."""
    from casvit_kernels import models

    if head == "backbone":
        source = models.rcvit_xs(fork_feat=True)
    else:
        pytest.importorskip("torchvision")
        from casvit_kernels.models import heads

        source = getattr(heads, head)("rcvit_xs", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "dense.pth")
    classes = () if head == "backbone" else ("--classes", 7)
    status, out, err = run(
        "export", "--head", head, *classes, "--checkpoint", tmp_path / "dense.pth",
        "--onnx", tmp_path / "m.onnx", "--input-size", "96x160", "--json",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["head"] == head
    ((model, size),) = exported
    assert size == (96, 160)
    assert not model.training
    wanted = source.backbone if head in ("retinanet", "mask_rcnn") else source
    expected = wanted.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[key]) for key, t in model.state_dict().items())


def test_export_refuses_a_segmenter_with_other_classes(tmp_path, exported):
    pytest.importorskip("torchvision")
    from casvit_kernels.models import heads

    torch.save(heads.semantic_fpn("rcvit_xs", num_classes=7).state_dict(), tmp_path / "seven.pth")
    status, _, err = run(
        "export", "--head", "semantic_fpn", "--checkpoint", tmp_path / "seven.pth",
        "--onnx", tmp_path / "m.onnx",
    )  # fmt: skip
    assert status == 2
    assert "--classes" in err.splitlines()[-1]
    assert not exported


def test_the_first_file_is_reported_where_the_second_fails(tmp_path, monkeypatch):
    def written(model, path, **options):
        return export.ExportReport(path, "onnx", 5, 1e-7, 1e-8, ())

    def failing(model, path, **options):
        raise export.ExportError("the second one fails")

    monkeypatch.setattr(export, "to_onnx", written)
    monkeypatch.setattr(export, "to_coreml", failing)
    first, second = tmp_path / "xs.onnx", tmp_path / "xs.mlpackage"
    status, _, err = run("export", "--onnx", first, "--coreml", second)
    assert status == 1
    assert f"{first} (onnx" in err
    assert "the second one fails" in err.splitlines()[-1]


def test_export_without_its_packages_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, _, err = run("export", "--onnx", tmp_path / "xs.onnx")
    assert status == 2
    assert "casvit-kernels[export]" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_ctrl_c_leaves_nothing(tmp_path):
    status, out, err = interrupted(
        "demo", "--output", tmp_path / "report.html", after="speed", TMPDIR=str(tmp_path)
    )
    assert status == 130
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.rglob("*") if "report" in p.name] == []


def printed_to(stdout):
    """Exit status and stderr of a verb that prints its result there."""
    done = subprocess.run(
        [sys.executable, "-m", "casvit_kernels", "info", "--json"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def test_a_reader_that_has_read_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    assert printed_to(writer) == (0, "")
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_result_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        status, said = printed_to(full)
    assert status == 2
    assert said == "casvit-kernels info: error: stdout: No space left on device\n"


def test_errors_of_our_own_are_not_passed_off_as_wrong_input(monkeypatch, tmp_path):
    def broken(self):
        raise BackendUnavailable("a bug")

    monkeypatch.setattr(demo.Demo, "run", broken)
    with pytest.raises(BackendUnavailable, match="a bug"):
        main(["demo", "--output", str(tmp_path / "r.html")])


needs_cuda = pytest.mark.skipif(
    cuda.build() is None, reason="built without CUDA kernels ('make cuda')"
)


@needs_cuda
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_plan_says_how_maps_are_cut(arch):
    argv = ("plan", "--dim", 220, "--size", 7, "--batch", 256, "--arch", arch)
    status, out, _ = run(*argv, "--json")
    document = json.loads(out)
    assert status == 0
    assert document["shape"] == [256, 220, 7, 7]
    assert [k["kernel"] for k in document["kernels"]] == [
        "gates",
        "statistics",
        "combine",
        "single_pass",
        "backward_combine",
        "backward_gate",
        "backward_depthwise",
    ]
    for kernel in document["kernels"]:
        assert kernel["shared_bytes"] <= document["device"]["shared_per_block"]
        assert kernel["images"] * kernel["blocks"] >= 256
        text = run(*argv)[1]
        assert kernel["kernel"] in text
        assert f"{kernel['blocks']:,}" in text


@needs_cuda
def test_plan_says_which_kernels_refuse():
    status, out, _ = run("plan", "--dim", 48, "--size", 4, "--width", 2000, "--batch", 2)
    assert status == 0
    assert "backward_combine: none, a block of maps this wide" in out.replace("\n", " ")
    assert "single_pass: none, the shared memory of a cluster" in out.replace("\n", " ")
    assert "none, it is Triton's" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--dim", 0, "--size", 7), "argument --dim: expected an integer of at least 1, got '0'"),
        (("--dim", 48, "--size", 7, "--arch", "sm_70"), "argument --arch"),
        (("--size", 7), "--dim"),
    ],
)
def test_plan_of_bad_input(argv, said):
    status, out, err = run("plan", *argv)
    assert (status, out) == (2, "")
    assert said in err
