"""docs/how_it_works.md: its formulas are the mixer's, its numbers those of committed files, what it
links to is there, and its pictures can be read on a phone."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from casvit_kernels import AdditiveTokenMixer, backends, testing
from casvit_kernels.backends import cpu
from casvit_kernels.testing import numerics

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.report import command, floor  # noqa: E402
from bench.report.documents import SETS, ReportError  # noqa: E402

PAGE = ROOT / "docs" / "how_it_works.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LINKS = re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", TEXT)
PICTURES = [target for mark, _, target in LINKS if mark]
SVG = "{http://www.w3.org/2000/svg}"
PHONE = 390  # pixels


@pytest.fixture(scope="module")
def names():
    """What the page's blocks define."""
    found = {}
    for code in BLOCKS:
        exec(compile(code, str(PAGE), "exec"), found)
    return found


def plain(training):
    torch.manual_seed(0)
    m = AdditiveTokenMixer(12, attn_bias=True).double()
    for module in m.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(t)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return m.train(training)


@pytest.mark.parametrize("training", [False, True])
def test_the_formulas_are_the_mixer(names, training):
    m = plain(training)
    x = torch.randn(2, 12, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(names["mixer"](x, m), m(x), rtol=1e-12, atol=1e-12)


def test_the_folded_convolution_is_that_and_its_norm(names):
    conv, norm, *_ = plain(training=False).oper_q[0].block
    x = torch.randn(2, 12, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        weight, bias = names["folded"](conv, norm)
        found = nn.functional.conv2d(x, weight, bias, padding=1, groups=12)
        torch.testing.assert_close(found, norm(conv(x)), rtol=1e-12, atol=1e-12)


def test_the_tables_are_those_of_the_committed_files():
    assert command.outputs(ROOT)[PAGE] == TEXT


def test_every_file_that_it_links_to_is_there():
    targets = {t for _, _, t in LINKS if not t.startswith("http")}
    assert len(targets) > 40
    missing = [t for t in sorted(targets) if not (PAGE.parent / t.partition("#")[0]).exists()]
    assert missing == []


def test_it_names_every_backend_and_instruction_set():
    wanted = {status.name for status in backends()} | set(SETS) | set(cpu.instruction_sets())
    assert [name for name in sorted(wanted) if f"`{name}`" not in TEXT] == []


def test_it_says_how_long_vectors_are():
    found = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", TEXT, re.MULTILINE))
    assert set(found) == set(SETS)
    for name, lanes in found.items():
        source = ROOT / "csrc" / "cpu" / "simd" / f"vec_{name.split('_')[0]}.h"
        source = source if name != "amx" else source.with_name("vec_avx512.h")
        assert f"constexpr int VL = {lanes};" in source.read_text(encoding="utf-8"), name


def test_it_says_the_factors_of_the_judge_and_how_many_layouts():
    table = TEXT.partition("at most so many times PyTorch's own |")[2].partition("\n\n")[0]
    found = [float(line.rsplit("|", 2)[1]) for line in table.splitlines()[2:]]
    assert found == [numerics.FACTOR, numerics.GRADIENT_FACTOR, numerics.VANISHING_FACTOR]
    assert len(testing.LAYOUTS) == 8
    assert "eight layouts" in TEXT


def test_the_least_units_of_the_table_are_those_of_the_text():
    rows = re.findall(r"^\|(?:[^|\n]*\|){3} (\d+) \|$", TEXT, re.MULTILINE)
    product, one, two, statistics, *passes = map(int, rows)
    assert product == 4
    assert [one, two, statistics, sum(passes)] == [of.least for of in floor.PASSES]


# Pictures


def extent(text):
    """Left and right end, about: of 12 pixels a letter of a wide font takes 7."""
    classes = text.get("class", "")
    long = (8.5 if "title" in classes else 7.0) * len(text.text)
    left = float(text.get("x")) - (long / 2 if "middle" in classes else 0)
    return left, left + long


@pytest.mark.parametrize("picture", PICTURES)
def test_pictures_say_in_words_what_they_show(picture):
    root = ElementTree.parse(PAGE.parent / picture).getroot()
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title.text
    assert len(description.text.split()) > 20
    assert root.get("aria-labelledby").split() == [title.get("id"), description.get("id")]
    alternative = next(text for mark, text, target in LINKS if mark and target == picture)
    assert len(alternative.split()) > 20


@pytest.mark.parametrize("picture", PICTURES)
def test_pictures_can_be_read_on_a_phone_and_in_the_dark(picture):
    """On paper of their own, and no text runs over it or is too small."""
    root = ElementTree.parse(PAGE.parent / picture).getroot()
    _, _, width, height = map(float, root.get("viewBox").split())
    style = root.find(f"{SVG}style").text
    sizes = [int(n) for n in re.findall(r"(\d+)px", style)]
    assert min(sizes) * min(1.0, PHONE / width) >= 11
    paper = root.find(f"{SVG}rect")
    assert paper.get("class") == "paper"
    assert ".paper { fill: #ffffff" in style
    assert float(paper.get("width")) >= width - 2
    assert float(paper.get("height")) >= height - 2
    texts = list(root.iter(f"{SVG}text"))
    assert len(texts) > 10
    for text in texts:
        left, right = extent(text)
        assert 4 <= left <= right <= width - 4, text.text
        assert float(text.get("y")) <= height - 6, text.text


@pytest.mark.parametrize("picture", PICTURES)
def test_no_text_of_a_picture_runs_over_an_edge(picture):
    """It lies in a box or beside it."""
    root = ElementTree.parse(PAGE.parent / picture).getroot()
    for text in root.iter(f"{SVG}text"):
        (left, right), y = extent(text), float(text.get("y"))
        for box in root.iter(f"{SVG}rect"):
            x, top, width, height = (float(box.get(k)) for k in ("x", "y", "width", "height"))
            if top < y and y - 9 < top + height and left < x + width and x < right:
                assert x <= left <= right <= x + width, text.text
                assert top <= y - 9 <= y <= top + height, text.text


def test_there_are_three_pictures():
    assert PICTURES == ["how/mixer.svg", "how/traffic.svg", "how/kept.svg"]


# Tables


GONE = {"maps": None}


def static(**changes):
    rows = [
        {
            "target": "sm_90a",
            "dtype": "bf16",
            "channels": 48,
            "kernel": kernel,
            "maps": 2.0 + i,
            "rest": 0.5,
            "chosen": kernel != "single_pass",
            "loops": {},
            "straight": 1.0,
        }
        for i, kernel in enumerate(k for of in floor.PASSES for k in of.cuda)
    ]
    for row in rows:
        row |= changes.get(row["kernel"], {})
    return {"rows": [row for row in rows if row["maps"] is not None]}


TRAFFIC = """
## Batch 256, 224 x 224 input

| stage | C, H x W | statistics | merge statistics | gates | channel gates | combine | backward |
|---|---|---:|---:|---:|---:|---:|---:|
| xs 1 | 48, 56 x 56 | 2.1 | 0.1 | **0.5** | 0.25 | 1.25 | 15 |
| t 1 | 96, 56 x 56 | 9 | 9 | 9 | 9 | 9 | 9 |

## Batch 1, 224 x 224 input

| xs 1 | 48, 56 x 56 | 9 | 9 | 9 | 9 | 9 | 9 |
"""


def cells(lines):
    return {
        title.strip(): [c.strip() for c in rest]
        for title, *rest in (line.strip("|").split("|") for line in lines if line.startswith("| "))
    }


def test_units_of_the_kernels_are_added_up():
    found = cells(floor.floor_table(static(), TRAFFIC))
    assert found[""] == ["least", "48, 56 x 56"]
    assert found["inference, one launch, `cuda`"] == ["4", "2.00 (2.5)"]
    assert found["inference, two launches, `cuda`"] == ["6", "**7.00 (8.0)**"]
    assert found["inference, `triton`"] == ["6", "(7.2)"]  # 4 x 0.5 + 0.25 + 4 x 1.25
    assert found["batch statistics, `triton`"] == ["2", "(2.2)"]
    assert found["backward, three passes, `cuda`"] == ["13", "21.00 (22.5)"]
    assert found["backward, `triton`"] == ["13", "(15.0)"]


def test_a_launch_that_does_not_fit_is_said():
    document = static(single_pass=GONE)
    found = cells(floor.floor_table(document, TRAFFIC))
    assert found["inference, one launch, `cuda`"] == ["4", "does not fit"]


def test_what_is_kept_is_in_units_of_the_input():
    row = {
        "model": "xs",
        "stage": 1,
        "shape": [2, 3, 4, 5],
        "eager_bytes": 4800,
        "fused_bytes": 528,
    }
    found = cells(floor.kept_table({"rows": [row]}))
    assert found["xs stage 1, (2, 3, 4, 5)"] == ["10.00", "1.10"]


@pytest.fixture
def checkout(tmp_path):
    """A tree with the page, the numbers that it takes, and nothing else."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"{command.BEGIN}\n{command.END}\n")
    marks = "\n".join((*floor.FLOOR_MARKS, *floor.KEPT_MARKS))
    (tmp_path / "docs" / "how_it_works.md").write_text(f"# How\n\n{marks}\n\nafter\n")
    (tmp_path / "docs" / "triton_traffic.md").write_text(TRAFFIC)
    (results / "cuda_kernels.json").write_text(json.dumps(static()))
    row = {"model": "xs", "stage": 1, "shape": [1, 1, 1, 1], "eager_bytes": 8, "fused_bytes": 4}
    (results / "saved_bytes.json").write_text(json.dumps({"torch": "2.15.0", "rows": [row]}))
    return tmp_path


def test_the_report_fills_the_tables_in(checkout):
    page = checkout / "docs" / "how_it_works.md"
    text = command.outputs(checkout)[page]
    assert "**7.00 (8.0)**" in text
    assert "| xs stage 1, (1, 1, 1, 1) | 2.00 | 1.00 |" in text
    assert text.endswith("\n\nafter\n")
    page.write_text(text)
    assert command.outputs(checkout)[page] == text


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("docs/triton_traffic.md", None, "expected a file at .*triton_traffic.md"),
        ("docs/triton_traffic.md", "nothing", "triton_traffic.md: expected a table of batch 256"),
        ("docs/triton_traffic.md", TRAFFIC.replace("| gates |", "| x |"), "'gates'"),
        ("bench/results/cuda_kernels.json", json.dumps(static(gates=GONE)), "'gates'"),
        ("bench/results/saved_bytes.json", None, "expected .*saved_bytes.json"),
        ("docs/how_it_works.md", "# How\n", "expected the markers <!-- floor:begin -->"),
    ],
)
def test_what_is_missing_is_named(checkout, name, text, said):
    path = checkout / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ReportError, match=said):
        command.outputs(checkout)
