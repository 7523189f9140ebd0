"""The serving example, as a process: what it writes, what it skips, what it refuses, and Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import casvit_kernels
from casvit_kernels import models

for package in ("tqdm", "PIL", "numpy"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402

ROOT = Path(casvit_kernels.__file__).parents[1]
SCRIPT = ROOT / "examples" / "serve.py"
if not SCRIPT.is_file():
    pytest.skip("the examples are not installed with the package", allow_module_level=True)
SIZE = 64


def command(*arguments):
    return [
        sys.executable,
        str(SCRIPT),
        *map(str, arguments),
        "--size",
        str(SIZE),
        "--threads",
        "1",
    ]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def serve(*arguments):
    return subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True)


def pictures(folder, count=5):
    """Noise of several sizes, two of them in a folder below."""
    (folder / "below").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for n in range(count):
        shape = (70 + 10 * n, 90, 3)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        where = folder / "below" if n < 2 else folder
        Image.fromarray(pixels.numpy()).save(where / f"{n}.png")
    return folder


@pytest.fixture
def images(tmp_path):
    return pictures(tmp_path / "images")


@pytest.fixture
def checkpoint(tmp_path):
    """Of seven classes, with statistics unlike the initial ones."""
    torch.manual_seed(0)
    model = models.rcvit_xs(num_classes=7)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.0)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth", model.eval()


def expected(model, path):
    """The probabilities by the plain model in float64, of the image prepared by hand."""
    side = round(SIZE / 0.875)
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    first = (side - SIZE) // 2
    image = image.crop((first, first, first + SIZE, first + SIZE))
    x = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, SIZE, SIZE, 3)
    x = x.permute(0, 3, 1, 2).double() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        return model.double()(x)[0].softmax(0)


def test_five_classes_of_each_image_and_a_broken_one_is_skipped(images, checkpoint, tmp_path):
    path, model = checkpoint
    (images / "broken.jpg").write_bytes(b"GIF, as it were")
    (images / "notes.txt").write_text("no image")
    output = tmp_path / "found.json"
    done = serve(images, "--checkpoint", path, "--classes", 7, "--batch", 2, "--output", output)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["complete"]
    assert [f["file"] for f in found["failed"]] == ["broken.jpg"]
    assert "skipped broken.jpg" in done.stderr
    assert "5 images" in done.stdout
    assert found["images_per_second"] > 0
    names = ["2.png", "3.png", "4.png", "below/0.png", "below/1.png"]
    assert [image["file"] for image in found["images"]] == names
    for image in found["images"]:
        truth = expected(model, images / image["file"])
        top = image["top5"]
        assert [t["class"] for t in top] == truth.topk(5).indices.tolist()
        for t in top:
            assert t["probability"] == pytest.approx(truth[t["class"]].item(), abs=1e-4)
    assert [p.name for p in tmp_path.iterdir() if ".part" in p.name] == []


def test_help_says_what_it_does():
    done = serve("--help")
    assert done.returncode == 0
    for word in ("IMAGES", "--checkpoint", "--precision", "--batch", "--threads", "Ctrl-C", "130"):
        assert word in done.stdout, word


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["EMPTY"], "IMAGES: expected at least one image"),
        (["/nowhere"], "IMAGES: expected a directory with images, got /nowhere"),
        (["IMAGES", "--checkpoint", "/nowhere.pth"], "--checkpoint: expected a checkpoint file"),
        (["IMAGES", "--checkpoint", "WEIGHTS"], "--classes: expected the checkpoint's number"),
        (["IMAGES", "--output", "/nowhere/found.json"], "--output: "),
        (["IMAGES", "--batch", "0"], "--batch: expected an integer >= 1, got '0'"),
    ],
    ids=["empty", "no directory", "no checkpoint", "classes", "output", "batch"],
)
def test_wrong_input_gets_one_line(
    images, checkpoint, tmp_path, capsys, monkeypatch, arguments, said
):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "IMAGES": images, "WEIGHTS": checkpoint[0]}
    output = tmp_path / "found.json"
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import serve as example

    argv = ["--output", str(output), *(str(places.get(a, a)) for a in arguments)]
    try:
        status = example.main(argv)
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not output.exists()


def test_ctrl_c_keeps_what_is_done(images, tmp_path):
    count = 500
    for n in range(5, count):
        os.link(images / "2.png", images / f"{n}.png")
    output = tmp_path / "found.json"
    process = subprocess.Popen(
        command(images, "--batch", 1, "--output", output),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A parent that runs in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = ""
    while not re.search(rf"[1-9]\d*/{count}", seen):  # the first images are through
        letter = process.stderr.read(1)
        assert letter, seen
        seen += letter
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert "left when stopped" in out
    assert "Traceback" not in err
    found = json.loads(output.read_text())
    assert not found["complete"]
    assert 0 < len(found["images"]) < count
    assert all(len(image["top5"]) == 5 for image in found["images"])
