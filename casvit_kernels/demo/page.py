"""An HTML page that loads nothing else: a template filled, with the style and the figures inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


def fill(template: str, data: Mapping[str, Any], **values: Any) -> str:
    """The page.

    Args:
        template: a file of this package.
        data: everything measured, which the page embeds as JSON.
        values: for the template; escaped unless Markup.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_resource(template)).render(
        style=Markup(_resource("report.css")),
        # A "<" could end the script element; "\u003c" is the same JSON.
        data=Markup(json.dumps(data).replace("<", "\\u003c")),
        **values,
    )


def _resource(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")
