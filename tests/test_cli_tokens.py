"""The verb `tokens`: what it refuses, and that its page and its figures are those of expedite."""

import base64
import html
import io
import json
import re
import sys
import time

import pytest
import torch
from test_cli import refused, run
from torch import nn

from casvit_kernels import photographs
from casvit_kernels.demo.tokens import network, pictures
from casvit_kernels.demo.tokens import run as job
from casvit_kernels.tokens import cluster_tokens, expedite

timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")

MODEL = "vit_tiny_patch16_224"
SIZE, MAP, GRID, AT, UNTIL = 128, (8, 8), (4, 3), 2, 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One photograph: two colours and noise."""
    path = tmp_path_factory.mktemp("photographs")
    pixels = torch.randint(0, 40, (96, 120, 3), generator=torch.Generator().manual_seed(1))
    pixels[:50, 30:] += 150
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path / "a<b.png")
    return path


@pytest.fixture(scope="module")
def drawn(folder, tmp_path_factory):
    """One run: its JSON and its page."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    argv = ["tokens", "--images", folder, "--model", MODEL, "--size", SIZE, "--at", AT, "--json"]
    status, out, err = run(*argv, "--until", UNTIL, "--grid", "4x3", "--output", path)
    assert status == 0, err
    assert list(path.parent.iterdir()) == [path]
    return json.loads(out), path.read_text(encoding="utf-8")


def vit():
    """The same model, made by hand."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=0).eval()
    model.set_input_size(img_size=(SIZE, SIZE))
    return model


def images(page):
    """What each <img> of the page shows, by its alternative text."""
    found = {}
    for alt, data in re.findall(r'alt="([^"]*)" src="data:image/png;base64,([^"]+)"', page):
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        size = (picture.height, picture.width, 3)
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        found[html.unescape(alt)] = pixels.view(size)
    return found


def test_figures_are_those_of_expedite(drawn):
    document, page = drawn
    report = expedite(vit(), AT, GRID, UNTIL)
    found = document["expedited"]
    for name in ("at", "until", "prefix", "depth", "tokens_before", "tokens_after"):
        assert found[name] == getattr(report, name), name
    assert tuple(found["map"]) == report.size == MAP
    assert (found["macs_before"], found["macs_after"]) == (report.macs_before, report.macs_after)
    assert found["text"] == str(report)
    assert html.escape(str(report)) in page


def test_borders_stand_where_labels_differ(drawn, folder):
    _, page = drawn
    pictures_of = images(page)
    shown = pictures_of["a<b: cluster borders"]
    photograph = photographs.load(folder, side=SIZE)
    x = photograph.batch(None, (0.5,) * 3, (0.5,) * 3)  # of this model's training
    model, seen = vit(), []
    model.blocks[AT - 1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(x)
    labels = cluster_tokens(seen[0][:, 1:], MAP, GRID).labels()[0].view(MAP).tolist()
    line, lines = torch.tensor(pictures.LINE, dtype=torch.uint8), 0
    for row in range(SIZE):
        for column in range(SIZE):
            own = labels[row // 16][column // 16]
            near = [(row + 1, column), (row, column + 1)]
            near = [labels[r // 16][c // 16] for r, c in near if r < SIZE and c < SIZE]
            border = any(other != own for other in near)
            lines += border
            expected = line if border else photograph.pixels[0, row, column]
            assert torch.equal(shown[row, column], expected), (row, column)
    assert lines > SIZE  # not one cluster alone


def test_both_feature_maps_are_on_the_page(drawn, folder):
    document, page = drawn
    x = photographs.load(folder, side=SIZE).batch(None, (0.5,) * 3, (0.5,) * 3)
    plain, expedited = vit(), vit()
    expedite(expedited, AT, GRID, UNTIL)
    with torch.no_grad():
        before, after = (m.forward_features(x)[0, 1:] for m in (plain, expedited))
    shown = images(page)
    expected = pictures.colours(before.unflatten(0, MAP), after.unflatten(0, MAP))
    for name, colours in zip(("before", "after"), expected, strict=True):
        # One step of 255 for the rounding of another run.
        assert (shown[f"a<b: feature map {name}"].int() - colours.int()).abs().max() <= 1
    assert not torch.equal(*expected)
    similarity = torch.cosine_similarity(before, after, -1).mean().item()
    assert document["photographs"][0]["similarity"] == pytest.approx(similarity, abs=1e-5)


def test_page_holds_everything(drawn):
    document, page = drawn
    (embedded,) = re.findall(r'<script type="application/json" id="results">(.*?)</script>', page)
    assert json.loads(embedded) == document
    assert "a<b" not in re.sub(r"<script.*", "", page, flags=re.S)
    assert set(re.findall(r'(?:src|href)="(\w+)', page)) == {"data"}
    assert "weights are random" in page


def test_ratio_is_that_of_the_medians(drawn):
    speed = drawn[0]["speed"]
    assert speed["ratio"] == speed["plain"]["seconds"] / speed["expedited"]["seconds"]
    assert speed["threads"] == torch.get_num_threads()

    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            return x

    found = job.measure(Slow(), nn.Identity(), torch.zeros(1))
    assert found.ratio > 2
    assert found.plain.seconds >= 0.05


def test_text_says_threads_and_weights(folder, tmp_path):
    argv = ["tokens", "--images", folder, "--model", MODEL, "--size", 64]
    status, out, _ = run(*argv, "--threads", 1, "--output", tmp_path / "p.html")
    out = " ".join(out.split())
    assert status == 0
    assert "1 thread, random weights" in out
    assert "blocks[5] to blocks[11] of 12 blocks run on 3 x 3 centres" in out  # 10 of 24, 28 of 40
    assert f"Page: {tmp_path / 'p.html'}" in out


def test_equal_features_have_equal_colours():
    torch.manual_seed(0)
    before = torch.randn(4, 5, 16)
    after = before.clone()
    after[2:] = torch.randn(2, 5, 16)
    one, other = pictures.colours(before, after)
    assert torch.equal(one[:2], other[:2])
    assert (one[2:] != other[2:]).any(-1).all()
    assert len(one.view(-1, 3).unique(dim=0)) == 20
    shifted = pictures.colours(before + 3, after + 3)
    assert all(torch.equal(a, b) for a, b in zip(shifted, (one, other), strict=True))


def test_maps_of_one_value_and_of_few_channels():
    flat = torch.ones(2, 2, 2)
    one, other = pictures.colours(flat, flat)
    assert torch.equal(one, other)
    assert one.shape == (2, 2, 3)


def test_checkpoint_is_loaded_without_its_classifier(tmp_path):
    torch.manual_seed(5)
    trained = timm.create_model(MODEL, num_classes=7)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "seven.pth")
    built = network.build(MODEL, 64, tmp_path / "seven.pth", 0)
    assert torch.equal(built.model.blocks[3].mlp.fc1.weight, trained.blocks[3].mlp.fc1.weight)
    assert built.model(torch.zeros(1, 3, 64, 64)).shape == (1, 192)


def test_checkpoint_that_cannot_be_used(tmp_path):
    path, page = tmp_path / "weights.pth", tmp_path / "page.html"
    argv = ("tokens", "--model", MODEL, "--checkpoint", path, "--output", page)
    assert "expected a checkpoint file" in refused(*argv)
    state = timm.create_model(MODEL).state_dict()
    lost = state.pop("blocks.4.norm1.weight")
    torch.save(state, path)
    assert "lacks 'blocks.4.norm1.weight'" in refused(*argv)
    torch.save({**state, "blocks.4.norm1.weight": lost, "extra.weight": lost}, path)
    assert "has 'extra.weight'" in refused(*argv)
    torch.save({**state, "blocks.4.norm1.weight": torch.zeros(3)}, path)
    assert f"expected weights of {MODEL}" in refused(*argv)
    path.write_bytes(b"nothing of the kind")
    assert f"expected weights of {MODEL}" in refused(*argv)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "vit_tiny_patch16_244"], "near: vit_tiny_patch16_224"),
        (["--model", "hf-hub:somebody/model"], "expected the name of a timm model"),
        (["--model", "swin_tiny_patch4_window7_224"], "windows of fixed size"),
        (["--model", "resnet18"], "expedite does not serve resnet18"),
        (["--size", "225"], "--size: expected a multiple of the patch size, 16, got 225"),
        (["--size", "0"], "--size"),
        (["--grid", "15x14"], "--grid: expected at most the map's 14x14 tokens at 224 pixels"),
        (["--size", "64", "--grid", "5x4"], "--grid: expected at most the map's 4x4 tokens"),
        (["--grid", "14"], "--grid: expected HxW"),
        (["--grid", "0x14"], "--grid: expected HxW"),
        (["--at", "12"], "--at, --until: expected 1 <= at < until <= 12"),
        (["--at", "5", "--until", "5"], "got 5 and 5"),
        (["--until", "13"], "got 5 and 13"),
        (["--threads", "0"], "--threads"),
        (["--images", "/nowhere"], "--images"),
    ],
)
def test_bad_input(argv, said, tmp_path, folder):
    given = {"--model": MODEL, "--images": folder, "--output": tmp_path / "page.html"}
    given.update(zip(argv[::2], argv[1::2], strict=True))
    assert said in refused("tokens", *(word for pair in given.items() for word in pair))
    assert list(tmp_path.iterdir()) == []


def test_output_is_judged_first(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "build", lambda *_: pytest.fail("work began"))
    assert "--output" in refused("tokens", "--output", tmp_path / "missing" / "page.html")
    assert "directory" in refused("tokens", "--output", tmp_path)


def test_missing_timm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'casvit-kernels[timm]'" in refused("tokens")
