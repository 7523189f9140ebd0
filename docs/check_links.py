"""Whether the built site holds together: links, anchors and pictures that lead somewhere.

    python docs/check_links.py build/docs

Standard library alone; links that leave the site are not followed.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page offers and asks for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.problems: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {name for key in ("id", "name") if (name := given.get(key))}
        self.links += [link for key in ("href", "src") if (link := given.get(key))]
        if tag == "img" and not (given.get("alt") or "").strip():
            self.problems.append(f"picture without a text alternative: {given.get('src')}")


def problems_of(site: Path) -> list[str]:
    """One line for each fault, with the page that has it."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        faults = page.problems + [why for link in page.links if (why := _why(link, path, pages))]
        found += [f"{path.relative_to(site.resolve())}: {fault}" for fault in faults]
    return found if pages else [f"{site}: there is no page"]


def _why(link: str, source: Path, pages: dict[Path, Page]) -> str | None:
    """What is wrong with a link, or None."""
    parts = urlsplit(link)
    if parts.scheme in ("http", "https", "mailto", "data"):
        return None
    if parts.scheme or parts.netloc or parts.path.startswith("/"):
        return f"{link} leads out of the site, to somewhere that only this machine may have"
    target = (source.parent / unquote(parts.path)).resolve() if parts.path else source
    if not target.is_file():
        return f"{link} leads to no file"
    if target.suffix == ".md":
        return f"{link} is a download: its page is missing in include_patterns of docs/conf.py"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return f"{link} leads to no anchor"
    return None


def main(arguments: list[str]) -> int:
    found = problems_of(Path(arguments[0]))
    for line in found:
        print(line)
    print(f"{len(found)} problems" if found else "every link inside the site leads somewhere")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
