"""The training example: the recipe, resuming bit for bit, and what it says when something is wrong."""

import contextlib
import csv
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import casvit_kernels
from casvit_kernels import models

pytestmark = pytest.mark.long  # each test starts processes that train

for package in ("timm", "torchvision", "tqdm", "sklearn", "PIL"):
    pytest.importorskip(package)

ROOT = Path(casvit_kernels.__file__).parents[1]
EXAMPLES = ROOT / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not installed with the package", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import digits_as_images  # noqa: E402
import train_classification  # noqa: E402
from recipe import checkpoint, data, processes  # noqa: E402
from same import assert_same  # noqa: E402

DIGITS = digits_as_images.OPTIONS
SMALL = ["--layers", "1,1,1,1", "--dims", "16,24,32,48"]
TINY = [*DIGITS, "--layers", "1,1,1,1", "--dims", "8,8,8,8", "--lr", 0.5, "--workers", 0]
# 60 digits, 10 steps an epoch of 8 or 4 digits in two sizes.
SHORT = [
    *TINY,
    "--batch-size",
    8,
    "--sizes",
    "32,48",
    "--epochs",
    2,
    "--log-every",
    1,
    "--ema",
    0.9,
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    digits_as_images.write(root)
    return root


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    root = tmp_path_factory.mktemp("few")
    digits_as_images.write(root, limit=80)
    return root


@pytest.fixture
def few_copy(few, tmp_path):
    return Path(shutil.copytree(few, tmp_path / "images"))


@pytest.fixture(scope="module")
def done(few, tmp_path_factory):
    """The output of a `SHORT` run to its end, not to be written to."""
    output = tmp_path_factory.mktemp("done")
    train(few, output, *SHORT)
    return output


def run(*arguments):
    """Exit status, stdout and stderr of a run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = train_classification.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def train(images, output, *arguments):
    status, out, err = run(images, "--output", output, *arguments)
    assert status == 0, err
    return out


def command(*arguments, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return [*map(str, [*launcher, EXAMPLES / "train_classification.py", *arguments])]


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def start(*arguments, processes=1, **options):
    return launch(command(*arguments, processes=processes), environment(), **options)


def launch(command, env, **options):
    return subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def rows(path, without=("images_per_second",)):
    with path.open() as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def save_and_stop(self, logs, save=train_classification.Run.save):
    """In place of `Run.save`: the run ends after each checkpoint."""
    save(self, logs)
    raise train_classification.Stopped


def saved(output):
    return checkpoint.read(output / "last.pt")


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_same_run(one, other):
    """Same checkpoint to the last bit, same logs."""
    first, second = saved(one), saved(other)
    # The file lengths differ by the digits of the speeds in the log.
    for content in first, second:
        del content["options"]["output"], content["options"]["resume"], content["logs"]
        del content["options"]["workers"], content["options"]["save_every"]
    assert_same(first, second)
    for name in "train.csv", "val.csv":
        assert rows(one / name) == rows(other / name)


# Training


def test_digits_on_two_processes_fused_and_reference(digits, tmp_path):
    final = {}
    for mixer in "fused", "reference":
        process = start(
            *(digits, "--output", tmp_path / mixer, "--mixer", mixer, *DIGITS, *SMALL),
            *("--epochs", 6, "--batch-size", 32, "--lr", 0.12, "--ema", 0.95, "--workers", 0),
            processes=2,
        )
        _, err = process.communicate()
        assert process.returncode == 0, err
        final[mixer] = rows(tmp_path / mixer / "val.csv")[-1]
    for kind in "top1", "ema_top1":
        fused, reference = (float(final[mixer][kind]) for mixer in final)
        assert min(fused, reference) >= 95, final
        assert abs(fused - reference) <= 1, final


def test_losses_of_fused_and_reference_agree_within_rounding(tmp_path):
    digits_as_images.write(tmp_path / "digits", limit=600)
    losses = []
    for mixer in "fused", "reference":
        train(
            *(tmp_path / "digits", tmp_path / mixer, "--mixer", mixer, *DIGITS, *SMALL),
            *("--epochs", 4, "--batch-size", 32, "--lr", 0.024, "--log-every", 1, "--workers", 0),
        )
        losses.append([float(row["loss"]) for row in rows(tmp_path / mixer / "train.csv")][:50])
    assert len(losses[0]) == len(losses[1]) == 50
    # Training amplifies the last bits of a float32. The reference alone, in another memory layout and
    # so with other rounding, moved by 5e-7 in these steps (2.5e-5 at another learning rate); a mixer
    # that is wrong by one percent moves them by 5e-5.
    assert losses[0] == pytest.approx(losses[1], rel=3e-5)
    assert losses[1][-1] < 0.9 * losses[1][0]


def test_schedule_and_weight_decay_are_the_recipe_s(done):
    train_rows, state = rows(done / "train.csv"), saved(done)
    rates = [float(row["lr"]) for row in train_rows]
    # --lr 0.5 is for a total batch of 2048; here it is 8. A fifteenth of two epochs warms up.
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) == pytest.approx(0.5 * 8 / 2048, rel=0.05)
    assert sorted(rates[1:], reverse=True) == rates[1:]
    assert rates[-1] < max(rates) / 50
    decays = {
        group["weight_decay"]: len(group["params"]) for group in state["optimizer"]["param_groups"]
    }
    names = dict(
        models.RCViT(models.Config((1,) * 4, (8,) * 4), 10, distillation=False).named_parameters()
    )
    plain = [name for name, value in names.items() if value.ndim == 1 or name.endswith("bias")]
    assert decays == {0.0: len(plain), 0.05: len(names) - len(plain)}


def test_accumulated_batches_weigh_as_one(few):
    batch = torch.randn(8, 3, 32, 32), torch.arange(8)
    parameters = []
    for times in 1, 2:
        options = train_classification.parse(
            [str(a) for a in (few, "--output", "unused", *SHORT, "--drop-path", 0)]
        )
        train_classification.check(options)
        here = processes.Processes(0, 1, torch.device("cpu"))
        state = train_classification.Run(options, here, data.Folder(few / "train"))
        state.optimizer.param_groups[0]["lr"] = state.optimizer.param_groups[1]["lr"] = 1e-3
        state.wrapped.train()
        state.update([batch] * times)
        parameters.append(list(state.model.parameters()))
    # Halves add up exactly.
    for one, two in zip(*parameters, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("strength", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1"])
def test_augmentation_of_the_recipe(strength, few, tmp_path):
    # The second always asks for what the first asks for now and then: the strongest of all.
    arguments = [*SHORT, "--hflip", 0.5, "--crop-scale", 0.08, 1, "--auto-augment", strength]
    train(few, tmp_path, *arguments)
    assert len(rows(tmp_path / "train.csv")) == 20


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(amp, few, done, tmp_path):
    train(few, tmp_path, *SHORT, "--amp", amp, "--epochs", 1, "--warmup-epochs", 0.1333333333333333)
    first = float(rows(tmp_path / "train.csv")[0]["loss"])
    exact = float(rows(done / "train.csv")[0]["loss"])
    assert first != exact
    assert first == pytest.approx(exact, rel=2e-2)
    assert bool(saved(tmp_path)["scaler"]) == (amp == "fp16")


def test_plan_gives_all_processes_one_size_and_different_images():
    plans = [data.Plan(1000, [160, 224, 320], 224, 16, 2, rank, 2, seed=3) for rank in range(2)]
    assert plans[0].batches == {160: 31, 224: 16, 320: 8}
    for epoch in range(3):
        for plan in plans:
            plan.epoch = epoch
        batches = [list(plan) for plan in plans]
        assert len(batches[0]) == len(batches[1]) == 2 * plans[0].steps
        for step in range(plans[0].steps):
            keys = [b for mine in batches for b in mine[2 * step : 2 * step + 2]]
            sizes = {key.size for batch in keys for key in batch}
            assert len(sizes) == 1
            assert {len(batch) for batch in keys} == {plans[0].batches[sizes.pop()]}
        images = [key.image for mine in batches for batch in mine for key in batch]
        assert len(set(images)) == min(len(images), 1000)  # none again before all were seen
        assert 700 < len(images) < 1300
        plans[0].start = 3
        assert list(plans[0]) == batches[0][6:]
        plans[0].start = 0
    plans[0].epoch = 0
    assert list(plans[0]) != batches[0]


# Weights in, weights out


def test_eval_only_prints_the_accuracy_of_the_log(few, done):
    last = rows(done / "val.csv")[-1]
    for ema, name in ([], "top1"), (["--use-ema"], "ema_top1"):
        status, out, err = run(few, *TINY, "--eval-only", "--finetune", done / "last.pt", *ema)
        assert status == 0, err
        assert out == (
            f"top-1 {float(last[name]):.2f} %, top-5 {float(last[name.replace('1', '5')]):.2f} % "
            "of 20 images\n"
        )


def test_finetune_keeps_the_backbone_and_takes_another_number_of_classes(few_copy, done, tmp_path):
    for part in "train", "val":
        shutil.rmtree(few_copy / part / "9")
    with pytest.warns(UserWarning, match="the checkpoint has 10 classes, the model 9"):
        train(
            few_copy, tmp_path / "run", *SHORT, "--finetune", done / "best.pt",
            *("--lr", 0, "--warmup-lr", 0, "--min-lr", 0, "--epochs", 1),
        )  # fmt: skip
    before, after = checkpoint.read(done / "best.pt")["model"], saved(tmp_path / "run")["model"]
    assert after["head.weight"].shape == (9, 8)
    parameters = dict(
        models.RCViT(models.Config((1,) * 4, (8,) * 4), 10, distillation=False).named_parameters()
    )
    for name in parameters:
        if not name.startswith("head."):
            assert torch.equal(before[name], after[name]), name


def test_checkpoints_load_into_a_model_outside_the_script(done):
    for file in "last.pt", "best.pt":
        for use_ema in False, True:
            model = models.RCViT(models.Config((1,) * 4, (8,) * 4), 10, distillation=False)
            models.load_checkpoint(model, done / file, use_ema=use_ema)


def test_tensorboard_shows_what_the_csv_holds(few, done, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [a for a in SHORT if a != "--no-tensorboard"]
    train(few, tmp_path, *arguments, "--epochs", 1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, value in ("train", "loss"), ("val", "ema_top1"):
        logged = events.Scalars(f"{name}/{value}")
        expected = rows(tmp_path / f"{name}.csv")
        assert [event.step for event in logged] == [int(row["step"]) for row in expected]
        values = [float(row[value]) for row in expected]
        assert [event.value for event in logged] == pytest.approx(values, rel=1e-6)  # float32


# Interruptions


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_killed_ten_times_ends_as_if_uninterrupted(few, tmp_path):
    # One run loads images in its own process, the other in a worker: that must not matter.
    arguments = [few, *SHORT, "--epochs", 9, "--save-every", 2]
    whole = start(*arguments, "--output", tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()

    output = tmp_path / "killed"
    arguments += ["--output", output, "--resume", "auto", "--workers", 1]
    moments = random.Random(7)
    for _ in range(10):
        process = start(*arguments)
        length = size(output / "train.csv")
        grown = moments.randint(1, 8) * 30  # bytes; a row has about 60
        # Counted from what is there once the log is cut back to the checkpoint.
        while process.poll() is None and size(output / "train.csv") < length + grown:
            length = min(length, size(output / "train.csv"))
            time.sleep(0.001)
        time.sleep(moments.random() * 0.1)
        assert process.poll() is None, process.stderr.read()
        process.kill()
        process.communicate()
    last = start(*arguments)
    assert last.wait() == 0, last.stderr.read()
    assert_same_run(tmp_path / "whole", output)


# Kills the run between its fork of a worker and the worker's first look at its parent.
KILLED_AT_FORK = """
import os, signal
from recipe import data
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGKILL))
next(iter(data.loader([(0, 0)], workers=1, pin=False)))
"""
# Fails in its second step.
FAILING = """
import sys
import train_classification
update, steps = train_classification.Run.update, []
def fail(self, parts):
    steps.append(parts)
    if len(steps) == 2:
        raise RuntimeError("a step failed")
    return update(self, parts)
train_classification.Run.update = fail
sys.exit(train_classification.main(sys.argv[1:]))
"""


def ended(code, *arguments):
    """Exit status and stderr of a Python program, once nothing writes to its stderr any more."""
    path = os.pathsep.join([str(EXAMPLES), environment()["PYTHONPATH"]])
    process = launch(
        [sys.executable, "-c", code, *map(str, arguments)],
        {**environment(), "PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        _, err = process.communicate(timeout=120)  # for ever if a worker stays
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, err


@pytest.mark.skipif(
    multiprocessing.get_all_start_methods()[0] != "fork", reason="workers are not forked here"
)
def test_workers_end_with_a_killed_run():
    status, err = ended(KILLED_AT_FORK)
    assert status == -signal.SIGKILL, err


@pytest.mark.skipif(os.name == "nt", reason="there are no process groups")
def test_workers_end_with_a_run_that_fails(few, tmp_path):
    status, err = ended(FAILING, few, *SHORT, "--output", tmp_path, "--workers", 1)
    assert status == 1
    assert err.rstrip().endswith("RuntimeError: a step failed"), err


def test_stopped_after_every_step_ends_as_if_uninterrupted(few, done, tmp_path):
    arguments = [few, "--output", tmp_path, *SHORT, "--save-every", 1, "--resume", "auto"]
    starts = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_classification.Run, "save", save_and_stop)
        while run(*arguments)[0] == 130:
            starts += 1
    assert starts == 22  # 20 steps, and the ends of two epochs
    assert_same_run(done, tmp_path)


def size(path):
    return path.stat().st_size if path.exists() else 0


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_asked_to_stop_it_saves_and_ends(number, processes, few, tmp_path):
    process = start(
        *(few, *SHORT, "--epochs", 300, "--output", tmp_path, "--save-every", 0, "--workers", 1),
        processes=processes,
        start_new_session=True,
    )
    while process.poll() is None and size(tmp_path / "train.csv") < 200:
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal does: to every process
    _, err = process.communicate()
    step = int(rows(tmp_path / "train.csv")[-1]["step"])
    assert f"train_classification: stopped at step {step}, saved" in err
    assert saved(tmp_path)["step"] == step
    if processes == 1:
        assert process.returncode == 130
        assert len(err.splitlines()) == 1, err


def test_finished_run_has_nothing_left_to_do(few, done):
    before = contents(done)
    assert "all 2 epochs are done already" in train(few, done, *SHORT, "--resume", "auto")
    assert contents(done) == before


def test_worker_processes_do_not_change_the_run(few, done, tmp_path):
    train(few, tmp_path, *SHORT, "--workers", 2)
    assert_same_run(done, tmp_path)


def test_best_weights_outlive_an_interruption(few, tmp_path, monkeypatch):
    arguments = [few, "--output", tmp_path, *SHORT, "--resume", "auto"]
    monkeypatch.setattr(train_classification, "evaluate", lambda *_: (90.0, 99.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_classification.Run, "save", save_and_stop)
        assert run(*arguments)[0] == 130  # after the first epoch
    best = (tmp_path / "best.pt").read_bytes()
    monkeypatch.setattr(train_classification, "evaluate", lambda *_: (80.0, 99.0))
    assert run(*arguments)[0] == 0
    assert (tmp_path / "best.pt").read_bytes() == best
    assert checkpoint.read(tmp_path / "best.pt")["top1"] == saved(tmp_path)["best"] == 90


# What is wrong, in words


def refused(*arguments):
    """The one line that a run ends with."""
    status, _, err = run(*arguments)
    assert status == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("train_classification: ")
    return err


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:  # not between the records, where nothing is saved
        record = max(archive.infolist(), key=lambda info: info.file_size)
        value = archive.read(record)
    content[content.index(value) + len(value) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def empty(file):
    file.write_bytes(b"")


def foreign(file):
    torch.save({"model": {"weight": torch.ones(1)}, "epoch": 3}, file)


def harmful(file):
    torch.save({"model": Path("a class, which could run code")}, file)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_byte, "damaged"),
        (cut, "damaged"),
        (empty, "damaged"),
        (harmful, "damaged or something else"),
        (foreign, "--finetune"),
        (Path.unlink, "No such file"),
    ],
)
def test_bad_checkpoint(damage, said, few, done, tmp_path):
    output = Path(shutil.copytree(done, tmp_path / "run"))
    damage(output / "last.pt")
    before = contents(output)
    err = refused(few, "--output", output, *SHORT, "--resume", output / "last.pt")
    assert "last.pt: expected a checkpoint of this script" in err
    assert said in err
    assert contents(output) == before


def test_resume_with_other_settings_is_refused(few, done):
    before = contents(done)
    err = refused(few, "--output", done, *SHORT, "--resume", "auto", "--seed", 5, "--ema", 0.8)
    assert "--seed: 0, now 5" in err
    assert "--ema: 0.9, now 0.8" in err
    assert contents(done) == before


def test_a_run_is_not_written_over(few, done, tmp_path):
    before = contents(done)
    assert "holds a run" in refused(few, "--output", done, *SHORT)
    other = shutil.copy(done / "last.pt", tmp_path)
    assert "holds a run" in refused(few, "--output", done, *SHORT, "--resume", other)
    assert contents(done) == before


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "val"])
def test_unreadable_image(part, workers, few_copy, tmp_path):
    bad = sorted((few_copy / part / "3").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:60])
    output = tmp_path / "run"
    arguments = [few_copy, "--output", output, *SHORT, "--workers", workers, "--save-every", 1]
    err = refused(*arguments)
    assert f"{bad}: expected an image, got" in err
    # What was saved before is there, whole; with the image mended the run goes on.
    if (output / "last.pt").exists():
        assert saved(output)["step"] == int(rows(output / "train.csv")[-1]["step"])
    shutil.copy(sorted((few_copy / part / "3").iterdir())[1], bad)
    train(*arguments[:1], *arguments[2:], "--resume", "auto")


def remove_val(root):
    shutil.rmtree(root / "val")
    return "val: expected a folder of classes, got no such directory"


def empty_class(root):
    for file in (root / "train" / "4").iterdir():
        file.unlink()
    return f"{root / 'train' / '4'}: expected images in every class folder, got none"


def no_classes(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    return "train: expected a folder per class, got none"


def missing_class(root):
    shutil.rmtree(root / "val" / "7")
    return f"val: expected the classes of {root / 'train'}, got none for 7"


def extra_class(root):
    (root / "val" / "7").rename(root / "val" / "seven")
    shutil.copytree(root / "val" / "seven", root / "val" / "7")
    return f"train: expected the classes of {root / 'val'}, got none for seven"


@pytest.mark.parametrize("harm", [remove_val, empty_class, no_classes, missing_class, extra_class])
def test_bad_folders(harm, few_copy, tmp_path):
    said = harm(few_copy)
    assert said in refused(few_copy, "--output", tmp_path / "run", *SHORT)
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written_to(few, tmp_path):
    (tmp_path / "file").write_text("")
    for output in tmp_path / "file", tmp_path / "file" / "run":
        err = refused(few, "--output", output, *SHORT)
        assert f"--output: expected a directory that can be written to, got {output}" in err
    (tmp_path / "run" / "train.csv").mkdir(parents=True)
    assert "train.csv: cannot be written" in refused(few, "--output", tmp_path / "run", *SHORT)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("full", ["last.pt", "train.csv"])
def test_full_disk_keeps_what_was_saved(full, few, tmp_path):
    import resource

    arguments = [few, "--output", tmp_path, *SHORT, "--save-every", 3, "--resume", "auto"]
    arguments += ["--epochs", 1, "--warmup-epochs", 0.1]
    limit = 20_000 if full == "last.pt" else 100

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_classification.Run, "save", save_and_stop)
        assert run(*arguments)[0] == 130
    before = (tmp_path / "last.pt").read_bytes()
    process = start(
        *arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert len(err.splitlines()) == 1, err
    assert f"{full}: cannot " in err
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not (tmp_path / "last.pt.tmp").exists()
    assert run(*arguments)[0] == 0
    assert [int(row["step"]) for row in rows(tmp_path / "train.csv")] == list(range(1, 11))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cuda"], "finds no GPU"),
        (["--warmup-epochs", "2"], "--warmup-epochs: expected fewer than --epochs 2, got 2"),
        (["--eval-only"], "--eval-only: expected the weights as --finetune FILE"),
        (["--use-ema"], "--use-ema: expected --finetune FILE"),
        (["--finetune", "missing.pt"], "--finetune: "),
        (["--auto-augment", "much"], "--auto-augment: expected timm's notation"),
        (["--lr", "1e30", "--warmup-lr", "1e30"], "expected a finite loss, got nan"),
    ],
)
def test_wrong_usage(arguments, said, few, tmp_path):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert said in refused(few, "--output", tmp_path / "run", *SHORT, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dims", "8,8"], "argument --dims: expected four integers N,N,N,N, got '8,8'"),
        (["--sizes", "32,0"], "argument --sizes: expected an integer >= 1, got '0'"),
        (["--smoothing", "2"], "argument --smoothing: expected a number in [0, 0.99], got '2'"),
        (["--lr", "fast"], "argument --lr: expected a number >= 0, got 'fast'"),
    ],
)
def test_wrong_options_name_the_argument(arguments, said, few, tmp_path):
    status, _, err = run(few, "--output", tmp_path, *SHORT, *arguments)
    assert status == 2
    assert said in err


def test_weights_of_another_number_of_classes_are_not_evaluated(few_copy, done):
    shutil.rmtree(few_copy / "val" / "9")
    with pytest.warns(UserWarning, match="left out head"):
        err = refused(few_copy, *TINY, "--eval-only", "--finetune", done / "best.pt")
    assert "the checkpoint has 10 classes, the model 9" in err


@pytest.mark.parametrize("package", ["timm", "tensorboard"])
def test_missing_package_names_the_extra(package, few, tmp_path, monkeypatch):
    for name in [*sys.modules]:
        if name.split(".")[0] == package or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = [a for a in SHORT if a != "--no-tensorboard"]
    err = refused(few, "--output", tmp_path, *arguments)
    assert re.search(
        rf"{package}\S* is needed and not installed: pip install 'casvit-kernels\[train\]'", err
    )
