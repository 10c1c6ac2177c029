"""A page as Markdown: the same blocks, tables in GitHub's form, charts as the sentence that describes them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deploy.report.blocks import Block, Cell, Chart, Code, Details, Facts, Image, Listing, Page, Table, Text

_SPECIAL = re.compile(r"[\\`*{<|\[\]~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")
_AT_LINE_START = re.compile(r"^(\d*)([#>+.)-])(?=\s|[#-])")


def to_markdown(page: Page) -> str:
    """Return the whole page."""
    lines = [f"# {page.status}: {escape(page.verdict)}", "", f"**{escape(page.title)}**", ""]
    lines += [f"> {escape(statement)}\n" for statement in page.statements]
    lines += [f"- ✗ FAIL: {escape(failure)}" for failure in page.failures]
    lines += [f"- ! {escape(warning)}" for warning in page.warnings]
    if page.tiles:
        rows = tuple((t.label, Cell(text=f"{t.value} ({t.note})")) for t in page.tiles)
        lines += ["", *_facts(Facts(rows=rows))]
    for section in page.sections:
        lines += ["", f"## {escape(section.title)}", *_blocks(section.blocks)]
    lines += ["", "---", escape(page.footer), ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Take the meaning from every character that Markdown or HTML would act on; one line stays one line."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _AT_LINE_START.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", one_line))


def _blocks(blocks: Sequence[Block]) -> list[str]:
    lines: list[str] = []
    for block in blocks:
        lines += ["", *_block(block)]
    return lines


def _block(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [escape(block.text)]
    if isinstance(block, Listing):
        return [f"- {escape(item)}" for item in block.items]
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Facts):
        return _facts(block)
    if isinstance(block, (Chart, Image)):
        return [f"{escape(block.title)}. {escape(block.sentence)}"]
    if isinstance(block, Code):
        return _code(block)
    return _details(block)


def _table(table: Table) -> list[str]:
    rule = ["---:" if c in table.numeric else "---" for c in table.columns]
    rows = [[_cell(c) for c in row] for row in table.rows]
    return [f"**{escape(table.title)}**", "", *(_row(r) for r in ([escape(c) for c in table.columns], rule, *rows))]


def _facts(facts: Facts) -> list[str]:
    return ["| | |", "| --- | --- |", *(_row([escape(name), _cell(cell)]) for name, cell in facts.rows)]


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _cell(cell: Cell) -> str:
    return escape(cell.text)


def _code(code: Code) -> list[str]:
    longest = max((len(run) for run in re.findall("`+", code.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{code.language}", code.text, fence]


def _details(details: Details) -> list[str]:
    return ["<details>", f"<summary>{escape(details.summary)}</summary>", *_blocks(details.blocks), "", "</details>"]
