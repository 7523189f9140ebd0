"""How every picture of the report begins: size, title, the colours of a light and of a dark scheme."""

from __future__ import annotations

from xml.sax.saxutils import escape


def opening(title: str, width: int, height: int, light: str = "", dark: str = "") -> list[str]:
    """The lines up to the title, inclusive.

    A picture has a ground of its own: a page may be dark where the reader's system, whose scheme the
    picture follows, is light.

    Args:
        light: more rules of style.
        dark: those of them that are others in a dark scheme.
    """
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-labelledby="title">',
        f'<title id="title">{escape(title)}</title>',
        "<style>",
        "svg { background: #ffffff } text { font: 12px system-ui, sans-serif; fill: #1f2328 }",
        ".title { font-size: 15px; font-weight: 600 } .small { font-size: 11px }",
        f".axis {{ stroke: #59636e }} {light}".rstrip(),
        "@media (prefers-color-scheme: dark) {",
        "  svg { background: #0d1117 } text { fill: #e6edf3 }",
        f"  .axis {{ stroke: #9198a1 }} {dark}".rstrip(),
        "}",
        "</style>",
        f'<text class="title" x="12" y="24">{escape(title)}</text>',
    ]
