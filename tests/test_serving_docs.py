"""Every block of docs/serving.md runs, and every command in it is one that there is."""

import argparse
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import casvit_kernels
from casvit_kernels import models
from casvit_kernels.cli.main import _parser

ROOT = Path(casvit_kernels.__file__).parents[1]
PAGE = ROOT / "docs" / "serving.md"
if not PAGE.is_file():
    pytest.skip("the documentation is not installed with the package", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SLOW = ("torch.compile(", "torch.export.")  # in the long tests


def lines_of(language):
    return [line for found, code in BLOCKS if found == language for line in code.splitlines()]


def ran(blocks):
    """The names after these blocks, run one after the other as a reader would."""
    names = {}
    for code in blocks:
        exec(compile(code, str(PAGE), "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore::casvit_kernels.UnfusedWarning")
def test_the_blocks_run_in_order(capsys):
    names = ran(code for code in PYTHON if not any(word in code for word in SLOW))
    assert names["logits"].shape == (1, 1000)
    assert len(names["answers"]) == 4
    said = capsys.readouterr().out
    assert "Memory(packed=" in said
    assert "act" in said.splitlines()[-1]  # the layer that differs


@pytest.mark.long
@pytest.mark.parametrize("word", SLOW)
def test_compiled_and_exported(word):
    (code,) = (code for code in PYTHON if word in code)
    names = ran([PYTHON[0], next(c for c in PYTHON if "normalize=" in c), code])
    x = torch.rand(2, 3, 224, 224)
    network = names["network"]
    if word == SLOW[0]:
        with torch.inference_mode():
            expected = network(x).topk(5).indices
            assert torch.equal(names["likeliest"](x), expected)
    else:
        with torch.no_grad():
            got = names["program"].module()(x[:1])
            torch.testing.assert_close(got, network(x[:1]), atol=1e-4, rtol=1e-3)


def test_every_block_is_of_a_language_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    assert len(PYTHON) >= 8


@pytest.mark.parametrize("line", lines_of("sh"))
def test_commands_are_understood(line, monkeypatch):
    program, *words = shlex.split(line)
    assert program == "python"
    if words[:2] == ["-m", "casvit_kernels"]:
        assert isinstance(_parser().parse_args(words[2:]), argparse.Namespace)
    else:
        script = ROOT / words[0]
        assert script.is_file()
        monkeypatch.syspath_prepend(str(script.parent))
        module = __import__(script.stem)
        try:
            assert isinstance(module.parse(words[1:]), argparse.Namespace)
        finally:
            del sys.modules[script.stem]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        page = PAGE.parent / path
        assert page.is_file(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, target


def test_the_page_is_linked():
    for page in (ROOT / "README.md", ROOT / "docs" / "export.md", ROOT / "docs" / "limits.md"):
        assert "serving.md" in page.read_text(encoding="utf-8"), page
    assert "rcvit_xs" in models.CONFIGS
