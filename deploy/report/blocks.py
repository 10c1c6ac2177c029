"""What a page is made of: a few kinds of blocks that both the HTML and the Markdown writer know.

Sections are written once, as blocks; so the two files cannot say different things, and a new kind of content is one
dataclass here, one macro in the template and one function in ``markdown.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

GOOD, BAD, WARN, QUIET = "good", "bad", "warn", "quiet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A piece of text with a tone; the text itself says what the tone says, colour is never alone."""

    text: str
    tone: str = ""
    code: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """A bulleted list."""

    kind: ClassVar[str] = "listing"
    items: tuple[str, ...]
    tone: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table; ``numeric`` names the columns that are set to the right."""

    kind: ClassVar[str] = "table"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Names with values."""

    kind: ClassVar[str] = "facts"
    rows: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A drawing that also has a sentence; its figures stand in a table or in ``sentence``."""

    kind: ClassVar[str] = "chart"
    title: str
    sentence: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()  # mark ("bar", "bar-before", "limit", "dot", "dot-before", "p50"), meaning


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A picture that lies in the page itself; ``data`` is base64."""

    kind: ClassVar[str] = "image"
    title: str
    sentence: str
    media: str
    data: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Lines to copy."""

    kind: ClassVar[str] = "code"
    text: str
    language: str = "sh"


@dataclass(frozen=True, kw_only=True, slots=True)
class Details:
    """Blocks that are folded away."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: tuple[Block, ...]


Block = Text | Listing | Table | Facts | Chart | Image | Code | Details


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A headed part of the page; ``slug`` is its anchor."""

    slug: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One figure at the head of the page."""

    label: str
    value: str
    note: str
    tone: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A whole report: the verdict first."""

    title: str
    status: str
    tone: str
    verdict: str
    statements: tuple[str, ...]  # where the weights came from, verbatim
    failures: tuple[str, ...]
    warnings: tuple[str, ...]
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    footer: str


def cells(*texts: str | Cell) -> tuple[Cell, ...]:
    """Turn a row of strings into cells."""
    return tuple(t if isinstance(t, Cell) else Cell(text=t) for t in texts)
