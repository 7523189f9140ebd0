"""The dense training scripts: runs that resume bit for bit, evaluation, and what they say when wrong."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import casvit_kernels

for package in ("torchvision", "pycocotools", "torchmetrics", "sklearn", "PIL", "tqdm"):
    pytest.importorskip(package)

ROOT = Path(casvit_kernels.__file__).parents[1]
EXAMPLES = ROOT / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not installed with the package", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import dense_data  # noqa: E402
import train_detection  # noqa: E402
import train_segmentation  # noqa: E402
from recipe import checkpoint, training  # noqa: E402
from same import assert_same  # noqa: E402

SCRIPTS: dict[str, Any] = {"detection": train_detection, "segmentation": train_segmentation}
BOTH = pytest.mark.parametrize("kind", list(SCRIPTS))
TINY = [
    *("--data", "digits", "--layers", "1,1,1,1", "--dims", "8,8,8,8", "--channels", 8),
    *("--scenes", 12, "--val-scenes", 3, "--batch-size", 3, "--workers", 0, "--no-tensorboard"),
    *("--log-every", 1, "--device", "cpu", "--warmup-steps", 2),
]
MORE = {
    "detection": ["--epochs", 2, "--fc-channels", 8],  # 8 steps, evaluated every 4
    "segmentation": ["--steps", 8, "--eval-every", 4, "--pyramid-channels", 8],
}


def run(kind: str, *arguments: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = SCRIPTS[kind].main([str(a) for a in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def train(kind: str, output: Path, *arguments: Any) -> str:
    status, out, err = run(kind, *TINY, *MORE[kind], "--output", output, *arguments)
    assert status == 0, err
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [
            {k: v for k, v in row.items() if k != "images_per_second"}
            for row in csv.DictReader(file)
        ]


def saved(kind: str, output: Path, name: str = "last.pt") -> dict[str, Any]:
    return checkpoint.read(output / name, f"casvit_kernels train_{kind} 1")


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Runs


@pytest.fixture(scope="module", params=list(SCRIPTS))
def done(request: Any, tmp_path_factory: Any) -> tuple[str, Path]:
    """A script and the output of a run of it to its end, not to be written to."""
    output = tmp_path_factory.mktemp(request.param)
    train(request.param, output, "--visualize", 2)
    return request.param, output


def test_a_run_leaves_logs_checkpoints_and_pictures(done: tuple[str, Path]) -> None:
    kind, output = done
    steps = rows(output / "train.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, 9))
    assert all(float(row["loss"]) > 0 for row in steps)
    assert float(steps[0]["lr"]) < float(steps[2]["lr"])
    judged = rows(output / "val.csv")
    assert [int(row["step"]) for row in judged] == [4, 8]
    first = "ap" if kind == "detection" else "miou"
    best = max(float(row[first]) for row in judged)
    assert saved(kind, output, "best.pt")[first] == best
    page = (output / "pictures.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not list(output.glob("*.tmp"))


@pytest.mark.parametrize("stop_at", [3, 4, 6])
def test_a_run_goes_on_to_the_last_bit(
    done: tuple[str, Path], stop_at: int, tmp_path: Path
) -> None:
    kind, output = done
    original = training.Run.update

    def update(self: Any, batch: Any) -> Any:
        if self.step == stop_at:
            raise KeyboardInterrupt
        return original(self, batch)

    training.Run.update = update  # type: ignore[method-assign]
    every = ["--save-every", 1]
    try:
        arguments = [*TINY, *MORE[kind], "--output", tmp_path, *every]
        status, _, err = run(kind, *arguments)
        assert status == 130, err
    finally:
        training.Run.update = original  # type: ignore[method-assign]
    assert saved(kind, tmp_path)["step"] == stop_at
    train(kind, tmp_path, "--resume", "auto", *every)
    one, other = saved(kind, output), saved(kind, tmp_path)
    for content in one, other:
        for name in "output", "resume", "save_every", "visualize":
            del content["options"][name]
        del content["logs"]
    assert_same(one, other)
    for name in "train.csv", "val.csv":
        assert rows(output / name) == rows(tmp_path / name)


def test_a_finished_run_says_so(done: tuple[str, Path]) -> None:
    kind, output = done
    before = contents(output)
    assert "all 8 steps are done already" in train(kind, output, "--resume", "auto")
    assert contents(output) == before


def test_evaluation_alone_gives_the_metrics_of_the_run(
    done: tuple[str, Path], tmp_path: Path
) -> None:
    kind, output = done
    status, out, err = run(
        *(kind, *TINY, *MORE[kind], "--eval-only", "--finetune", output / "last.pt"),
        *("--visualize", 1, "--output", tmp_path),
    )
    assert status == 0, err
    metrics = rows(output / "val.csv")[-1]
    for name, value in metrics.items():
        assert name == "step" or f"{name} {float(value):.2f} %" in out
    assert (tmp_path / "pictures.html").read_text().count("<figure>") == 2


@BOTH
def test_weights_and_backbones_are_started_from(kind: str, tmp_path: Path) -> None:
    train(kind, tmp_path / "first")
    weights = torch.load(tmp_path / "first" / "last.pt", weights_only=True)["model"]
    body = {k.removeprefix("backbone.body."): v for k, v in weights.items() if ".body." in k}
    torch.save({"model": body}, tmp_path / "body.pth")
    for option, path in (
        ("--finetune", tmp_path / "first" / "last.pt"),
        ("--backbone", tmp_path / "body.pth"),
    ):
        output = tmp_path / option.strip("-")
        steps = ["--steps", 8] if kind == "segmentation" else []
        # A learning rate of nothing: what is saved is what was started from.
        train(kind, output, option, path, "--lr", 0, "--norms", "frozen", *steps)
        found = saved(kind, output)["model"]
        for key, tensor in weights.items():
            if ".body." in key and "running" not in key and "batches" not in key:
                assert torch.equal(found[key], tensor), key
        same = torch.equal(
            found["backbone.fpn.inner_blocks.0.0.weight"],
            weights["backbone.fpn.inner_blocks.0.0.weight"],
        )
        assert same == (option == "--finetune")


def test_masks_train_too(tmp_path: Path) -> None:
    train("detection", tmp_path, "--head", "mask_rcnn", "--epochs", 1, "--visualize", 1)
    assert set(rows(tmp_path / "val.csv")[0]) > {"ap50", "mask_ap50"}


def test_folders_train_as_digits_do(tmp_path: Path) -> None:
    folders = ["--workers", 1]
    coco = dense_data.coco(tmp_path / "coco")
    small = ["--short-side", 96, "--long-side", 128, "--lr", 1e-4]
    for head in "retinanet", "mask_rcnn":
        out = train(
            "detection",
            tmp_path / head,
            *("--data", coco, "--epochs", 1, "--head", head, *small, *folders),
        )
        assert "1 images without objects are left out" in out
    ade = dense_data.ade20k(tmp_path / "ade")
    train(
        "segmentation",
        tmp_path / "semantic",
        *("--data", ade, "--classes", 11, "--crop", 64, "--scale", 96, 96, "--steps", 2),
    )
    assert len(rows(tmp_path / "semantic" / "val.csv")) == 1


@BOTH
def test_tensorboard_gets_what_the_csv_holds(kind: str, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = [a for a in [*TINY, *MORE[kind]] if a != "--no-tensorboard"]
    status, _, err = run(kind, *arguments, "--output", tmp_path)
    assert status == 0, err
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    name = "ap50" if kind == "detection" else "miou"
    for file, column in (("train", "loss"), ("val", name)):
        written = [(int(r["step"]), float(r[column])) for r in rows(tmp_path / f"{file}.csv")]
        shown = [(e.step, e.value) for e in board.Scalars(f"{file}/{column}")]
        assert [step for step, _ in shown] == [step for step, _ in written]
        assert [v for _, v in shown] == pytest.approx([v for _, v in written], rel=1e-5)


def test_autocast_trains(tmp_path: Path) -> None:
    for kind in SCRIPTS:
        train(kind, tmp_path / kind, "--amp", "bf16")


# What is wrong


def test_another_head_and_another_script_are_refused(
    done: tuple[str, Path], tmp_path: Path
) -> None:
    kind, output = done
    other = "segmentation" if kind == "detection" else "detection"
    status, _, err = run(
        *(other, *TINY, *MORE[other], "--eval-only", "--finetune", output / "last.pt")
    )
    assert status == 2
    assert "--finetune: " in err
    assert "got those of a" in err
    status, _, err = run(
        *(other, *TINY, *MORE[other], "--output", tmp_path, "--resume", output / "last.pt")
    )
    assert status == 2
    assert f"got another checkpoint (format 'casvit_kernels train_{kind} 1')" in err
    assert not contents(tmp_path)


def test_a_changed_setting_is_another_run(done: tuple[str, Path]) -> None:
    kind, output = done
    before = contents(output)
    arguments = [*TINY, *MORE[kind], "--output", output, "--resume", "auto"]
    for option, value in (("--seed", 3), ("--lr", 1), ("--channels", 16), ("--scenes", 11)):
        status, _, err = run(kind, *arguments, option, value)
        assert status == 2
        assert "--resume: " in err
        assert f"{option}: " in err
    status, _, err = run(kind, *TINY, *MORE[kind], "--output", output)
    assert status == 2
    assert "holds a run: continue it with --resume auto" in err
    assert contents(output) == before


@pytest.mark.parametrize(
    ("kind", "break_it", "message"),
    [
        (
            "segmentation",
            lambda root: dense_data.save(
                root / "annotations" / "training" / "0001.png", torch.full((96, 80), 40).byte()
            ),
            r"expected label ids of the 11 classes (1 to 11) or 255, got 40",
        ),
        (
            "segmentation",
            lambda root: (root / "images" / "validation" / "0000.png").write_bytes(b"no image"),
            "0000.png: expected an image, got: ",
        ),
        (
            "detection",
            lambda root: dense_data.change(
                root, lambda c: c["annotations"][0].update(bbox=[90, 10, 30, 20])
            ),
            "expected a box inside its image of 96x96",
        ),
        (
            "detection",
            lambda root: (root / "train2017" / "0001.png").unlink(),
            "0001.png: expected an image, got: ",
        ),
    ],
)
def test_wrong_data_ends_a_run_in_words_and_keeps_what_was_saved(
    kind: str, break_it: Any, message: str, tmp_path: Path
) -> None:
    if kind == "detection":
        root, more = dense_data.coco(tmp_path / "data"), ["--epochs", 4]
        more += ["--short-side", 96, "--long-side", 96, "--decay-epochs", 9]
    else:
        root, more = dense_data.ade20k(tmp_path / "data"), ["--steps", 4, "--eval-every", 2]
        more += ["--classes", 11, "--crop", 64, "--scale", 96, 96]
    output = tmp_path / "run"
    arguments = [*TINY, *MORE[kind], *more, "--data", root, "--output", output]
    assert run(kind, *arguments)[0] == 0
    before = contents(output)
    break_it(root)
    longer = ["--epochs", 8] if kind == "detection" else ["--steps", 8]
    # A run of its own beside it, and the old one's checkpoint where it was.
    status, _, err = run(kind, *arguments, *longer, "--output", tmp_path / "next")
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert contents(output) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval-only"], "--eval-only: expected the weights as --finetune FILE"),
        (["--use-ema"], "--use-ema: expected --finetune FILE"),
        ([], "--output: expected a directory to write to, got none"),
        (["--batch-size", "0"], "expected an integer >= 1, got '0'"),
        (["--finetune", "none.pth", "--output", "x"], "--finetune: "),
        (["--backbone", "none.pth", "--output", "x"], "--backbone: "),
    ],
)
@BOTH
def test_wrong_options_are_named(
    kind: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run(kind, *TINY, *MORE[kind], *arguments)
    assert status == 2
    assert message in err


# Processes


def start(kind: str, *arguments: Any, processes: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [*launcher, str(EXAMPLES / f"train_{kind}.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
@BOTH
def test_a_killed_run_goes_on(kind: str, done: tuple[str, Path], tmp_path: Path) -> None:
    if done[0] != kind:
        pytest.skip("the other script's run")
    arguments = [*TINY, *MORE[kind], "--output", tmp_path, "--save-every", 1, "--resume", "auto"]
    process = start(kind, *arguments)
    while process.poll() is None and not (tmp_path / "last.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = saved(kind, tmp_path)["step"]
    assert 1 <= before < 8
    process = start(kind, *arguments)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert rows(done[1] / "train.csv") == rows(tmp_path / "train.csv")


@pytest.mark.long
@BOTH
def test_two_processes_evaluate_as_one(kind: str, tmp_path: Path) -> None:
    process = start(kind, *TINY, *MORE[kind], "--output", tmp_path, processes=2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    status, out, err = run(
        kind, *TINY, *MORE[kind], "--eval-only", "--finetune", tmp_path / "last.pt"
    )
    assert status == 0, err
    for name, value in rows(tmp_path / "val.csv")[-1].items():
        assert name == "step" or f"{name} {float(value):.2f} %" in out
