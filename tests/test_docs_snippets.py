"""What the documentation shows: its code runs, its commands are understood, its links lead somewhere.

A page's ```python blocks run in one namespace from top to bottom, in an empty folder, as a reader would
run them. What a page leaves to its reader (a trained model, images, a file) is in GIVENS, and nothing
else. Commands are parsed by the program's own parser and then not run.
"""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from pages import PROGRAMS, Page
from torch import nn

import casvit_kernels
from casvit_kernels import BackendUnavailable, fuse, models
from casvit_kernels.backends.triton import TritonBackend

ROOT = Path(casvit_kernels.__file__).parents[1]
DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("the documentation is not installed with the package", allow_module_level=True)
PAGES = {
    path.relative_to(ROOT).as_posix(): Page(path)
    for path in (
        *(path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / name / "README.md" for name in ("bench", "bench/results", "csrc")),
        ROOT / "tests" / "cuda_emulation" / "README.md",
    )
}
WITH_CODE = [name for name, page in PAGES.items() if page.code("python")]


# What a page leaves to its reader


def _model(classes=10):
    """Trained in the reader's world; here with the channels of xs, and statistics of some images."""
    torch.manual_seed(0)
    config = models.Config((1, 1, 1, 1), models.CONFIGS["rcvit_xs"].dims)
    model = models.RCViT(config, num_classes=classes, distillation=False).train()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(8, 3, 64, 64))
        model.head.weight *= 20  # answers that differ between images
    return model.eval()


def _training():
    loader = [(torch.randn(4, 3, 64, 64), torch.randint(10, (4,)))]
    return {"model": _model(), "loader": loader, "criterion": nn.CrossEntropyLoss()}


def _checkpoint():
    torch.save({"model": models.rcvit_xs(num_classes=1000).state_dict()}, "rcvit_xs.pth")
    return {}


def _dense():
    from casvit_kernels.models.heads import retinanet

    _checkpoint()
    torch.save(retinanet("rcvit_xs", num_classes=80).state_dict(), "retinanet_rcvit_xs.pth")
    return {
        "image": torch.rand(3, 96, 128),
        "boxes": torch.tensor([[10.0, 20.0, 70.0, 90.0]]),
        "labels": torch.tensor([3]),
        "images": torch.randn(2, 3, 96, 128),
    }


def _export():
    from casvit_kernels.models.heads import retinanet, semantic_fpn

    config = models.Config((1, 1, 1, 1), (8, 12, 16, 20))
    return {
        "model": _model(),
        "detector": retinanet(config, num_classes=3, channels=16).eval(),
        "segmenter": semantic_fpn(config, 3, channels=16, pyramid_channels=16).eval(),
    }


def _coreml():
    names = [f"class {number}" for number in range(10)]
    return {"model": _model(), "names": names, "x": torch.randn(1, 3, 224, 224)}


def _fused():
    model = _model()
    fuse(model)
    return {"model": model}


GIVENS = {
    "README.md": lambda: {"model": models.rcvit_xs()},
    "docs/coreml.md": _coreml,
    "docs/dense_prediction.md": _dense,
    "docs/export.md": _export,
    "docs/gpus.md": _fused,
    "docs/models.md": _checkpoint,
    "docs/training.md": _training,
}
PACKAGES = {  # without them a page's blocks cannot run
    "docs/coreml.md": ("coremltools",),
    "docs/dense_prediction.md": ("torchvision",),
    "docs/export.md": ("onnx", "onnxscript", "onnxruntime", "coremltools", "torchvision"),
    "docs/tokens.md": ("timm", "transformers"),
}

# Blocks, named by words in them, that only the long tests run: they compile, export or are large.
LONG = {
    "docs/coreml.md": ("to_coreml(", "Program("),
    "docs/dense_prediction.md": ("retinanet(", "load_dense_checkpoint("),
    "docs/export.md": ("to_onnx(", "fold_for_inference("),
    "docs/gpus.md": ('target="sm_90"',),
    "docs/serving.md": ("torch.compile(", "torch.export."),
    "docs/tokens.md": ("timm.create_model(", "transformers."),
}
# Blocks that are not run, with the reason.
NOT_RUN = {
    ("docs/coreml.md", "MLComputePlan"): "asks a device of Apple's: needs macOS",
}
# Blocks that end in an error here, which is why; what stands before it counts.
REFUSED = {}
if not torch.cuda.is_available():
    REFUSED["docs/gpus.md", "precompile(channels, **options)"] = BackendUnavailable
if TritonBackend().why_not_compile(here=False) is not None:
    REFUSED["docs/gpus.md", 'target="sm_90"'] = BackendUnavailable


# What is so afterwards, beside that nothing was raised


def _readme(names, said, long):
    assert names["out"].shape == (8, 48, 56, 56)
    torch.testing.assert_close(names["plain"], names["out"], atol=1e-4, rtol=1e-3)
    assert len(names["report"].swapped) == 10
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(names["network"](x), names["model"](x), atol=1e-4, rtol=1e-3)


def _start(names, said, long):
    assert "torch.Size([8, 48, 56, 56])" in said
    assert len(names["report"].swapped) == 10
    assert names["logits"].shape == (2, 1000)


def _trained(names, said, long):
    assert len(names["report"].swapped) == 4
    assert not names["report"].refused
    assert names["losses"][0] > 0.1


def _serving(names, said, long):
    assert names["logits"].shape == (1, 1000)
    assert len(names["answers"]) == 4
    assert "Memory(packed=" in said
    assert "act" in said.splitlines()[-1]  # the layer that differs
    if long:
        x, network = torch.rand(2, 3, 224, 224), names["network"]
        with torch.inference_mode():
            assert torch.equal(names["likeliest"](x), network(x).topk(5).indices)
        with torch.no_grad():
            got = names["program"].module()(x[:1])
            torch.testing.assert_close(got, network(x[:1]), atol=1e-4, rtol=1e-3)


def _detected(names, said, long):
    assert all(torch.isfinite(loss) for loss in names["losses"].values())
    assert set(names["found"][0]) == {"boxes", "scores", "labels"}
    assert names["scores"].shape == (2, 150, 96, 128)


def _exported(names, said, long):
    written = {path.name for path in Path.cwd().iterdir()}
    assert {"xs.onnx", "retinanet_backbone.onnx", "semantic_fpn.onnx"} <= written
    assert "semantic_fpn.mlpackage" in written
    assert names["fast"].fold_report.folded


def _packaged(names, said, long):
    assert names["out"].shape == (1, 10)
    assert Path("app.mlpackage").is_dir()


def _clustered(names, said, long):
    assert names["out"].shape == (2, 40 * 40, 64)
    assert names["clusters"].centres.shape == (9, 8 * 8, 192)  # the last: those of windows
    if long:
        assert "20 x 20 centres" in said
        assert "26 x 26 centres" in said


def _compiled(names, said, long):
    assert names["channels"] == set(models.CONFIGS["rcvit_xs"].dims)


AFTERWARDS = {
    "README.md": _readme,
    "docs/coreml.md": _packaged,
    "docs/dense_prediction.md": _detected,
    "docs/export.md": _exported,
    "docs/gpus.md": _compiled,
    "docs/serving.md": _serving,
    "docs/start.md": _start,
    "docs/tokens.md": _clustered,
    "docs/training.md": _trained,
}


def is_long(name, block):
    return any(word in block.code for word in LONG.get(name, ()))


def marked(table, name, block):
    """What a table keyed by page and word says of a block."""
    return next(
        (v for (page, word), v in table.items() if page == name and word in block.code), None
    )


def run(name, blocks, long):
    """The blocks one after the other; then what must be so."""
    names, said = GIVENS.get(name, dict)(), io.StringIO()
    path = PAGES[name].path
    for block in blocks:
        if marked(NOT_RUN, name, block):
            continue
        # A traceback shows the line of the page.
        code = compile("\n" * block.line + block.code, str(path), "exec")
        expected = marked(REFUSED, name, block)
        with contextlib.redirect_stdout(said):
            if expected is None:
                exec(code, names)
            else:
                with pytest.raises(expected):
                    exec(code, names)
    if name in AFTERWARDS:
        AFTERWARDS[name](names, said.getvalue(), long)


@pytest.fixture
def reader(request, tmp_path, monkeypatch):
    """An empty folder, and the packages that the page is about."""
    for package in PACKAGES.get(request.param, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    return request.param


def pages_with(wanted):
    return [
        name
        for name in WITH_CODE
        if any(wanted(name, b) and not marked(NOT_RUN, name, b) for b in PAGES[name].code("python"))
    ]


@pytest.mark.filterwarnings("ignore::casvit_kernels.UnfusedWarning")
@pytest.mark.parametrize(
    "reader", pages_with(lambda name, block: not is_long(name, block)), indirect=True
)
def test_the_quick_blocks_run(reader):
    quick = [block for block in PAGES[reader].code("python") if not is_long(reader, block)]
    run(reader, quick, long=False)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::casvit_kernels.UnfusedWarning")
@pytest.mark.filterwarnings("ignore::casvit_kernels.export.UntrainedWeights")
@pytest.mark.parametrize("reader", pages_with(is_long), indirect=True)
def test_the_whole_page_runs(reader):
    run(reader, PAGES[reader].code("python"), long=True)


def test_the_tables_name_what_is_there():
    for name, word in [
        *((name, word) for name, words in LONG.items() for word in words),
        *NOT_RUN,
        *REFUSED,
    ]:
        assert any(word in block.code for block in PAGES[name].code("python")), (name, word)
    assert {*GIVENS, *PACKAGES, *AFTERWARDS} <= set(WITH_CODE)


def test_every_block_is_of_a_language_that_is_tested():
    """`text` and `bibtex` are no code, and {directives} are the site's."""
    for name, page in PAGES.items():
        for block in page.blocks:
            known = {"python", "sh", "text", "bibtex"}
            assert block.language in known or block.language.startswith("{"), (name, block.line)


# Commands


class Understood(BaseException):
    """Ends a script where its parser has read the words, before it does anything."""


def understood(monkeypatch, words):
    """Words after `python`: the program's own parser reads them."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Understood(original(self, args, namespace))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "path", list(sys.path))
        if words[0] == "-m":
            patch.setattr(sys, "argv", words[1:])
            start, target = runpy.run_module, words[1]
        else:
            target = str(ROOT / words[0])
            files = [*Path(target).glob("*.py")] or [Path(target)]
            if not any("ArgumentParser(" in file.read_text(encoding="utf-8") for file in files):
                assert words[1:] == [], f"{words[0]} takes no arguments"
                return
            patch.setattr(sys, "argv", [target, *words[1:]])
            sys.path.insert(0, str(Path(target).parent))
            start = runpy.run_path
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                start(target, run_name="__main__")
        except Understood:
            return
        except SystemExit:
            pytest.fail(said.getvalue())
        pytest.fail("it never parsed its arguments")


def check_python(monkeypatch, words):
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif (
        words[:2] == ["-m", "casvit_kernels"] and len(words) <= 3
    ):  # its name, or a verb's, in a sentence
        assert all((ROOT / "casvit_kernels" / "cli" / f"{verb}.py").is_file() for verb in words[2:])
    else:
        understood(monkeypatch, words)


def check_torchrun(monkeypatch, words):
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    understood(monkeypatch, [parsed.training_script, *parsed.training_script_args])


def check_make(monkeypatch, words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    variables = [word for word in words if "=" in word]
    for word in words:
        name, _, value = word.partition("=")
        if word not in variables:
            assert word in targets
        elif name != "ARGS":
            assert f"$({name})" in makefile
        else:
            programs = {"demo": "-m casvit_kernels demo", "parity": "-m casvit_kernels parity"}
            programs |= {"gpu": "bench/gpu"}
            (target,) = (word for word in words if word in targets)
            understood(monkeypatch, [*programs[target].split(), *shlex.split(value)])


def check_pip(monkeypatch, words):
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, build = document["project"], document["build-system"]["requires"]
    extras = project["optional-dependencies"]
    groups = (project["dependencies"], build, *extras.values())
    named = {re.match(r"[\w.-]+", text)[0] for group in groups for text in group}
    assert words.pop(0) == "install"
    for word in words:
        if word in ("--editable", "--no-build-isolation"):
            continue
        name, wanted = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?(?:>=[\d.]+)?", word).groups()
        assert name in {".", project["name"], *named}, word
        assert set((wanted or "").split(",")) <= {"", *extras}, word


def check_pytest(monkeypatch, words):
    options = (ROOT / "bench" / "conftest.py").read_text(encoding="utf-8")
    known = {"--benchmark-only", *re.findall(r'addoption\(\s*"(--[\w-]+)"', options)}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, word
    paths = [word for word in words if word.startswith(("bench/", "tests/"))]
    assert paths
    assert all(any(ROOT.glob(path.rstrip("/"))) for path in paths), paths


CHECKS = {
    "casvit-kernels": lambda patch, words: understood(patch, ["-m", "casvit_kernels", *words]),
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": check_python,
    "python3": check_python,
    "torchrun": check_torchrun,
}
# Of the environment, by commands of the pages.
VARIABLES = ("PYTHONPATH", "OUT")
COMMANDS = sorted(
    {
        " ".join(re.sub(r"\s#.*", "", line).split())
        for name, page in PAGES.items()
        for line in page.commands(inline=name != "docs/troubleshooting.md")  # parts of messages
        if name != "CHANGELOG.md"  # which tells of commands as they were
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line, monkeypatch):
    words = shlex.split(line)
    while words and re.match(r"[A-Z_]+=", words[0]):
        assert words.pop(0).partition("=")[0] in VARIABLES
    program, *words = words
    assert program in CHECKS, f"a program that no check knows, of {', '.join(CHECKS)}"
    CHECKS[program](monkeypatch, words)


def test_the_checks_of_commands_notice_what_is_wrong(monkeypatch):
    for line in (
        "python -m casvit_kernels nothing",
        "python -m casvit_kernels bench --batch none",
        "python examples/serve.py",
        "python examples/nothing.py",
        "python bench/static/saved_bytes.py --nothing",
        "torchrun --standalone examples/train_classification.py DATA --nothing",
        "make nothing",
        'make gpu ARGS="--nothing"',
        "pip install 'casvit-kernels[nothing]'",
        "pip install nothing",
        "pytest bench/nothing.py",
        "pytest bench/ --nothing",
    ):
        with pytest.raises((AssertionError, OSError, pytest.fail.Exception)):
            test_commands_are_understood(line, monkeypatch)
    assert set(CHECKS) == set(PROGRAMS)


# Links


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    for target in page.links():
        if re.match(r"(https|mailto):", target):
            continue  # the tests need no network
        path, _, anchor = target.partition("#")
        there = (page.path.parent / path).resolve() if path else page.path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in Page(there).anchors(), target


def test_every_page_is_linked():
    """From another page, or in the site's table of contents."""
    linked = set()
    for page in PAGES.values():
        targets = [target.partition("#")[0] for target in page.links()]
        for block in page.blocks:
            if block.language == "{toctree}":
                targets += re.findall(r"^(?:.*<)?([\w/-]+)(?:\.md)?>?$", block.code, re.MULTILINE)
        linked |= {(page.path.parent / t).resolve().with_suffix("") for t in targets if t}
    for page in PAGES.values():
        if page.path.parent == DOCS and page.path.name != "index.md":
            assert page.path.with_suffix("") in linked, page.path.name


def test_a_page_is_read_as_it_is_shown(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "# A `b`, [c](d.md)!\n## Same\n## Same\n[x](y.md#z) ![p](q.svg) `[no](link)` [`t`](u)\n"
        "- item\n\n  ```python\n  if x:\n      y\n  ```\n\n    python a.py && make b\n`pip install c`\n"
        "```sh\nmake \\\n  d\n\n```\n````text\n```\n[no](e)\n````\n",
        encoding="utf-8",
    )
    page = Page(path)
    assert page.anchors() == {"a-b-c", "same", "same-1"}
    assert page.links() == ["d.md", "y.md#z", "q.svg", "u"]
    assert [(b.language, b.line) for b in page.blocks] == [("python", 7), ("sh", 14), ("text", 19)]
    assert page.code("python")[0].code == "if x:\n    y\n"
    assert [" ".join(c.split()) for c in page.commands()] == [
        "make d",
        "python a.py",
        "make b",
        "pip install c",
    ]
    path.write_text("```sh\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md:1"):
        Page(path)
