"""The site: its reference has every public name, pictures say what they show, links lead somewhere."""

import ast
import importlib
import importlib.util
import inspect
import re
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest

import casvit_kernels

ROOT = Path(casvit_kernels.__file__).parents[1]
DOCS = ROOT / "docs"
if not (DOCS / "conf.py").is_file():
    pytest.skip("the site is not installed with the package", allow_module_level=True)
PUBLIC = {
    "casvit_kernels": "casvit_kernels",
    "casvit_kernels.models": "models",
    "casvit_kernels.models.heads": "heads",
    "casvit_kernels.export": "export",
    "casvit_kernels.export.mil": "export",
    "casvit_kernels.tokens": "tokens",
    "casvit_kernels.testing": "testing",
    "casvit_kernels.benchmark": "benchmark",
}
PAGES = [
    *DOCS.rglob("*.md"),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(ROOT / name / "README.md" for name in ("bench", "bench/results", "csrc")),
]
SVG = "{http://www.w3.org/2000/svg}"


def reference(page):
    """The names on a page of the reference, and for each the kind of its directive."""
    text = (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\{eval-rst\}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = {}
    directive = re.compile(
        r"^\.\. (auto\w+|py:data|py:module):: (.*(?:\n {13}\S.*)*)", re.MULTILINE
    )
    module = ""
    for kind, names in directive.findall("\n".join(blocks)):
        if kind == "py:module":
            module = names
            continue
        for name in re.sub(r"\(.*", "", names).split():  # without a signature
            name = name if "." in name else f"{module}.{name}"
            assert name not in found, f"{name} stands twice on {page}.md"
            found[name] = kind
    return found


def resolved(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def documented():
    """What the reference takes from docstrings: full names."""
    every = [
        (n, kind) for page in sorted(set(PUBLIC.values())) for n, kind in reference(page).items()
    ]
    return [name for name, kind in every if kind != "py:data"]


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module):
    names = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    assert names <= reference(PUBLIC[module]).keys()


@pytest.mark.parametrize("page", sorted({*PUBLIC.values(), "backends"}))
def test_the_reference_has_only_names_that_there_are(page):
    for name, kind in reference(page).items():
        found = resolved(name)
        data = not (inspect.isclass(found) or inspect.isfunction(found))
        assert data == (kind == "py:data"), name


@pytest.mark.parametrize("name", documented())
def test_it_is_documented(name):
    found = resolved(name)
    doc = vars(found).get("__doc__") if inspect.isclass(found) else found.__doc__
    assert doc, f"{name} has no docstring"
    # What NamedTuples and dataclasses write themselves.
    assert not doc.startswith(f"{found.__name__}("), f"{name} has no docstring"


def own_functions(found):
    """A function, or the public methods that a class itself has, with its constructor."""
    if inspect.isfunction(found):
        return {found.__name__: found}
    every = {n: getattr(f, "__func__", f) for n, f in vars(found).items()}
    every |= {n: f.fget for n, f in every.items() if isinstance(f, property)}
    constructors = ("__init__", "__post_init__")
    return {
        name: function
        for name, function in every.items()
        if inspect.isfunction(function)
        and function.__code__.co_filename.endswith(".py")  # not written by a decorator
        and (name in constructors or not name.startswith("_"))
    }


def raises(function):
    """Whether an exception leaves it: not of functions inside it, which may never be called."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise):
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
    return False


@pytest.mark.parametrize("name", documented())
def test_it_says_what_it_raises(name):
    found = resolved(name)
    for method, function in own_functions(found).items():
        if function.__module__.startswith("casvit_kernels") and raises(function):
            docs = f"{function.__doc__} {found.__doc__}"
            assert "Raises:" in docs or "raises as" in docs, f"{name}: {method}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_have_text_alternatives(page):
    text = page.read_text(encoding="utf-8")
    for alternative, source in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", text):
        assert len(alternative.split()) >= 3, f"{source}: {alternative!r} says too little"
        assert (page.parent / source).is_file(), source
    assert "<img" not in text


@pytest.mark.parametrize("picture", sorted(DOCS.rglob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_legible_in_both_colour_schemes(picture):
    root = ElementTree.parse(picture).getroot()
    assert (root.findtext(f"{SVG}title") or "").strip()
    assert root.get("viewBox"), "it cannot shrink to a phone's width"
    style = "".join(root.itertext())
    sides = [float(side) - 1 for side in root.get("viewBox").split()[2:]]  # less a border
    ground = [
        rect
        for rect in root.iter(f"{SVG}rect")
        if all(
            float(rect.get(k)) >= side for k, side in zip(("width", "height"), sides, strict=True)
        )
    ]
    assert ground or re.search(r"svg\s*\{[^}]*background", style), "it has no ground of its own"


def check_links():
    spec = importlib.util.spec_from_file_location("check_links", DOCS / "check_links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOOD = '<h1 id="top">A</h1><a href="#top">x</a><a href="b/two.html#there">y</a><img src="p.svg" alt="z">'


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        (GOOD, None),
        ('<a href="https://example.org/nothing">x</a>', None),
        ('<a href="missing.html">x</a>', "leads to no file"),
        ('<a href="b/two.html#elsewhere">x</a>', "leads to no anchor"),
        ('<a href="#elsewhere">x</a>', "leads to no anchor"),
        ('<a href="/etc/hosts">x</a>', "out of the site"),
        ('<a href="file:///etc/hosts">x</a>', "out of the site"),
        ('<a href="page.md">x</a>', "include_patterns"),
        ('<img src="p.svg" alt=" ">', "without a text alternative"),
    ],
)
def test_links_of_the_built_site(page, fault, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "b" / "two.html").write_text('<p id="there"><a href="../index.html">back</a>')
    for name in ("p.svg", "page.md"):
        (tmp_path / name).write_text("")
    found = check_links().problems_of(tmp_path)
    if fault is None:
        assert found == []
    else:
        (line,) = found
        assert line.startswith("index.html: ")
        assert fault in line


def test_a_site_without_pages_is_a_fault(tmp_path):
    assert check_links().problems_of(tmp_path)
