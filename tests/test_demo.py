"""The main job: its inputs, its parts, and that the report says what was measured."""

import contextlib
import copy
import html
import io
import json
import math
import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from test_cli import refused, run
from torch import nn

from casvit_kernels import _files, benchmark, models, photographs
from casvit_kernels.ops.mixer.dispatch import ReferenceKernels

for package in ("matplotlib", "numpy", "PIL", "skimage", "sklearn", "tqdm"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402

from casvit_kernels.demo import check, gates, network, plots, speed  # noqa: E402
from casvit_kernels.demo import training as train  # noqa: E402


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run: its JSON and its report."""
    path = tmp_path_factory.mktemp("demo") / "report.html"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        from casvit_kernels.__main__ import main

        assert main(["demo", "--quick", "--json", "--output", str(path)]) == 0
    return json.loads(out.getvalue()), path.read_text(encoding="utf-8")


def image(path, size=(40, 30), colour=(200, 100, 50)):
    Image.new("RGB", size, colour).save(path)
    return path


# Input


def test_report_path_is_judged_first(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "load", lambda *_: pytest.fail("work began"))
    assert "--output" in refused("demo", "--output", tmp_path / "missing" / "r.html")
    assert "directory" in refused("demo", "--output", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and /dev")
@pytest.mark.parametrize("path", ["/proc/report.html", "/dev/null"])
def test_report_where_no_file_can_be_written(path):
    assert "--output" in refused("demo", "--output", path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write it")
def test_report_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    assert "--output" in refused("demo", "--output", tmp_path / "r.html")


def test_images_that_cannot_be_used(tmp_path):
    assert "--images" in refused("demo", "--images", tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("no image")
    assert "at least one image" in refused("demo", "--images", tmp_path)
    whole = image(tmp_path / "a.jpg", (300, 300)).read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    assert "broken.jpg" in refused("demo", "--images", tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"GIF, as it were")
    assert "broken.jpg" in refused("demo", "--images", tmp_path)


def test_checkpoint_that_cannot_be_used(tmp_path):
    path = tmp_path / "weights.pth"
    assert "weights.pth" in refused("demo", "--checkpoint", path)
    torch.save(models.rcvit_s().state_dict(), path)
    assert "rcvit_s" in refused("demo", "--checkpoint", path)
    path.write_bytes(path.read_bytes()[:1000])
    assert "weights.pth" in refused("demo", "--checkpoint", path)


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused("demo")
    assert "matplotlib" in line
    assert "casvit-kernels[demo]" in line


def test_own_photographs(tmp_path):
    image(tmp_path / "b.png", (500, 300), (0, 0, 0))
    image(tmp_path / "a.JPG", (300, 500), (255, 255, 255))
    (tmp_path / "notes.txt").write_text("no image")
    found = photographs.load(tmp_path)
    assert found.names == ("a", "b")
    x = found.batch(5)
    assert x.shape == (5, 3, 224, 224)
    assert torch.equal(x[0], x[2])
    for c in range(3):
        black, white = (
            -photographs.MEAN[c] / photographs.STD[c],
            (1 - photographs.MEAN[c]) / photographs.STD[c],
        )
        assert x[1, c].unique().item() == pytest.approx(black, rel=1e-5)
        assert x[0, c].mean().item() == pytest.approx(white, rel=1e-2)


def test_photographs_stand_upright(tmp_path):
    picture = Image.new("RGB", (60, 60))
    picture.paste((255, 0, 0), (0, 0, 60, 20))  # red on top
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    picture.save(tmp_path / "a.png", exif=exif)
    pixels = photographs.load(tmp_path).pixels[0]
    assert pixels[5, 112, 0] == 0
    assert pixels[-5, 112, 0] == 255


def test_large_directory_is_cut_and_said(tmp_path):
    names = [f"{i:03}" for i in range(photographs.MOST + 3)]
    for name in random.Random(0).sample(names, len(names)):
        image(tmp_path / f"{name}.png", (8, 8))
    found = photographs.load(tmp_path)
    assert list(found.names) == names[: photographs.MOST]
    assert found.found == photographs.MOST + 3


def test_shipped_photographs():
    found = photographs.load(None)
    assert len(found.names) == 8
    assert "china" in found.names
    assert found.pixels.float().std() > 30


# Parts


def small():
    torch.manual_seed(0)
    config = models.Config((1, 1, 2, 1), (8, 12, 16, 20))
    return models.RCViT(config, num_classes=5).eval()


def test_calibration_takes_the_statistics_of_the_images():
    model, x = small(), torch.randn(8, 3, 128, 128) * 3 + 1
    network.calibrate(model, x)
    assert not model.training
    seen = {}
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.clone()}))
        assert norm.momentum == 0.1
    with torch.no_grad():
        model(x)
    for out in seen.values():
        assert out.mean((0, 2, 3)).abs().max() < 0.02


def test_gates_are_what_the_network_multiplies_with():
    model, x = small(), torch.randn(2, 3, 64, 64)
    network.calibrate(model, x)
    found = gates.of_stages(model, network.mixer_inputs(model, x))
    assert [g.mixer for g in found] == [
        "network.0.0.attn",
        "network.2.0.attn",
        "network.4.1.attn",
        "network.6.0.attn",
    ]
    seen = {}
    for g in found:
        mixer = model.get_submodule(g.mixer)
        for kind in ("q", "k"):
            sigmoid = getattr(mixer, f"oper_{kind}")[0].block[-1]
            sigmoid.register_forward_hook(
                lambda m, a, out, key=(g.mixer, kind): seen.update({key: out[:, 0]})
            )
    with torch.no_grad():
        model(x)
    for g in found:
        assert torch.equal(g.q, seen[g.mixer, "q"])
        assert torch.equal(g.k, seen[g.mixer, "k"])


def test_channel_gates_follow_the_spatial_ones():
    mixer, x = small().get_submodule("network.2.0.attn").eval(), torch.randn(2, 12, 9, 7)
    with torch.no_grad():
        maps, vectors = gates.spatial_gates(mixer, x), gates.channel_gates(mixer, x)
        q, k, _ = mixer.qkv(x).chunk(3, dim=1)
        for z, operation, over, across in zip(
            (q, k), (mixer.oper_q, mixer.oper_k), maps, vectors, strict=True
        ):
            assert across.shape == (2, 12)
            gated = z * over[:, None] * across[:, :, None, None]
            torch.testing.assert_close(gated, operation(z))


@pytest.mark.parametrize("name", ["network.0.0.attn.dwc.bias", "network.6.0.attn.qkv.weight"])
def test_check_finds_a_wrong_weight(name):
    model, x = small(), torch.randn(2, 3, 64, 64)
    network.calibrate(model, x)
    for head in model.get_classifier():  # logits that show no mixer's error
        nn.init.zeros_(head.weight)
    inputs = network.mixer_inputs(model, x)
    other = copy.deepcopy(model)
    assert check.check(model, other, x, inputs, lambda: None).passed
    with torch.no_grad():
        other.get_parameter(name).mul_(1.001)
    found = check.check(model, other, x, inputs, lambda: None)
    assert not found.passed
    assert [d.name for d in found.layers if not d.passed] == [name[: len("network.0.0.attn")]]


def test_check_finds_not_a_number():
    truth = torch.randn(3, 4, dtype=torch.float64)
    assert not check.deviation("x", truth, truth.float(), truth.float() * math.nan).passed


@pytest.mark.long
def test_training_is_the_same_fused_and_repeats():
    first = train.train_both(3, True, lambda: None)
    assert len(first.fused.losses) == train.QUICK_STEPS
    assert first.fused.losses == pytest.approx(first.reference.losses, rel=1e-4)
    assert first.fused.losses[-1] < first.fused.losses[0] - 0.3
    assert first.same_predictions >= first.test_images - 2
    again = train.train_both(3, True, lambda: None)
    assert again.reference.losses == first.reference.losses
    assert again.fused.losses == first.fused.losses
    assert train.train_both(4, True, lambda: None).reference.losses != first.reference.losses


def test_what_cannot_be_built_is_reported_with_its_reason(monkeypatch):
    def unavailable():
        raise benchmark.Unavailable("no compiler here")

    right = benchmark.mixer_candidates

    def candidates(mixer, x, *, include):
        return {**right(mixer, x, include=include), "compile": unavailable}

    monkeypatch.setattr(benchmark, "mixer_candidates", candidates)
    model, x = small(), torch.randn(1, 3, 32, 32)
    found = speed.measure(model, x, network.mixer_inputs(model, x), True, [1])
    assert speed.Absent("compile", "no compiler here") in found.absent
    assert "compile" not in [latency.name for latency in found.stages[0].latencies]


def test_written_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    _files.write_text(path, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_heat_map_shows_the_gate():
    grey = torch.full((224, 224, 3), 128, dtype=torch.uint8)
    gate = torch.zeros(2, 2)
    gate[0, 0] = 1.0
    data = plots.heat_map(grey, gate, 0.0, 1.0).split(",")[1]
    import base64

    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("L")
    width, height = picture.size
    assert picture.getpixel((5, 5)) > picture.getpixel((width - 5, height - 5)) + 50


# The whole


def test_parity_failure_stops_before_timing(monkeypatch, tmp_path):
    right = ReferenceKernels.project_and_mix
    monkeypatch.setattr(ReferenceKernels, "project_and_mix", lambda *a: right(*a) * 1.001)
    monkeypatch.setenv("CASVIT_KERNELS_BACKEND", "reference")
    monkeypatch.setattr(benchmark, "interleave", lambda *_, **__: pytest.fail("timed"))
    status, out, _ = run("demo", "--quick", "--json", "--output", tmp_path / "r.html")
    found = json.loads(out)
    assert status == 1
    assert not found["parity"]["passed"]
    assert found["speed"] is None
    assert list(tmp_path.iterdir()) == []


def test_json_of_a_quick_run(quick):
    found, _ = quick
    assert found["command"] == "demo"
    assert found["model"]["checkpoint"] is None
    assert found["parity"]["passed"]
    assert len(found["parity"]["layers"]) == found["model"]["mixers"] == 10
    assert found["parity"]["same_top1"] == found["parity"]["images"] == 8
    names = {"eager", "eager channels_last", "fused", "fused channels_last"}
    names |= {benchmark.NETWORK} if benchmark.precisions() else set()
    assert {latency["name"] for latency in found["speed"]["model"]} == names
    for latency in found["speed"]["mixers"]:
        total = sum(
            stage["count"] * row["seconds"]
            for stage in found["speed"]["stages"]
            for row in stage["latencies"]
            if row["name"] == latency["name"]
        )
        assert latency["seconds"] == pytest.approx(total)
    assert all(0 < low < high < 1 for g in found["gates"] for low, high in (g["q"], g["k"]))


def test_report_embeds_the_json(quick):
    found, page = quick
    embedded = re.search(r'<script type="application/json" id="results">(.*?)</script>', page, re.S)
    assert json.loads(embedded[1]) == found


def test_report_stands_alone(quick):
    _, page = quick
    for section in ("parity", "speed", "training", "gates", "environment"):
        assert f'<section id="{section}">' in page
    sources = re.findall(r'(?:src|href|action|data)="([^"]*)"', page)
    sources += re.findall(r"url\(([^)]*)\)", page)
    assert len(sources) > 8 * 9
    assert all(s.startswith(("data:image/", "#")) for s in sources)
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<svg") == 3
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", page)  # every colour became the page's own


def rows(page, section):
    """The cells of every table row of a section, as text."""
    part = page[page.index(f'<section id="{section}">') :]
    part = part[: part.index("</section>")]
    return [
        [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<td.*?</td>", row)]
        for row in re.findall(r"<tr.*?</tr>", part, re.S)
    ]


def test_report_shows_the_numbers_of_the_json(quick):
    found, page = quick
    shown = {row[0]: row for row in rows(page, "parity") if row}
    for d in (*found["parity"]["layers"], found["parity"]["logits"]):
        row = shown[d["name"]]
        assert float(row[3]) == pytest.approx(d["reference_error"], rel=1e-2)
        assert float(row[4]) == pytest.approx(d["fused_error"], rel=1e-2)
        assert float(row[5]) == pytest.approx(d["ratio"], abs=0.006)

    def ms(cell):
        return float(cell.removesuffix(" ms")) / 1e3

    speed_rows = [row for row in rows(page, "speed") if row]
    model, stages = found["speed"]["model"], found["speed"]["stages"]
    assert len(speed_rows) == len(model) + len(found["speed"]["mixers"])
    for latency, row in zip(model, speed_rows, strict=False):
        assert row[0] == latency["name"]
        assert ms(row[1]) == pytest.approx(latency["seconds"], rel=6e-3)
        assert float(row[3].removesuffix("x")) == pytest.approx(latency["speedup"], abs=0.006)
    for i, row in enumerate(speed_rows[len(model) :]):
        total = found["speed"]["mixers"][i]
        assert row[0] == total["name"]
        expected = [stage["latencies"][i]["seconds"] for stage in stages] + [total["seconds"]]
        assert [ms(cell) for cell in row[1:]] == pytest.approx(expected, rel=6e-3)
    shown = {row[0]: row for row in rows(page, "training") if row}
    for name in ("reference", "fused"):
        result = found["training"][name]
        assert float(shown[name][1]) == pytest.approx(result["losses"][-1], abs=6e-5)
        assert float(shown[name][2].removesuffix(" %")) == pytest.approx(
            100 * result["accuracy"], abs=0.06
        )
        assert ms(shown[name][3]) == pytest.approx(result["step_seconds"], rel=6e-3)
    assert found["version"] in page
    assert found["environment"]["torch"] in page


def test_report_says_that_weights_are_untrained(quick):
    assert "The weights are untrained" in quick[1]


@pytest.mark.long
def test_trained_weights_and_own_photographs(tmp_path):
    torch.save({"model": models.rcvit_xs().state_dict()}, tmp_path / "xs.pth")
    (tmp_path / "photos").mkdir()
    image(tmp_path / "photos" / "<one>.png", (64, 64))
    status, out, err = run(
        "demo", "--quick", "--no-train",
        "--checkpoint", tmp_path / "xs.pth",
        "--images", tmp_path / "photos",
        "--output", tmp_path / "r.html",
    )  # fmt: skip
    assert status == 0, err
    assert "untrained" not in out
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "untrained" not in page
    assert '<section id="training">' not in page
    assert "<one>" not in page
    assert "&lt;one&gt;" in page


@pytest.mark.long
def test_a_disk_that_is_full_in_the_end_is_said_in_one_line(tmp_path, monkeypatch):
    """After minutes of work: the report was writable when they began."""

    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(benchmark, "environment", dict)
    monkeypatch.setattr(Path, "write_text", full)
    path = tmp_path / "r.html"
    status, out, err = run("demo", "--quick", "--no-train", "--output", path)
    assert status == 2
    assert out == ""
    said = f"casvit-kernels demo: error: --output: {path} was not written: No space left on device"
    assert err.splitlines()[-1] == said
    assert list(tmp_path.iterdir()) == []
