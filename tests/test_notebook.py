"""examples/tour.ipynb: its form, and that all of it runs from the first cell to the last.

The cells are run by a plain Python that starts empty, in order, as a kernel runs them after "restart and
run all". They use nothing of IPython (no magics, no value shown by standing last in a cell), which the
quick tests hold; so that a kernel, and the packages that bring one, would add nothing.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import Page

import casvit_kernels

ROOT = Path(casvit_kernels.__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
if not NOTEBOOK.is_file():
    pytest.skip("the examples are not installed with the package", allow_module_level=True)
DOCUMENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CELLS = DOCUMENT["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]

# Figures are drawn where `show` would show them, and counted; an error names its cell.
RUNNER = """
import json, sys
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

shown = []
def show():
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
        shown.append(number)
    plt.close("all")

plt.show = show
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        print("cell", cell["id"], flush=True)
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
assert not plt.get_fignums(), "a figure was not shown"
print("figures", len(shown))
"""


def source(cell):
    return "".join(cell["source"])


def test_it_is_a_notebook_of_format_4_5():
    assert (DOCUMENT["nbformat"], DOCUMENT["nbformat_minor"]) == (4, 5)
    assert set(DOCUMENT) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert DOCUMENT["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in CELLS:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"], re.ASCII)
        assert cell["metadata"] == {}
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == keys
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


def test_it_holds_nothing_of_the_machine_that_wrote_it():
    for cell in CODE:
        assert cell["execution_count"] is None
        assert cell["outputs"] == []
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"[\"'(\s](/[a-z]+/|[A-Z]:\\|~/|file:)", text)


def test_cells_are_plain_python_and_find_what_they_import():
    for cell in CODE:
        tree = ast.parse(source(cell))  # no magics
        last = tree.body[-1]
        shows = isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call)
        assert not shows, f"{cell['id']}: its last value is shown by IPython alone"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("casvit_kernels"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    found = hasattr(module, alias.name)
                    assert found or importlib.import_module(f"{node.module}.{alias.name}")


def test_links_lead_somewhere(tmp_path):
    text = "\n\n".join(source(cell) for cell in CELLS if cell["cell_type"] == "markdown")
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    links = Page(page).links()
    assert len(links) >= 5
    for target in links:
        assert (NOTEBOOK.parent / target).is_file(), target


@pytest.mark.long
def test_it_runs_from_an_empty_start(tmp_path):
    for package in ("matplotlib", "numpy", "onnxruntime", "onnxscript", "skimage", "sklearn"):
        pytest.importorskip(package)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(NOTEBOOK)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert [line.split()[1] for line in said if line.startswith("cell ")] == [
        cell["id"] for cell in CODE
    ]
    assert said[-1] == "figures 4"
    assert "5 swapped" in said
    assert "5 restored" in said
    assert any(line.startswith("fuse_network: ") for line in said)
    assert list(tmp_path.iterdir()) == []  # what it writes it removes
