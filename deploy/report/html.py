"""A page as one HTML file: styles and drawings inside, no script, no request to anywhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from deploy.console import clean
from deploy.report.blocks import Page

_FOLDER = Path(__file__).parent / "template"


def to_html(page: Page) -> str:
    """Return the whole page; every string of the record is escaped, control characters are dropped."""
    style = Markup((_FOLDER / "style.css").read_text(encoding="utf-8"))
    return clean(_template().render(page=page, style=style))


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
