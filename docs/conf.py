"""Sphinx settings of the site: `make docs`.

The source directory is the root of the repository, not docs/: so a link from docs/ to bench/README.md is
the same on a Git host and here, where it leads to a page; one to a source file becomes a download, and
one to nothing is a warning, which ends the build.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this tree, not an installed copy

from casvit_kernels import __version__  # noqa: E402

project = "casvit_kernels"
copyright = "2026 The casvit_kernels authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    "bench/results/README.md",
    "SECURITY.md",
    "csrc/README.md",
    "release/README.md",
    "tests/cuda_emulation/README.md",
]
exclude_patterns = [".*", "build", "dist", "shared"]  # not walked through

# Anchors as Git hosts make them.
myst_heading_anchors = 4
# Indented blocks are shells, trees and diagrams; Python stands in fences that say so.
highlight_language = "none"

# A name in single backticks is a link where the reference has it, else code.
default_role = "py:obj"
# Names of our own that are written in full must be there. Others are torch's, arguments, files.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!casvit_kernels\.).*")]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_type_aliases = {"StandIn": "casvit_kernels.FusedNetwork"}  # its only kind
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"
viewcode_follow_imported_members = True

html_theme = "furo"
html_title = f"casvit_kernels {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_additional_pages = {"index": "start.html"}  # pages are in docs/, and people open the folder
html_use_index = html_domain_indices = False  # search, and the reference, serve better
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"
pygments_dark_style = "github-dark"


def blank_fields(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """NamedTuple describes fields by their number: a field that nobody else describes has its type."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def drop_dead_links(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Sources link back as if all of a file were documented in one module; some of ours is in two."""
    if page.startswith("_modules/casvit_kernels"):
        known = app.env.domains["py"].objects  # type: ignore[attr-defined]
        link = re.compile(r'<a class="viewcode-back" href="[^"]*#([^"]+)">.*?</a>')
        there = {name for name, entry in known.items() if not entry.aliased}
        kept = link.sub(lambda found: found[0] if found[1] in there else "", context["body"])
        context["body"] = kept


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", blank_fields)
    app.connect("html-page-context", drop_dead_links)
