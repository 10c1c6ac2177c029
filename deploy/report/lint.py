"""What lint found in the graph that the engines were built from."""

from __future__ import annotations

from collections.abc import Sequence

from deploy import units
from deploy.records import EngineRecord, LintRecord
from deploy.report.blocks import Block, Cell, Details, Table, Text, cells


def lint_blocks(engines: Sequence[EngineRecord]) -> tuple[Block, ...]:
    """Show the findings; engines of one build share them, and older bundles have none."""
    found = list({record.goals: record for engine in engines if (record := engine.lint)}.values())
    return tuple(block for record in found for block in _blocks(record))


def _blocks(record: LintRecord) -> tuple[Block, ...]:
    goals = ", ".join(record.goals)
    if not record.findings:
        return (Text(text=f"Lint for {goals}: clean, {record.rules} rules."),)
    rows = tuple(
        cells(
            ", ".join(dict.fromkeys(f.severities.values())),
            Cell(text=f.rule, code=True),
            Cell(text=f"{f.operator} {', '.join(f.nodes)}", code=True),
            units.count(f.count),
            f.what,
            f.fix,
            f.source,
        )
        for f in record.findings
    )
    columns = ("severity", "rule", "where", "places", "what", "fix", "source")
    table = Table(title=f"Lint for {goals}", columns=columns, rows=rows, numeric=frozenset({"places"}))
    return (Details(summary=f"Lint for {goals}: {len(record.findings)} findings", blocks=(table,)),)
